//! `shoal join-token` and `shoal join`: new machines.
//!
//! A new machine has nothing but a token and the hash of the CA's certificate. It reads the trust bundle from whoever
//! answers, believes of it the one CA that has this hash, and calls again: now the coordinator has shown a certificate of
//! that CA. Only then does it send the token, and what it keeps came by that second connection.

use std::{
    fs,
    io::Read as _,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::Subcommand;
use shoal_client::{
    Client,
    types::{JoinReply, JoinRequest, JoinToken, JoinTokenRequest, TrustQuery},
};
use shoal_pki::{CLOCK_LEEWAY_S, Identity, NewKey, Role, Trust};
use shoal_proto::{
    MachineName, RegionName,
    goal::{Labels, check_label},
};

use crate::{
    connect::{Connection, WHICH_COORDINATOR},
    exit::usage,
    pki::{MODE_SECRET, make_private_dir, write_one},
    show,
    trust::{hex, unhex},
};

/// The longest token that is read, in bytes.
const TOKEN_MAX_BYTES: u64 = 128;

#[derive(Subcommand)]
pub(crate) enum JoinTokenCommand {
    /// Make a token by which new machines get their certificates.
    Create(CreateArgs),
    /// List the tokens that are good.
    List(ListArgs),
    /// Make a token good for nothing.
    Revoke(RevokeArgs),
}

#[derive(clap::Args)]
pub(crate) struct CreateArgs {
    /// What the machines are for: agent, region or worker.
    #[arg(long)]
    role: Role,
    /// Their region; for the roles region and agent.
    #[arg(long)]
    region: Option<RegionName>,
    /// The zone of the agents.
    #[arg(long)]
    zone: Option<String>,
    /// A label of the agents, KEY=VALUE; repeat for each.
    #[arg(long = "label", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// How many machines may join by it.
    #[arg(long, default_value_t = 1)]
    uses: u32,
    /// For how long it is good.
    #[arg(long, default_value = "1h", value_parser = show::parse_lasting)]
    ttl: Duration,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct RevokeArgs {
    /// The token's public name.
    id: String,
    #[command(flatten)]
    connection: Connection,
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    check_label(key)?;
    check_label(value)?;
    Ok((key.into(), value.into()))
}

impl JoinTokenCommand {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Create(args) => {
                let request = JoinTokenRequest {
                    role: args.role.to_string(),
                    region: args.region,
                    zone: args.zone,
                    labels: args.labels.into_iter().collect(),
                    uses: args.uses,
                    ttl_s: args.ttl.as_secs(),
                };
                let made = args.connection.client()?.make_join_token(&request).await?;
                show::print_as(args.connection.json, &made, |made| {
                    format!(
                        "{}\non the new machine, with this token in FILE: shoal join --coordinator URL --token-file FILE \
                         --ca-hash {}",
                        made.token, made.ca_hash
                    )
                })
            }
            Self::List(args) => {
                let tokens = args.connection.client()?.join_tokens().await?;
                show::print_as(args.connection.json, &tokens, |tokens| list(tokens))
            }
            Self::Revoke(args) => {
                args.connection.client()?.revoke_join_token(&args.id).await?;
                let none = serde_json::json!({});
                show::print_as(args.connection.json, &none, |_| {
                    format!("{} is good for nothing any more", args.id)
                })
            }
        }
    }
}

fn list(tokens: &[JoinToken]) -> String {
    let mut table = show::table(&["ID", "ROLE", "REGION", "USES LEFT", "UNTIL", "BY"]);
    for token in tokens {
        table.add_row([
            token.id.clone(),
            token.role.clone(),
            token.region.as_ref().map(ToString::to_string).unwrap_or_default(),
            token.uses_left.to_string(),
            show::until(token.expires_at_ms),
            token.created_by.clone(),
        ]);
    }
    show::render(&table, "no join tokens")
}

