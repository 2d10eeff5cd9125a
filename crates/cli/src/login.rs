//! `shoal login`, `logout`, `whoami`: a token in a file that only its owner can read.
//!
//! The token comes from the terminal or from standard input, never from an argument, which everybody on the machine
//! could read.

use std::{
    env, fs,
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use serde::{Deserialize, Serialize};
use shoal_client::{Client, types::WhoAmI};

use crate::{connect::Connection, show};

/// What is for its owner only.
const MODE_SECRET: u32 = 0o600;

/// What a login is: where, whom to believe, and as whom.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Login {
    pub(crate) coordinators: Vec<String>,
    /// The cluster's CA certificate, PEM.
    pub(crate) ca: String,
    pub(crate) token: String,
}

#[derive(clap::Args)]
pub(crate) struct LoginArgs {
    /// A coordinator's address, https://HOST:PORT; repeat for each.
    #[arg(
        long = "coordinator",
        env = "SHOAL_COORDINATOR",
        value_name = "URL",
        value_delimiter = ',',
        required = true
    )]
    coordinators: Vec<String>,
    /// The cluster's CA certificate: the ca.pem that shoal pki init made.
    #[arg(long, value_name = "FILE")]
    ca: PathBuf,
    /// The file to store it in [default: $XDG_CONFIG_HOME/shoal/login.json].
    #[arg(long, env = "SHOAL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct LogoutArgs {
    /// The file that shoal login stored [default: $XDG_CONFIG_HOME/shoal/login.json].
    #[arg(long, env = "SHOAL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct WhoamiArgs {
    #[command(flatten)]
    connection: Connection,
}

/// Where a login is stored: the file that is named, or the user's.
pub(crate) fn file(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(named) = named {
        return Ok(named.into());
    }
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    // As the XDG base directory specification has it: only an absolute path counts.
    let config = set("XDG_CONFIG_HOME").filter(|path| path.is_absolute());
    let config = config.or_else(|| set("HOME").map(|home| home.join(".config")));
    let config = config.context("neither XDG_CONFIG_HOME nor HOME is set: give --config FILE")?;
    Ok(config.join("shoal").join("login.json"))
}

impl Login {
    /// Reads the login that is stored in a file; none when there is no such file.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Option<Self>> {
        let wrong = || format!("cannot read the login in {}", path.display());
        let metadata = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            metadata => metadata.with_context(wrong)?,
        };
        ensure!(
            metadata.mode() & 0o077 == 0,
            "others may read the token in {0}: make it yours alone with chmod 600 {0}",
            path.display()
        );
        let text = fs::read_to_string(path).with_context(wrong)?;
        // Without serde's own words, which may quote what is there.
        let login = serde_json::from_str(&text).map_err(|_| {
            anyhow::anyhow!("{} is no login: log in again with shoal login", path.display())
        });
        login.map(Some)
    }

    fn write(&self, path: &Path) -> anyhow::Result<()> {
        let wrong = || format!("cannot store the login in {}", path.display());
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(wrong)?;
        }
        let mut name = path.file_name().context("--config names no file")?.to_os_string();
        name.push(format!(".{}", std::process::id()));
        let new = path.with_file_name(name);
        let written = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(MODE_SECRET)
            .open(&new)
            .and_then(|mut file| {
                file.write_all(serde_json::to_string_pretty(self)?.as_bytes())?;
                file.sync_all()?;
                fs::rename(&new, path)
            });
        written.inspect_err(|_| _ = fs::remove_file(&new)).with_context(wrong)
    }

    pub(crate) fn client(&self, coordinators: &[String]) -> anyhow::Result<Client> {
        let of = if coordinators.is_empty() { &self.coordinators } else { coordinators };
        Ok(Client::with_token(of, &self.ca, &self.token)?)
    }
}

/// Reads the token: from a terminal without showing it, else the first line of standard input.
fn read_token() -> anyhow::Result<String> {
    let stdin = io::stdin();
    let mut line = String::new();
    if stdin.is_terminal() {
        let mut stderr = io::stderr();
        write!(stderr, "token: ").and_then(|()| stderr.flush())?;
        let shown = tcgetattr(&stdin)?;
        let mut hidden = shown.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&stdin, OptionalActions::Flush, &hidden)?;
        let read = stdin.lock().read_line(&mut line);
        tcsetattr(&stdin, OptionalActions::Flush, &shown)?;
        show::note("");
        read?;
    } else {
        stdin.lock().read_line(&mut line)?;
    }
    let token = line.trim();
    ensure!(
        token.starts_with("shoal_"),
        "no token on standard input: it begins with shoal_; shoal token create makes one"
    );
    Ok(token.into())
}

impl LoginArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let path = file(self.config.as_deref())?;
        let ca = fs::read_to_string(&self.ca)
            .with_context(|| format!("cannot read the CA certificate {}", self.ca.display()))?;
        ensure!(!ca.contains("PRIVATE KEY"), "{} holds a key: give ca.pem", self.ca.display());
        let login = Login { coordinators: self.coordinators, ca, token: read_token()? };
        // Stored only when it is good for something.
        let whoami = login.client(&[])?.whoami().await?;
        login.write(&path)?;
        show::note(&format!("the login is stored in {}", path.display()));
        show::print_as(self.json, &whoami, detail)
    }
}

#[derive(Serialize)]
struct LoggedOut {
    file: PathBuf,
}

impl LogoutArgs {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let path = file(self.config.as_deref())?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                bail!("nobody is logged in: there is no {}", path.display())
            }
            removed => removed.with_context(|| format!("cannot remove {}", path.display()))?,
        }
        show::print_as(self.json, &LoggedOut { file: path }, |gone| {
            format!(
                "{} is gone; the token still counts until it is revoked (shoal token revoke)",
                gone.file.display()
            )
        })
    }
}

impl WhoamiArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let whoami = self.connection.client()?.whoami().await?;
        show::print_as(self.connection.json, &whoami, detail)
    }
}

fn detail(whoami: &WhoAmI) -> String {
    let mut table = show::table(&["NAME", &whoami.name]);
    table.add_row(["cluster", &whoami.cluster]);
    table.add_row(["role", whoami.role.as_str()]);
    let apps = whoami.apps.as_ref().map_or("all".into(), |apps| {
        apps.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    });
    table.add_row(["apps", &apps]);
    if let Some(at) = whoami.expires_at_ms {
        table.add_row(["expires", &show::until(at)]);
    }
    show::render(&table, "")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_login_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shoal/login.json");
        assert!(Login::read(&path).unwrap().is_none());
        let login =
            Login { coordinators: vec!["https://x".into()], ca: "pem".into(), token: "t".into() };
        login.write(&path).unwrap();
        login.write(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert_eq!(Login::read(&path).unwrap().unwrap().token, "t");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = Login::read(&path).err().unwrap().to_string();
        assert!(error.contains("chmod 600"), "{error}");
        fs::write(&path, r#"{"token": "shoal_secret"#).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let error = format!("{:#}", Login::read(&path).err().unwrap());
        assert!(!error.contains("secret"), "{error}");
    }
}
