//! `shoal pki`: the keys of a cluster as files.
//!
//! `init` makes a directory with `ca.pem`, `ca.key`, `goal.key` and `trust.bin`; it is the cluster's root and
//! belongs on no machine that runs anything but the coordinator's `goal.key`. `issue` makes a directory for
//! one process: `identity.pem`, `identity.key` and a copy of `trust.bin`. Nothing is ever overwritten.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use clap::Subcommand;
use shoal_pki::{CERTIFICATE_DAYS, CertificateAuthority, GoalSigner, IssueRequest, Role, Trust};
use shoal_proto::{
    MachineName, RegionName, codec,
    trust::{TRUST_MAX_BYTES, TrustBundle},
};

use crate::{
    connect::Connection,
    exit::usage,
    show,
    trust::{self, RotateCommand},
};

/// What is for everybody.
pub(crate) const MODE_PUBLIC: u32 = 0o644;

/// What is for its holder only.
pub(crate) const MODE_SECRET: u32 = 0o600;

#[derive(Subcommand)]
pub(crate) enum PkiCommand {
    /// Make a new cluster's CA, goal key and trust bundle.
    Init {
        /// The directory to make them in.
        dir: PathBuf,
        /// The cluster's name.
        #[arg(long)]
        cluster: String,
    },
    /// Issue a certificate to a process or an operator.
    Issue(IssueArgs),
    /// Have all certificates of a machine count no longer, everywhere, within seconds.
    Revoke(trust::RevokeArgs),
    /// Show whom the cluster believes, and how many machines go by which trust and CA.
    Status(trust::StatusArgs),
    /// Replace the CA while the cluster runs.
    #[command(subcommand)]
    RotateCa(RotateCommand),
    /// Replace the key that goals are signed with while the cluster runs.
    #[command(subcommand)]
    RotateGoalKey(RotateCommand),
    /// Bring an operator's own directory up to date: the newest trust, and a renewed certificate.
    Refresh(RefreshArgs),
}

#[derive(clap::Args)]
pub(crate) struct RefreshArgs {
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct IssueArgs {
    /// The cluster's directory, made by `shoal pki init`.
    #[arg(long, value_name = "DIR")]
    pki: PathBuf,
    /// What it is for: coordinator, worker, region, agent or operator.
    #[arg(long)]
    role: Role,
    /// The machine's or operator's name, unique in the cluster.
    #[arg(long)]
    name: MachineName,
    /// The region; for the roles region and agent.
    #[arg(long)]
    region: Option<RegionName>,
    /// A DNS name or IP address that others reach it at; repeat for each. Needed for the coordinator.
    #[arg(long = "host")]
    hosts: Vec<String>,
    /// How long the certificate counts.
    #[arg(long, default_value_t = CERTIFICATE_DAYS)]
    days: u32,
    /// The directory to make the files in.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl PkiCommand {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Revoke(args) => args.run().await?,
            Self::Status(args) => args.run().await?,
            Self::RotateCa(command) => trust::rotate_ca(command).await?,
            Self::RotateGoalKey(command) => trust::rotate_goal_key(command).await?,
            Self::Refresh(args) => trust::refresh(&args.connection).await?,
            Self::Init { dir, cluster } => {
                init(&dir, &cluster)?;
                show::note(&format!(
                    "the keys of cluster {cluster} are in {}; keep ca.key and goal.key safe",
                    dir.display()
                ));
            }
            Self::Issue(args) => {
                let request = IssueRequest {
                    machine: args.name,
                    region: args.region,
                    role: args.role,
                    hosts: args.hosts,
                    days: args.days,
                };
                Pki::open(&args.pki)?.issue(&request, &args.out)?;
                show::note(&format!("the identity is in {}", args.out.display()));
            }
        }
        Ok(())
    }
}

/// Makes a new cluster's keys in `dir`.
pub(crate) fn init(dir: &Path, cluster: &str) -> anyhow::Result<()> {
    let authority = CertificateAuthority::create(cluster)?;
    let signer = GoalSigner::create(1)?;
    let bundle = TrustBundle {
        cluster: cluster.into(),
        number: 1,
        ca_certificates: vec![authority.cert_der().to_vec()],
        goal_keys: vec![signer.public()],
        revoked: Vec::new(),
    };
    let trust = codec::encode(&signer.sign_trust(&bundle)?, TRUST_MAX_BYTES)?;
    write_new(
        dir,
        &[
            ("ca.key", authority.key_pem()?.as_bytes(), MODE_SECRET),
            ("goal.key", signer.to_pem()?.as_bytes(), MODE_SECRET),
            ("ca.pem", authority.cert_pem().as_bytes(), MODE_PUBLIC),
            ("trust.bin", &trust, MODE_PUBLIC),
        ],
    )
}

/// A cluster's root directory, opened to issue certificates.
pub(crate) struct Pki {
    authority: CertificateAuthority,
    trust: Vec<u8>,
}