#[derive(clap::Args)]
pub(crate) struct JoinArgs {
    /// A coordinator's address, https://HOST:PORT; repeat for each.
    #[arg(
        long = "coordinator",
        env = "SHOAL_COORDINATOR",
        value_name = "URL",
        value_delimiter = ','
    )]
    coordinators: Vec<String>,
    /// The file with the token.
    #[arg(long, value_name = "FILE", required_unless_present = "token_stdin")]
    token_file: Option<PathBuf>,
    /// Read the token from standard input.
    #[arg(long, conflicts_with = "token_file")]
    token_stdin: bool,
    /// The cluster's CA, as shoal join-token create and shoal pki status say it: blake3:HEX.
    #[arg(long, value_name = "HASH")]
    ca_hash: String,
    /// This machine's name, unique in the cluster [default: the host's].
    #[arg(long)]
    name: Option<MachineName>,
    /// The directory for identity/ and, of an agent, agent.toml.
    #[arg(long, value_name = "DIR", default_value = "/etc/shoal")]
    dir: PathBuf,
    /// The data_dir of an agent's configuration.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/shoal-agent")]
    data_dir: PathBuf,
    /// The IP address that other machines reach this one at, for an agent's configuration.
    #[arg(long)]
    advertise: Option<IpAddr>,
    /// Data address of a region process, HOST:PORT, for an agent's configuration; repeat for each [default: those that the
    /// coordinator knows].
    #[arg(long = "region-process", value_name = "ADDR")]
    region_processes: Vec<String>,
}

impl JoinArgs {
    fn token(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        match &self.token_file {
            Some(path) => fs::File::open(path)
                .and_then(|file| file.take(TOKEN_MAX_BYTES).read_to_string(&mut text))
                .with_context(|| format!("cannot read the token {}", path.display()))?,
            None => std::io::stdin().lock().take(TOKEN_MAX_BYTES).read_to_string(&mut text)?,
        };
        let token = text.trim();
        ensure!(!token.is_empty(), "there is no token: shoal join-token create makes one");
        Ok(token.into())
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        if self.coordinators.is_empty() {
            return Err(usage(WHICH_COORDINATOR));
        }
        let wanted = self.ca_hash.strip_prefix("blake3:").and_then(unhex);
        let wanted = wanted.filter(|hash| hash.len() == 32);
        let wanted =
            wanted.ok_or_else(|| usage("--ca-hash is not blake3: and 64 hexadecimal digits"))?;
        let machine = self.name.clone().map_or_else(host_name, Ok)?;
        let token = self.token()?;
        let identity = self.dir.join("identity");
        let key = key_of(&identity)?;
        let trust = pinned(&self.coordinators, &wanted).await?;
        let client = Client::stranger(&self.coordinators, Some(trust))?;
        let signature = hex(&key.sign_join(&token, &machine));
        let request = JoinRequest { token, machine, node: key.node(), hosts: vec![], signature };
        let joined = client.join(&request).await?;
        self.keep(&identity, &key, &joined)?;
        let member = Identity::from_pem(&joined.certificate, &key.to_pem()?)?;
        show::print(&format!("joined as {}: {}", member.member(), self.dir.display()))
    }

    fn keep(&self, identity: &Path, key: &NewKey, joined: &JoinReply) -> anyhow::Result<()> {
        let trust = unhex(&joined.trust).context("the coordinator sent no trust bundle")?;
        Trust::from_signed(&trust)?.verify_certificate(
            Identity::from_pem(&joined.certificate, &key.to_pem()?)?.certificate_der(),
        )?;
        write(&identity.join("trust.bin"), &trust)?;
        write(&identity.join("identity.pem"), joined.certificate.as_bytes())?;
        if joined.role != Role::Agent.to_string() {
            return Ok(());
        }
        let config = self.dir.join("agent.toml");
        if config.exists() {
            return Ok(());
        }
        write(&config, self.configuration(identity, joined)?.as_bytes())
    }

