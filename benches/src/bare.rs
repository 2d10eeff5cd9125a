//! The bar: bytes from one process to another over bare quinn, from memory to memory, with the transport's TLS and settings.
//!
//! Both processes are the benchmark itself, started again with the flags of [`Bare`].

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use quinn::VarInt;
use shoal_pki::server_name;
use shoal_transport::EndpointConfig;

use crate::{children_cpu_s, cluster::Cluster};

/// Where the sender listens; nothing else is in the namespace yet, or uses this port.
const SENDER: &str = "127.0.0.1:7399";

/// What is written at once.
const CHUNK_BYTES: usize = 1 << 20;

/// What a connection may have on the way, as the transport gives to one that is alone.
const WINDOW_BYTES: u32 = 8 << 20;

/// How long the sender may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// What makes the benchmark one of the two processes.
#[derive(Debug, clap::Args)]
pub struct Bare {
    /// Send over bare quinn to whoever connects...
    #[arg(long, hide = true, requires = "bare_identity")]
    bare_send: Option<SocketAddr>,
    /// ...or get from there...
    #[arg(long, hide = true, requires = "bare_identity")]
    bare_receive: Option<SocketAddr>,
    /// ...as this member...
    #[arg(long, hide = true)]
    bare_identity: Option<PathBuf>,
    /// ...so many bytes.
    #[arg(long, hide = true, default_value_t = 0)]
    bare_bytes: u64,
}

impl Bare {
    /// Does that, if this process was started for it.
    #[must_use]
    pub fn run(&self) -> Option<anyhow::Result<()>> {
        let identity = self.bare_identity.as_deref()?;
        // As `shoal` does: the bar has the same allocator.
        shoal_process::keep_freed_memory();
        match (self.bare_send, self.bare_receive) {
            (Some(listen), _) => Some(send(identity, listen, self.bare_bytes)),
            (_, Some(from)) => Some(receive(identity, from, self.bare_bytes)),
            _ => None,
        }
    }
}

/// CPU seconds of both processes for each GB. The cluster has made its keys; nothing of it need run.
///
/// # Errors
/// When one of them fails.
pub fn measure(cluster: &Cluster, root: &Path, bytes: u64) -> anyhow::Result<f64> {
    for name in ["bare-sender", "bare-receiver"] {
        if !root.join(name).exists() {
            cluster.issue(name, "agent", &["--region", "bench"])?;
        }
    }
    let start = |name: &str, way: &str| -> anyhow::Result<Child> {
        let identity = root.join(name).join("identity");
        let mut command = Command::new(std::env::current_exe()?);
        command.args([way, SENDER, "--bare-bytes", &bytes.to_string(), "--bare-identity"]);
        command.arg(identity);
        Ok(command.stdin(Stdio::null()).spawn()?)
    };
    let before = children_cpu_s()?;
    let mut sender = start("bare-sender", "--bare-send")?;
    let received = start("bare-receiver", "--bare-receive").and_then(|mut it| Ok(it.wait()?));
    if !received.as_ref().is_ok_and(|status| status.success()) {
        // It waits for a receiver that there is not.
        let _ = sender.kill();
    }
    let sent = sender.wait()?;
    ensure!(received?.success() && sent.success(), "bare quinn failed");
    Ok((children_cpu_s()? - before) / (bytes as f64 / 1e9))
}

fn endpoint(
    identity: &Path,
    listen: SocketAddr,
) -> anyhow::Result<(EndpointConfig, quinn::Endpoint)> {
    let (identity, trust) = shoal_process::load_identity(identity)?;
    let config = EndpointConfig::new(listen, shoal_pki::Credentials::new(identity, trust));
    let endpoint = config.bare()?;
    Ok((config, endpoint))
}

/// As `shoal agent` has it.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

/// Sends to the first that connects.
fn send(identity: &Path, listen: SocketAddr, bytes: u64) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let (_, endpoint) = endpoint(identity, listen)?;
        let incoming = endpoint.accept().await.context("the endpoint was closed")?;
        let connection = incoming.await?;
        let mut stream = connection.open_uni().await?;
        let chunk = Bytes::from(vec![7; CHUNK_BYTES]);
        let mut left = bytes;
        while left > 0 {
            let part = left.min(CHUNK_BYTES as u64) as usize;
            stream.write_chunk(chunk.slice(..part)).await?;
            left -= part as u64;
        }
        stream.finish()?;
        // Until the receiver has all and closes.
        connection.closed().await;
        endpoint.wait_idle().await;
        Ok(())
    })
}

/// Gets it all, and throws it away.
fn receive(identity: &Path, from: SocketAddr, bytes: u64) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let (config, endpoint) = endpoint(identity, "127.0.0.1:0".parse()?)?;
        let name = server_name(config.credentials.trust().cluster());
        let start = Instant::now();
        let connection = loop {
            match endpoint.connect(from, &name)?.await {
                Ok(connection) => break connection,
                // The sender does not listen yet.
                Err(_) if start.elapsed() < START_TIMEOUT => {}
                Err(error) => return Err(error.into()),
            }
        };
        connection.set_receive_window(VarInt::from_u32(WINDOW_BYTES));
        let mut stream = connection.accept_uni().await?;
        let mut got = 0;
        while let Some(chunk) = stream.read_chunk(CHUNK_BYTES, true).await? {
            got += chunk.bytes.len() as u64;
        }
        ensure!(got == bytes, "{got} of {bytes} bytes came");
        connection.close(VarInt::from_u32(0), b"");
        endpoint.wait_idle().await;
        Ok(())
    })
}
