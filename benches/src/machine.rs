//! Where the processes of a swarm stand: all on the loopback of the benchmark's namespace, or each behind a line.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};

use crate::net::{self, HEADERS_BYTES, Line};

/// The name of the machine that has the file.
pub const SEED: &str = "seed";

/// The first port on loopback, and how many each machine has.
const PORTS: u16 = 7_500;
const PORTS_EACH: u16 = 8;

/// The most machines: their addresses are numbered in one byte.
pub const MACHINES_MAX: usize = 200;

/// One of them.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Its address; on loopback too it is its own, since there are programs that tell peers apart by it.
    pub address: String,
    /// Its first port; it has [`Machine::port`]s after it.
    port: u16,
    /// The namespace behind its line.
    namespace: Option<String>,
}

impl Machine {
    /// One of its ports; 0 is the first.
    #[must_use]
    pub fn port(&self, number: u16) -> u16 {
        debug_assert!(number < PORTS_EACH);
        self.port + number
    }

    /// One of its ports with its address.
    #[must_use]
    pub fn at(&self, number: u16) -> String {
        format!("{}:{}", self.address, self.port(number))
    }

    /// A command that runs there.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        match &self.namespace {
            Some(namespace) => net::on_machine(namespace, program),
            None => Command::new(program),
        }
    }

    /// The namespace behind its line, if it has one.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }
}

/// The seed's name, and the leechers'.
fn names(leechers: usize) -> impl Iterator<Item = String> {
    let leechers = (1..=leechers).map(|number| format!("leecher-{number:02}"));
    std::iter::once(SEED.to_owned()).chain(leechers)
}

/// A seed, and so many leechers, on loopback.
#[must_use]
pub fn on_loopback(leechers: usize) -> Vec<Machine> {
    let ports = (PORTS..).step_by(PORTS_EACH.into());
    let machine = |((number, name), port)| {
        let address = format!("127.0.1.{}", number + 1);
        Machine { name, address, port, namespace: None }
    };
    names(leechers).enumerate().zip(ports).map(machine).collect()
}

/// Sets loopback up, with the MTU that holds UDP payloads to `payload_bytes`.
///
/// # Errors
/// When `ip` fails.
pub fn hold_loopback(payload_bytes: u32) -> anyhow::Result<()> {
    let mtu = (payload_bytes + HEADERS_BYTES).to_string();
    let mut link = Command::new("ip");
    let up = link.args(["link", "set", "lo", "mtu", &mtu, "up"]).stdin(Stdio::null()).status();
    ensure!(up.context("cannot run ip: install iproute2")?.success(), "cannot set loopback up");
    Ok(())
}

/// A seed, and so many leechers, each in a namespace of its own on the bridge ([`net::bridge`]). `network`, less than 200,
/// tells these machines from others of the same run.
///
/// # Errors
/// When `ip` or `tc` fails.
pub fn behind_lines(
    network: u8,
    leechers: usize,
    seed: Line,
    others: Line,
) -> anyhow::Result<Vec<Machine>> {
    ensure!(leechers < MACHINES_MAX, "at most {MACHINES_MAX} machines stand behind lines");
    let machine = |(number, name): (usize, String)| {
        let address = format!("10.77.{}.{}", network + 1, number + 1);
        let namespace = format!("n{network}m{number:03}");
        net::machine(&namespace, &address, if number == 0 { seed } else { others })?;
        Ok(Machine { name, address, port: PORTS, namespace: Some(namespace) })
    };
    names(leechers).enumerate().map(machine).collect()
}
