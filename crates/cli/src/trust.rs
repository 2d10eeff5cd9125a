//! `shoal pki revoke|status|rotate-ca|rotate-goal-key|refresh`: whom the cluster believes, while it runs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use shoal_client::types::{
    CaBeginRequest, FinishRotation, GoalKeyBeginRequest, RevokeRequest, TrustStatus,
};
use shoal_pki::{CertificateAuthority, GoalSigner};
use shoal_process::Membership;
use shoal_proto::{MachineName, NodeId};

use crate::{connect::Connection, pki, show};

#[derive(clap::Args)]
pub(crate) struct RevokeArgs {
    /// The machine's, process's or operator's name.
    machine: MachineName,
    /// Its key, when no coordinator has ever heard of it: 64 hexadecimal digits.
    #[arg(long, value_name = "KEY")]
    node: Option<NodeId>,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct BeginArgs {
    /// The directory to make the new key in.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct FinishArgs {
    /// Also while machines still go by what is to go: they join again.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Subcommand)]
pub(crate) enum RotateCommand {
    /// Make the new one, and have it believed beside the present one.
    Begin(BeginArgs),
    /// Have the new one believed alone.
    Finish(FinishArgs),
}

impl RevokeArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let request = RevokeRequest { machine: self.machine.clone(), node: self.node };
        let revoked = self.connection.client()?.revoke(&request).await?;
        show::print_as(self.connection.json, &revoked, |revoked| {
            let keys: Vec<_> = revoked.nodes.iter().map(ToString::to_string).collect();
            format!("{} is revoked by trust {}: {}", self.machine, revoked.number, keys.join(", "))
        })
    }
}

impl StatusArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let status = self.connection.client()?.trust_status().await?;
        show::print_as(self.connection.json, &status, table)
    }
}

fn table(status: &TrustStatus) -> String {
    let standing = status.standing();
    let with = |ours: bool, text: &str| if ours { format!(" ({text})") } else { String::new() };
    let mut lines = vec![format!(
        "trust {}, {} keys revoked, {}",
        status.number, status.revoked, status.ca_hash
    )];
    for ca in &status.cas {
        let machines = standing.issuers.get(ca).copied().unwrap_or(0);
        let issues = with(status.issues_with.as_ref() == Some(ca), "issues certificates");
        lines.push(format!("CA {ca}{issues}: {machines} machines"));
    }
    let gone = standing.issuers.iter().filter(|(id, _)| !status.cas.contains(id));
    lines.extend(gone.map(|(id, machines)| format!("CA {id}, not believed: {machines} machines")));
    for key in &status.goal_keys {
        let signs = with(status.signs_with == Some(*key), "signs goals");
        lines.push(format!("goal key {key}{signs}"));
    }
    for (number, machines) in &standing.bundles {
        let known =
            if *number == 0 { "an unknown trust".into() } else { format!("trust {number}") };
        lines.push(format!("{machines} machines go by {known}"));
    }
    lines.join("\n")
}

/// `shoal pki rotate-ca`.
pub(crate) async fn rotate_ca(command: RotateCommand) -> anyhow::Result<()> {
    match command {
        RotateCommand::Begin(args) => {
            let client = args.connection.client()?;
            let cluster = args.connection.membership()?.trust().cluster().to_string();
            let authority = CertificateAuthority::create(&cluster)?;
            pki::write_ca(&args.out, &authority)?;
            let request = CaBeginRequest { certificate: authority.cert_pem() };
            let begun = client
                .begin_ca(&request)
                .await
                .with_context(|| format!("the new CA in {} is not believed", args.out.display()))?;
            show::print_as(args.connection.json, &begun, |begun| {
                format!(
                    "trust {} believes both CAs; put {}/ca.key in the place of ca_key on every coordinator, wait until \
                     shoal pki status counts no machine of the old one, then: shoal pki rotate-ca finish",
                    begun.number,
                    args.out.display()
                )
            })
        }
        RotateCommand::Finish(args) => {
            let request = FinishRotation { force: args.force };
            let done = args.connection.client()?.finish_ca(&request).await?;
            show::print_as(args.connection.json, &done, |done| {
                format!("trust {} believes the new CA alone", done.number)
            })
        }
    }
}

/// `shoal pki rotate-goal-key`.
pub(crate) async fn rotate_goal_key(command: RotateCommand) -> anyhow::Result<()> {
    match command {
        RotateCommand::Begin(args) => {
            let client = args.connection.client()?;
            let id = client.trust_status().await?.goal_keys.into_iter().max().unwrap_or(0) + 1;
            let signer = GoalSigner::create(id)?;
            pki::write_goal_key(&args.out, &signer)?;
            let public = hex(&signer.public().public);
            let begun = client.begin_goal_key(&GoalKeyBeginRequest { id, public }).await?;
            show::print_as(args.connection.json, &begun, |begun| {
                format!(
                    "trust {} believes both goal keys; put {}/goal.key in the place of goal_key on every coordinator, \
                     then: shoal pki rotate-goal-key finish",
                    begun.number,
                    args.out.display()
                )
            })
        }
        RotateCommand::Finish(args) => {
            let request = FinishRotation { force: args.force };
            let done = args.connection.client()?.finish_goal_key(&request).await?;
            show::print_as(args.connection.json, &done, |done| {
                format!("trust {} believes the new goal key alone", done.number)
            })
        }
    }
}

/// `shoal pki refresh`: an operator's own directory is nobody's process.
pub(crate) async fn refresh(connection: &Connection) -> anyhow::Result<()> {
    let membership = connection.membership()?;
    let client = connection.client()?;
    let after = membership.trust().number();
    // Their certificates may be of a CA that this directory does not know yet; the bundles prove themselves.
    let reply = client.trust_from_anybody(after).await?;
    let bundles = reply.bundles.iter().map(|text| unhex(text)).collect::<Option<Vec<_>>>();
    let Some(bundles) = bundles else { bail!("the coordinator sent something that is no trust") };
    if let shoal_process::Taken::Refused(why) = membership.take_trust(&bundles, "the coordinator") {
        bail!("the newest trust does not follow on the one in this directory: {why}");
    }
    // By the new trust, and shown as it is before the renewal.
    let client = connection.client()?;
    membership.take_certificate(&client.renew().await?.certificate)?;
    let identity = membership.identity();
    let number = membership.trust().number();
    show::print(&format!("trust {number}; the certificate of {} is renewed", identity.member()))
}

/// Reads an identity directory that belongs to an operator.
pub(crate) fn membership(dir: &Path) -> anyhow::Result<Membership> {
    anyhow::ensure!(
        fs::metadata(dir).is_ok(),
        "no identity in {}: make one with shoal pki issue --role operator",
        dir.display()
    );
    Membership::load(dir)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| {
            let pair = std::str::from_utf8(pair).ok().filter(|pair| pair.len() == 2)?;
            u8::from_str_radix(pair, 16).ok()
        })
        .collect()
}
