//! The machines' network: a namespace for each, joined by a bridge, each line held to its rate both ways.
//!
//! All of it lies in a network namespace of the benchmark's own, and goes with it.

use std::{
    fs, io,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};
use serde::Deserialize;

/// The bridge's own address, where coordinator and region processes listen: their lines are not held back.
pub const CONTROL: &str = "10.77.0.1";

/// What a line lets through at once, in seconds of its rate: the kernel's timers are finer.
const BURST_S: f64 = 0.004;

/// And at least, in bytes: what one send hands over for segmentation, with the headers of its packets. What is longer
/// would be cut up before it is let through, at the cost of CPU that a real card does not take.
const BURST_MIN_BYTES: u64 = 72 << 10;

/// The longest UDP payload of Ethernet over IPv4.
const ETHERNET_PAYLOAD_BYTES: u32 = 1_472;

/// What IPv4 and UDP put before a payload.
pub const HEADERS_BYTES: u32 = 28;

/// What one way of a machine's line carries.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// In bits a second, headers of Ethernet and above counted.
    pub bits_per_s: f64,
    /// How long the longest queue before it is, in seconds; what comes then is lost.
    pub queue_s: f64,
}

impl Rate {
    /// The queue before it, as `tc` is told.
    fn queue(self) -> String {
        let burst = ((self.bits_per_s / 8.0 * BURST_S) as u64).max(BURST_MIN_BYTES);
        let limit = burst + (self.bits_per_s / 8.0 * self.queue_s) as u64;
        format!("root tbf rate {:.0}bit burst {burst} limit {limit}", self.bits_per_s)
    }
}

/// A machine's line.
#[derive(Debug, Clone, Copy)]
pub struct Line {
    /// From the machine.
    pub up: Rate,
    /// To the machine.
    pub down: Rate,
    /// The longest UDP payload that it takes, in bytes.
    pub payload_bytes: u32,
}

impl Line {
    /// The same both ways, with Ethernet's packets.
    #[must_use]
    pub fn even(rate: Rate) -> Self {
        Self { up: rate, down: rate, payload_bytes: ETHERNET_PAYLOAD_BYTES }
    }
}

/// What went over a machine's line.
#[derive(Debug, Clone, Copy, Default)]
pub struct Carried {
    /// From the machine, in bytes, headers of Ethernet and above counted.
    pub up_bytes: u64,
    /// To the machine, in bytes.
    pub down_bytes: u64,
    /// Packets lost before it, both ways.
    pub dropped: u64,
}

impl Carried {
    /// What came since then.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            up_bytes: self.up_bytes - before.up_bytes,
            down_bytes: self.down_bytes - before.down_bytes,
            dropped: self.dropped - before.dropped,
        }
    }
}

/// What must be there before lines are made: root, and the tools.
///
/// # Errors
/// When it is not; it says what to do.
pub fn check() -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "it makes network namespaces: run it as root");
    for tool in ["ip", "tc", "unshare"] {
        let mut version = Command::new(tool);
        version.arg("-V").stdout(Stdio::null()).stderr(Stdio::null());
        let missing =
            matches!(version.status(), Err(error) if error.kind() == io::ErrorKind::NotFound);
        ensure!(!missing, "`{tool}` is missing: install iproute2 and util-linux");
    }
    Ok(())
}

fn run(line: &str) -> anyhow::Result<String> {
    let mut words = line.split(' ');
    let mut command = Command::new(words.next().unwrap_or_default());
    let output = command.args(words).output().with_context(|| format!("cannot run: {line}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "failed: {line}: {}", said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Makes the bridge, in the present namespace, where all files of `/run` are from now on the benchmark's own.
///
/// # Errors
/// When `mount` or `ip` fails.
pub fn bridge() -> anyhow::Result<()> {
    // Named namespaces lie there: in a mount that nobody else sees.
    run("mount -t tmpfs -o size=100%,mode=755 tmpfs /run")?;
    run("ip link set lo up")?;
    run("ip link add fabric type bridge")?;
    run(&format!("ip addr add {CONTROL}/16 dev fabric"))?;
    run("ip link set fabric up")?;
    // Where the kernel has bridges pass the packet filter, this one need not.
    let filter = Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables");
    if filter.exists() {
        fs::write(filter, "0")?;
    }
    Ok(())
}

/// Makes a machine's namespace and its line.
///
/// # Errors
/// When `ip` or `tc` fails.
pub fn machine(name: &str, address: &str, line: Line) -> anyhow::Result<()> {
    run(&format!("ip netns add {name}"))?;
    let mtu = line.payload_bytes + HEADERS_BYTES;
    run(&format!("ip link add {name} mtu {mtu} type veth peer name line mtu {mtu} netns {name}"))?;
    run(&format!("ip link set {name} master fabric up"))?;
    run(&format!("ip -n {name} addr add {address}/16 dev line"))?;
    run(&format!("ip -n {name} link set lo up"))?;
    run(&format!("ip -n {name} link set line up"))?;
    hold(name, line)
}

/// Holds a machine's line to other rates from now on.
///
/// # Errors
/// When `tc` fails.
pub fn hold(name: &str, line: Line) -> anyhow::Result<()> {
    run(&format!("tc qdisc replace dev {name} {}", line.down.queue()))?;
    run(&format!("tc -n {name} qdisc replace dev line {}", line.up.queue()))?;
    Ok(())
}

/// A command that runs on a machine.
#[must_use]
pub fn on_machine(name: &str, program: &Path) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", name]).arg(program);
    command
}

/// What went over a machine's line so far.
///
/// # Errors
/// When `tc` does not say.
pub fn carried(name: &str) -> anyhow::Result<Carried> {
    #[derive(Deserialize)]
    struct Queue {
        bytes: u64,
        drops: u64,
    }
    let read = |line: &str| -> anyhow::Result<Queue> {
        let queues: Vec<Queue> = serde_json::from_str(&run(line)?)?;
        queues.into_iter().next().context("the line has no queue")
    };
    let down = read(&format!("tc -s -j qdisc show dev {name} root"))?;
    let up = read(&format!("tc -n {name} -s -j qdisc show dev line root"))?;
    Ok(Carried { up_bytes: up.bytes, down_bytes: down.bytes, dropped: up.drops + down.drops })
}
