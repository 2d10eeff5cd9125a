//! How an operator's command reaches the coordinator.

use std::path::{Path, PathBuf};

use shoal_client::Client;
use shoal_process::Membership;

/// The flags that every command against the API has.
#[derive(clap::Args)]
pub(crate) struct Connection {
    /// A coordinator's address, https://HOST:PORT; repeat for each, the next is asked when one is silent.
    #[arg(
        long = "coordinator",
        env = "SHOAL_COORDINATOR",
        value_name = "URL",
        value_delimiter = ',',
        help_heading = "Connection"
    )]
    coordinators: Vec<String>,
    /// Directory with the operator's identity.pem, identity.key and trust.bin.
    #[arg(long, env = "SHOAL_IDENTITY", value_name = "DIR", help_heading = "Connection")]
    identity: Option<PathBuf>,
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
        self.identity.as_deref().ok_or_else(|| {
            anyhow::anyhow!(
                "who are you? give --identity DIR or set SHOAL_IDENTITY \
                 (make one with: shoal pki issue --role operator)"
            )
        })
    }

    /// A client of the coordinators.
    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        anyhow::ensure!(
            !self.coordinators.is_empty(),
            "which coordinator? give --coordinator https://HOST:PORT or set SHOAL_COORDINATOR"
        );
        let (identity, trust) = shoal_process::load_identity(self.identity_dir()?)?;
        Ok(Client::new(&self.coordinators, &identity, &trust)?)
    }
}
