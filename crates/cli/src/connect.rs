//! How an operator's command reaches the coordinator.

use std::path::PathBuf;

use shoal_client::Client;

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
    /// A client of the coordinators.
    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        anyhow::ensure!(
            !self.coordinators.is_empty(),
            "which coordinator? give --coordinator https://HOST:PORT or set SHOAL_COORDINATOR"
        );
        let Some(identity) = &self.identity else {
            anyhow::bail!(
                "who are you? give --identity DIR or set SHOAL_IDENTITY \
                 (make one with: shoal pki issue --role operator)"
            );
        };
        let (identity, trust) = shoal_process::load_identity(identity)?;
        Ok(Client::new(&self.coordinators, &identity, &trust)?)
    }
}
