//! One peer of a swarm of iroh-blobs, for the benchmark `peers` beside it.
//!
//! The file is a list of blobs of 4 MiB, because iroh-blobs gives on a blob only once it has it: as one blob, the seed would
//! send all of it to everybody. A leecher fetches the blobs in random order by iroh-blobs' own downloader, asks the other leechers
//! first, in random order, and the seed last.
//!
//! It says `ready`; at a line `go` it fetches, and says `done` when its store has every blob, verified; at a line `uploaded` it
//! says how many bytes it has sent, in UDP packets. It ends with its standard input.

use std::{
    fs,
    io::{BufRead as _, Read as _, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use futures::{StreamExt as _, TryStreamExt as _};
use iroh::{
    Endpoint, EndpointAddr, EndpointId, RelayMode, SecretKey,
    address_lookup::memory::MemoryLookup,
    endpoint::{MtuDiscoveryConfig, QuicTransportConfig, presets},
    protocol::Router,
};
use iroh_blobs::{BlobsProtocol, Hash, api::Store, store::fs::FsStore};
use rand::seq::SliceRandom as _;

/// The length of a blob, but for the last one.
const BLOB_BYTES: u64 = 4 << 20;

/// The seed's number.
const SEED: u8 = 0;

/// The largest UDP payload that iroh 1.4 lets a peer take: it tells the others so, and has no setting for it.
const PAYLOAD_MAX_BYTES: u16 = 1_472;

#[derive(Parser)]
#[command(version = "of iroh-blobs 0.104.0")]
struct Args {
    /// This peer's number: its key follows from it; 0 is the seed.
    #[arg(long)]
    number: u8,
    /// Where it listens.
    #[arg(long)]
    listen: SocketAddr,
    /// All peers, as NUMBER=ADDRESS.
    #[arg(long = "peer")]
    peers: Vec<Peer>,
    /// The directory of its store.
    #[arg(long)]
    store: PathBuf,
    /// The list of blobs, which the seed writes.
    #[arg(long)]
    list: PathBuf,
    /// What the seed gives.
    #[arg(long)]
    file: Option<PathBuf>,
    /// How many blobs are fetched at once.
    #[arg(long, default_value_t = 8)]
    at_once: usize,
}

#[derive(Debug, Clone, Copy)]
struct Peer {
    number: u8,
    address: SocketAddr,
}

impl FromStr for Peer {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (number, address) = text.split_once('=').context("a peer is NUMBER=ADDRESS")?;
        Ok(Self { number: number.parse()?, address: address.parse()? })
    }
}

fn key(number: u8) -> SecretKey {
    SecretKey::from_bytes(&[number + 1; 32])
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let endpoint = endpoint(&args).await?;
    let store = FsStore::load(&args.store).await?;
    if let Some(file) = &args.file {
        import(&store, file, &args.list).await?;
    }
    let blobs = BlobsProtocol::new(&store, None);
    let router = Router::builder(endpoint.clone()).accept(iroh_blobs::ALPN, blobs).spawn();
    say("ready")?;
    let mut commands = commands();
    while let Some(command) = commands.recv().await {
        match command.as_str() {
            "go" => {
                fetch(&args, &endpoint, &store).await?;
                say("done")?;
            }
            "uploaded" => say(&endpoint.metrics().socket.send_ipv4.get().to_string())?,
            other => bail!("{other} is no command"),
        }
    }
    router.shutdown().await?;
    Ok(())
}

/// The lines of standard input.
fn commands() -> tokio::sync::mpsc::Receiver<String> {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

/// An endpoint that knows where all peers are, and needs nobody else.
async fn endpoint(args: &Args) -> Result<Endpoint> {
    let known = args
        .peers
        .iter()
        .map(|peer| EndpointAddr::new(key(peer.number).public()).with_ip_addr(peer.address));
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(PAYLOAD_MAX_BYTES);
    let transport = QuicTransportConfig::builder().mtu_discovery_config(Some(discovery)).build();
    let endpoint = Endpoint::builder(presets::Minimal)
        .secret_key(key(args.number))
        .relay_mode(RelayMode::Disabled)
        .address_lookup(MemoryLookup::from_endpoint_info(known))
        .transport_config(transport)
        .clear_ip_transports()
        .bind_addr(args.listen)?
        .bind()
        .await?;
    Ok(endpoint)
}

/// Puts a file into the store, blob by blob, and writes their list.
async fn import(store: &Store, file: &Path, list: &Path) -> Result<()> {
    let mut file = fs::File::open(file)?;
    let mut hashes = Vec::new();
    loop {
        let mut blob = Vec::new();
        (&mut file).take(BLOB_BYTES).read_to_end(&mut blob)?;
        if blob.is_empty() {
            break;
        }
        hashes.push(store.blobs().add_bytes(blob).await?.hash.to_string());
    }
    Ok(fs::write(list, hashes.join("\n"))?)
}

/// Fetches every blob of the list.
async fn fetch(args: &Args, endpoint: &Endpoint, store: &Store) -> Result<()> {
    let mut hashes: Vec<Hash> =
        fs::read_to_string(&args.list)?.lines().map(str::parse).collect::<Result<_, _>>()?;
    hashes.shuffle(&mut rand::rng());
    let downloader = store.downloader(endpoint);
    let others = |peer: &&Peer| peer.number != SEED && peer.number != args.number;
    let others: Vec<EndpointId> =
        args.peers.iter().filter(others).map(|peer| key(peer.number).public()).collect();
    let fetched = futures::stream::iter(hashes.clone()).map(|hash| {
        let mut providers = others.clone();
        providers.shuffle(&mut rand::rng());
        providers.push(key(SEED).public());
        downloader.download(hash, providers).into_future()
    });
    fetched.buffer_unordered(args.at_once).try_collect::<()>().await?;
    for hash in hashes {
        ensure!(store.blobs().has(hash).await?, "{hash} is not in the store");
    }
    Ok(())
}
