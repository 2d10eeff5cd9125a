//! How an operator's command reaches the coordinator: with a certificate, or with what `shoal login` stored.

use std::path::{Path, PathBuf};

use shoal_client::Client;
use shoal_process::Membership;

use crate::{
    exit::{Nobody, usage},
    login::{self, Login},
};

/// What to do where none is named.
pub(crate) const WHICH_COORDINATOR: &str =
    "which coordinator? give --coordinator https://HOST:PORT or set SHOAL_COORDINATOR";

/// The flags that every command against the API has.
#[derive(clap::Args)]
pub(crate) struct Connection {
    /// A coordinator's address, https://HOST:PORT; repeat for each, the next is asked when one is silent. By default
    /// those of the login.
    #[arg(
        long = "coordinator",
        env = "SHOAL_COORDINATOR",
        value_name = "URL",
        value_delimiter = ',',
        help_heading = "Connection"
    )]
    coordinators: Vec<String>,
    /// Directory with the operator's identity.pem, identity.key and trust.bin, instead of a login.
    #[arg(long, env = "SHOAL_IDENTITY", value_name = "DIR", help_heading = "Connection")]
    identity: Option<PathBuf>,
    /// The file that shoal login stored [default: $XDG_CONFIG_HOME/shoal/login.json].
    #[arg(long, env = "SHOAL_CONFIG", value_name = "FILE", help_heading = "Connection")]
    config: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Connection {
    /// The operator's identity directory, opened.
    pub(crate) fn membership(&self) -> anyhow::Result<Membership> {
        crate::trust::membership(self.identity_dir()?)
    }

    fn identity_dir(&self) -> anyhow::Result<&Path> {
        let nobody = Nobody(
            "who are you? give --identity DIR or set SHOAL_IDENTITY (make one with: shoal pki issue --role operator)",
        );
        Ok(self.identity.as_deref().ok_or(nobody)?)
    }

    /// A client of the coordinators.
    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        let Some(identity) = &self.identity else {
            let Some(login) = Login::read(&login::file(self.config.as_deref())?)? else {
                return Err(Nobody(
                    "who are you? log in with shoal login --coordinator https://HOST:PORT --ca FILE, or give \
                     --identity DIR or set SHOAL_IDENTITY (make one with: shoal pki issue --role operator)",
                )
                .into());
            };
            return login.client(&self.coordinators);
        };
        if self.coordinators.is_empty() {
            return Err(usage(WHICH_COORDINATOR));
        }
        let (identity, trust) = shoal_process::load_identity(identity)?;
        Ok(Client::new(&self.coordinators, &identity, &trust)?)
    }
}