impl Pki {
    /// Reads the CA and the trust bundle in `dir`.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read(&path).with_context(|| {
                format!("cannot read {} (make it with: shoal pki init)", path.display())
            })
        };
        let text = |name: &str| anyhow::Ok(String::from_utf8(read(name)?)?);
        let authority = CertificateAuthority::from_pem(&text("ca.pem")?, &text("ca.key")?)
            .with_context(|| format!("the CA in {} is not usable", dir.display()))?;
        let trust = read("trust.bin")?;
        Trust::from_signed(&trust)
            .with_context(|| format!("{}/trust.bin is not usable", dir.display()))?;
        Ok(Self { authority, trust })
    }

    /// Issues a certificate and writes it, its key and the trust bundle into `out`.
    pub(crate) fn issue(&self, request: &IssueRequest, out: &Path) -> anyhow::Result<()> {
        let role = request.role;
        match (role, &request.region) {
            (Role::Region | Role::Agent, None) => {
                return Err(usage(format!("role {role} needs --region")));
            }
            (Role::Region | Role::Agent, Some(_)) | (_, None) => {}
            (_, Some(_)) => {
                return Err(usage(format!("role {role} belongs to no region: leave --region out")));
            }
        }
        if role == Role::Coordinator && request.hosts.is_empty() {
            return Err(usage(
                "a coordinator needs --host for each name or address that others reach it at",
            ));
        }
        let issued = self.authority.issue(request)?;
        write_new(
            out,
            &[
                ("identity.key", issued.key_pem.as_bytes(), MODE_SECRET),
                ("identity.pem", issued.cert_pem.as_bytes(), MODE_PUBLIC),
                ("trust.bin", &self.trust, MODE_PUBLIC),
            ],
        )
    }
}

/// Writes a new CA's certificate and key.
pub(crate) fn write_ca(dir: &Path, authority: &CertificateAuthority) -> anyhow::Result<()> {
    write_new(
        dir,
        &[
            ("ca.key", authority.key_pem()?.as_bytes(), MODE_SECRET),
            ("ca.pem", authority.cert_pem().as_bytes(), MODE_PUBLIC),
        ],
    )
}

/// Writes a new goal key.
pub(crate) fn write_goal_key(dir: &Path, signer: &GoalSigner) -> anyhow::Result<()> {
    write_new(dir, &[("goal.key", signer.to_pem()?.as_bytes(), MODE_SECRET)])
}

/// Makes a directory that only its owner enters; what is above it may have to be entered by others.
pub(crate) fn make_private_dir(dir: &Path) -> anyhow::Result<()> {
    let make = || -> io::Result<()> {
        if let Some(above) = dir.parent() {
            fs::create_dir_all(above)?;
        }
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
            made => made,
        }
    };
    make().with_context(|| format!("cannot make the directory {}", dir.display()))
}

/// Writes a file that is not there yet, synced.
pub(crate) fn write_one(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Writes files that must not be there yet: when one is, none is written.
fn write_new(dir: &Path, files: &[(&str, &[u8], u32)]) -> anyhow::Result<()> {
    make_private_dir(dir)?;
    for (name, ..) in files {
        let path = dir.join(name);
        ensure!(
            path.symlink_metadata().is_err(),
            "{} is there already; nothing was written: give another directory",
            path.display()
        );
    }
    for (name, bytes, mode) in files {
        write_one(&dir.join(name), bytes, *mode)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn request(role: Role, region: Option<&str>, hosts: &[&str]) -> IssueRequest {
        IssueRequest {
            machine: MachineName::new("m1").unwrap(),
            region: region.map(|region| RegionName::new(region).unwrap()),
            role,
            hosts: hosts.iter().map(ToString::to_string).collect(),
            days: 1,
        }
    }

    #[test]
    fn issued_identities_load_and_keys_are_private() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "test").unwrap();
        let out = dir.path().join("m1");
        let pki = Pki::open(dir.path()).unwrap();
        pki.issue(&request(Role::Agent, Some("eu"), &[]), &out).unwrap();
        let (identity, trust) = shoal_process::load_identity(&out).unwrap();
        assert_eq!(identity.member().role, Role::Agent);
        assert_eq!(
            trust.verify_certificate(identity.certificate_der()).unwrap(),
            *identity.member()
        );
        for key in
            [dir.path().join("ca.key"), dir.path().join("goal.key"), out.join("identity.key")]
        {
            assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "test").unwrap();
        let key = fs::read(dir.path().join("ca.key")).unwrap();
        assert!(init(dir.path(), "test").unwrap_err().to_string().contains("is there already"));
        assert_eq!(fs::read(dir.path().join("ca.key")).unwrap(), key);
        let pki = Pki::open(dir.path()).unwrap();
        let out = dir.path().join("m1");
        pki.issue(&request(Role::Operator, None, &[]), &out).unwrap();
        assert!(pki.issue(&request(Role::Operator, None, &[]), &out).is_err());
    }

    #[test]
    fn roles_say_what_they_need() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "test").unwrap();
        let pki = Pki::open(dir.path()).unwrap();
        let refused = |request, word: &str| {
            let error = pki.issue(&request, &dir.path().join("x")).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        refused(request(Role::Agent, None, &[]), "--region");
        refused(request(Role::Worker, Some("eu"), &[]), "--region");
        refused(request(Role::Coordinator, None, &[]), "--host");
        assert!(!dir.path().join("x").exists());
        assert!(Pki::open(&dir.path().join("no")).is_err());
        assert!(init(&dir.path().join("y"), "Not A Name").is_err());
    }
}
