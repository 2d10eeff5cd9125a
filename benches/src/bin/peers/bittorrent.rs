//! Programs of BitTorrent that are driven by an interface over HTTP: aria2 and rqbit.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use shoal_benches::{machine::Machine, processes::Processes};

use crate::{
    http,
    run::{Contender, EVERY, Ground},
    torrent::{self, Tracker},
};

/// How long a peer may take until it answers, and a seed until it has checked its file.
const READY: Duration = Duration::from_secs(120);

/// Which of its ports a machine gives to other peers, and to the interface.
const PEERS: u16 = 0;
const INTERFACE: u16 = 1;

/// What differs between the two.
pub(crate) trait Program: Sync {
    /// Adds what a peer is started with, that keeps its file in `dir`.
    fn start(
        &self,
        command: &mut Command,
        machine: &Machine,
        dir: &Path,
        torrent: &Path,
        seed: bool,
    );

    /// Looks whether a peer answers.
    fn ready(&self, at: &str) -> bool;

    /// Has a peer begin.
    fn begin(&self, at: &str, torrent: &[u8]) -> anyhow::Result<()>;

    /// Whether a peer has all pieces, verified, and how many bytes of pieces it has sent.
    fn state(&self, at: &str) -> anyhow::Result<(bool, u64)>;
}

/// aria2, by its JSON-RPC.
pub(crate) struct Aria2;

impl Aria2 {
    fn call(at: &str, method: &str) -> anyhow::Result<Value> {
        let call = json!({"jsonrpc": "2.0", "id": "1", "method": method, "params": []});
        let answer = http::ask(at, "POST", "/jsonrpc", call.to_string().as_bytes())?;
        answer.get("result").cloned().with_context(|| format!("aria2 answers {answer}"))
    }
}

impl Program for Aria2 {
    fn start(
        &self,
        command: &mut Command,
        machine: &Machine,
        dir: &Path,
        torrent: &Path,
        seed: bool,
    ) {
        command.args(["--no-conf=true", "--enable-dht=false", "--bt-enable-lpd=false"]);
        command.args(["--enable-peer-exchange=false", "--seed-ratio=0.0", "--pause=true"]);
        // Memory needs no preparation, and the seed's file is checked before the clock starts.
        command.args(["--file-allocation=none", &format!("--check-integrity={seed}")]);
        command.args(["--console-log-level=warn", "--show-console-readout=false"]);
        command.args(["--enable-rpc=true", "--rpc-listen-all=true", "--no-proxy=*"]);
        command.arg(format!("--interface={}", machine.address));
        command.arg(format!("--listen-port={}", machine.port(PEERS)));
        command.arg(format!("--rpc-listen-port={}", machine.port(INTERFACE)));
        command.arg("--dir").arg(dir).arg(torrent);
    }

    fn ready(&self, at: &str) -> bool {
        Self::call(at, "aria2.getVersion").is_ok()
    }

    fn begin(&self, at: &str, _torrent: &[u8]) -> anyhow::Result<()> {
        Self::call(at, "aria2.unpauseAll").map(drop)
    }

    fn state(&self, at: &str) -> anyhow::Result<(bool, u64)> {
        let active = Self::call(at, "aria2.tellActive")?;
        let Some(download) = active.get(0) else {
            return Ok((false, 0));
        };
        let sent = download.get("uploadLength").and_then(Value::as_str);
        let sent = sent.and_then(|sent| sent.parse().ok()).context("aria2 says no uploads")?;
        Ok((download.get("seeder").and_then(Value::as_str) == Some("true"), sent))
    }
}

/// rqbit, by its HTTP API.
pub(crate) struct Rqbit;

impl Program for Rqbit {
    fn start(
        &self,
        command: &mut Command,
        machine: &Machine,
        dir: &Path,
        _torrent: &Path,
        _seed: bool,
    ) {
        command.args(["-v", "warn", "--disable-dht", "--disable-lsd"]);
        command.args(["--disable-upnp-port-forward", "--ipv4-only"]);
        command.args(["--listen-ip", &machine.address]);
        let port = machine.port(PEERS).to_string();
        // It does not announce itself on loopback unless it is told.
        command.args(["--listen-port", &port, "--announce-port", &port]);
        command.args(["--http-api-listen-addr", &machine.at(INTERFACE)]);
        command.args(["server", "start", "--disable-persistence"]).arg(dir);
    }