    /// An agent's configuration, ready to be used.
    fn configuration(&self, identity: &Path, joined: &JoinReply) -> anyhow::Result<String> {
        let regions = if self.region_processes.is_empty() {
            joined.regions.clone()
        } else {
            self.region_processes.clone()
        };
        let mut config = toml::Table::new();
        let path = |path: &Path| toml::Value::from(path.display().to_string());
        config.insert("identity".into(), path(&std::path::absolute(identity)?));
        config.insert("data_dir".into(), path(&self.data_dir));
        config.insert("regions".into(), toml::Value::from(regions));
        if let Some(advertise) = self.advertise {
            config.insert("advertise".into(), toml::Value::from(advertise.to_string()));
        }
        if let Some(zone) = &joined.zone {
            config.insert("zone".into(), toml::Value::from(zone.as_str()));
        }
        if !joined.labels.is_empty() {
            config.insert("labels".into(), table(&joined.labels));
        }
        let hint = match self.advertise {
            Some(_) => "",
            None => {
                "# Set `advertise` to the IP address that other machines reach this one at, or `listen` and\n\
                 # `gossip_listen` to it.\n"
            }
        };
        Ok(format!(
            "# Written by shoal join; see the example configuration for all keys.\n{hint}{config}"
        ))
    }
}

fn table(labels: &Labels) -> toml::Value {
    let labels = labels.iter().map(|(key, value)| (key.clone(), toml::Value::from(value.as_str())));
    toml::Value::Table(labels.collect())
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    shoal_process::write_atomic(path, bytes)
        .with_context(|| format!("cannot write {}", path.display()))
}

fn host_name() -> anyhow::Result<MachineName> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    MachineName::new(&host).with_context(|| format!("'{host}' is no machine's name: give --name"))
}

/// The key in the directory, if its certificate is over or has never come; else a new one, which is written before anybody
/// hears of it.
fn key_of(identity: &Path) -> anyhow::Result<NewKey> {
    make_private_dir(identity)?;
    let path = identity.join("identity.key");
    let key = match fs::read_to_string(&path) {
        Ok(pem) => {
            let key = NewKey::from_pem(&pem)
                .with_context(|| format!("{} is not a key", path.display()))?;
            refuse_if_good(identity, &pem)?;
            key
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let key = NewKey::generate()?;
            write_one(&path, key.to_pem()?.as_bytes(), MODE_SECRET)?;
            key
        }
        Err(error) => bail!("cannot read {}: {error}", path.display()),
    };
    Ok(key)
}

/// A machine that has joined is not made to join again by accident.
fn refuse_if_good(identity: &Path, key_pem: &str) -> anyhow::Result<()> {
    let Ok(cert_pem) = fs::read_to_string(identity.join("identity.pem")) else { return Ok(()) };
    let Ok(held) = Identity::from_pem(&cert_pem, key_pem) else { return Ok(()) };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs() as i64;
    ensure!(
        now > held.not_after_s() + CLOCK_LEEWAY_S,
        "{} has a certificate already, of {}: give another --dir, or remove it",
        identity.display(),
        held.member()
    );
    Ok(())
}

/// The CA of this hash, as the coordinators name it.
async fn pinned(coordinators: &[String], wanted: &[u8]) -> anyhow::Result<Trust> {
    let anybody = Client::stranger(coordinators, None)?;
    let reply = anybody.trust(&TrustQuery { after: 0, wait_s: 0 }).await?;
    for text in reply.bundles.iter().rev() {
        let Some(bytes) = unhex(text) else { continue };
        let Ok(trust) = Trust::from_signed(&bytes) else { continue };
        let cas = &trust.bundle().ca_certificates;
        if let Some(der) = cas.iter().find(|der| blake3::hash(der).as_bytes()[..] == *wanted) {
            return Ok(Trust::of_ca(der)?);
        }
    }
    bail!(
        "whoever answers there has no CA of this hash: compare --ca-hash with what shoal pki status says, and the address"
    )
}
