//! The bad peer itself: a member of the cluster with a certificate of its own.

use std::{fs, net::SocketAddr, path::PathBuf};

use anyhow::Context as _;
use shoal_pki::{Identity, Trust};
use shoal_proto::{ArtifactId, manifest::PieceSize};
use shoal_test_peers::{Manner, Peer, Setup};

use crate::Bad;

/// What it is to do.
#[derive(clap::Args, Clone)]
pub(crate) struct Act {
    #[arg(long, value_enum)]
    pub(crate) bad: Bad,
    #[arg(long)]
    pub(crate) identity: PathBuf,
    #[arg(long)]
    pub(crate) listen: SocketAddr,
    #[arg(long = "region")]
    pub(crate) regions: Vec<SocketAddr>,
    #[arg(long)]
    pub(crate) artifact: String,
    #[arg(long)]
    pub(crate) size: u64,
    #[arg(long)]
    pub(crate) piece_size: u64,
}

impl Act {
    /// Takes part until it is killed.
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let text = |name: &str| fs::read_to_string(self.identity.join(name));
        let identity = Identity::from_pem(&text("identity.pem")?, &text("identity.key")?)?;
        let trust = Trust::from_signed(&fs::read(self.identity.join("trust.bin"))?)?;
        let artifact: ArtifactId = self.artifact.parse().context("--artifact is no id")?;
        let piece_size = PieceSize::from_bytes(self.piece_size).context("--piece-size")?;
        let manner = if self.bad == Bad::Liar { Manner::Liar } else { Manner::Silent };
        let what = (artifact, self.size, piece_size);
        let mut setup =
            Setup::new(self.listen, identity, trust, self.regions.clone(), what, manner);
        setup.zone = "default".into();
        tokio::runtime::Runtime::new()?.block_on(async {
            let _peer = Peer::start(setup)?;
            std::future::pending().await
        })
    }
}