    fn ready(&self, at: &str) -> bool {
        http::ask(at, "GET", "/torrents", b"").is_ok()
    }

    fn begin(&self, at: &str, torrent: &[u8]) -> anyhow::Result<()> {
        http::ask(at, "POST", "/torrents?overwrite=true", torrent).map(drop)
    }

    fn state(&self, at: &str) -> anyhow::Result<(bool, u64)> {
        let stats = http::ask(at, "GET", "/torrents/0/stats/v1", b"")?;
        let error = stats.get("error").and_then(Value::as_str);
        ensure!(error.is_none(), "rqbit failed: {}", error.unwrap_or_default());
        let sent = stats.get("uploaded_bytes").and_then(Value::as_u64);
        let sent = sent.context("rqbit says no uploads")?;
        let live = stats.get("state").and_then(Value::as_str) == Some("live");
        Ok((live && stats.get("finished").and_then(Value::as_bool) == Some(true), sent))
    }
}

/// A swarm of one of them.
pub(crate) struct Swarm<P> {
    program: P,
    processes: Processes,
    torrent: Vec<u8>,
    /// Where the seed answers.
    seed: String,
    /// Where leechers answer that are not done yet.
    leechers: Vec<String>,
    files: Vec<PathBuf>,
    names: Vec<String>,
    seed_name: String,
    _tracker: Tracker,
}

impl<P: Program> Swarm<P> {
    /// Starts it; the seed has checked its file.
    pub(crate) fn start(program: P, ground: &Ground<'_>) -> anyhow::Result<Self> {
        let at = ground.tracker();
        let torrent = torrent::metainfo(ground.file, &at)?;
        let path = ground.dir.join("torrent");
        fs::write(&path, &torrent)?;
        let tracker = Tracker::start(&at, &ground.peers())?;
        let seed = ground.seed()?;
        let mut processes = Processes::default();
        let mut files = Vec::new();
        for machine in ground.machines {
            let is_seed = machine.name == seed.name;
            let dir = if is_seed { ground.source()? } else { ground.own_dir(machine)? };
            if !is_seed {
                files.push(dir.join(ground.file_name()?));
            }
            let mut command = ground.command(machine);
            program.start(&mut command, machine, &dir, &path, is_seed);
            processes.spawn(&machine.name, &ground.log(machine), &mut command)?;
        }
        let interfaces = ground.machines.iter().map(|machine| machine.at(INTERFACE));
        for at in interfaces {
            processes.wait("a peer to answer", EVERY, READY, || Ok(program.ready(&at)))?;
        }
        let seed_at = seed.at(INTERFACE);
        program.begin(&seed_at, &torrent)?;
        processes.wait("the seed to have checked its file", EVERY, READY, || {
            Ok(program.state(&seed_at)?.0 && tracker.known() == 1)
        })?;
        Ok(Self {
            program,
            processes,
            torrent,
            seed: seed_at,
            leechers: ground.leechers().iter().map(|leecher| leecher.at(INTERFACE)).collect(),
            files,
            names: ground.leechers().iter().map(|leecher| leecher.name.clone()).collect(),
            seed_name: seed.name.clone(),
            _tracker: tracker,
        })
    }
}

impl<P: Program> Contender for Swarm<P> {
    fn go(&mut self) -> anyhow::Result<()> {
        let (program, torrent) = (&self.program, &self.torrent);
        thread::scope(|scope| {
            let leechers = self.leechers.iter();
            let begun: Vec<_> =
                leechers.map(|at| scope.spawn(move || program.begin(at, torrent))).collect();
            begun.into_iter().try_for_each(|begun| {
                begun.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
            })
        })
    }

    fn done(&mut self) -> anyhow::Result<bool> {
        self.processes.check()?;
        let mut left = Vec::new();
        for at in self.leechers.drain(..) {
            if !self.program.state(&at)?.0 {
                left.push(at);
            }
        }
        self.leechers = left;
        Ok(self.leechers.is_empty())
    }

    fn uploaded_bytes(&mut self) -> anyhow::Result<u64> {
        Ok(self.program.state(&self.seed)?.1)
    }

    fn seed_pids(&self) -> Vec<u32> {
        self.processes.pid(&self.seed_name).into_iter().collect()
    }

    fn leecher_pids(&self) -> Vec<u32> {
        self.names.iter().filter_map(|name| self.processes.pid(name)).collect()
    }

    fn files(&self) -> Vec<PathBuf> {
        self.files.clone()
    }
}
