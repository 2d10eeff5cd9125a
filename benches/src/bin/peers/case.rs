//! What is measured: how many leechers, on what network.

use clap::ValueEnum;
use serde::Serialize;
use shoal_benches::{
    machine::{self, Machine},
    net::{Line, Rate},
};

use crate::{Args, kind::Kind};

/// A line that holds nobody back, in bits a second.
const FAST_BITS_PER_S: f64 = 10e9;

/// How long the queue before a line is, in seconds of its rate.
const QUEUE_S: f64 = 0.02;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Case {
    /// One leecher, on loopback.
    One,
    /// `--leechers` of them, on loopback.
    Many,
    /// `--leechers` of them on fast lines, the seed's upload held to `--seed-up`.
    SeedUp,
    /// `--leechers` of them, every line held to `--link` both ways.
    Links,
}

/// A case with its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Setting {
    pub(crate) case: &'static str,
    pub(crate) leechers: usize,
    pub(crate) size_bytes: u64,
    /// The largest UDP payload.
    pub(crate) mtu: u32,
    /// What the seed may send, headers counted, if its line is held.
    pub(crate) seed_up_bytes_per_s: Option<f64>,
    /// What any other line carries each way, if it is held.
    pub(crate) link_bytes_per_s: Option<f64>,
}

impl Case {
    /// Those that it is for. One server for all has nothing to show when its line is held: it needs `leechers` times the
    /// ideal. And every line held asks how much of it Shoal uses.
    pub(crate) fn kinds(self) -> &'static [Kind] {
        match self {
            Self::One | Self::Many => Kind::ALL,
            Self::SeedUp => &[Kind::Shoal, Kind::Aria2, Kind::Rqbit, Kind::Libtorrent, Kind::Iroh],
            Self::Links => &[Kind::Shoal],
        }
    }

    /// What is measured in this case: one setting for each MTU.
    pub(crate) fn settings(self, args: &Args) -> Vec<Setting> {
        let held = |rate: f64| Some(rate * 1e6);
        let (case, seed_up_bytes_per_s, link_bytes_per_s) = match self {
            Self::One => ("one", None, None),
            Self::Many => ("many", None, None),
            Self::SeedUp => ("seed-up", held(args.seed_up), None),
            Self::Links => ("links", held(args.link), held(args.link)),
        };
        let setting = |mtu: &u32| Setting {
            case,
            leechers: if self == Self::One { 1 } else { args.leechers },
            size_bytes: args.size.as_u64(),
            mtu: *mtu,
            seed_up_bytes_per_s,
            link_bytes_per_s,
        };
        args.mtu.iter().map(setting).collect()
    }
}

impl Setting {
    /// The least time that the file needs over the held lines, headers left out.
    pub(crate) fn ideal_s(&self) -> Option<f64> {
        Some(self.size_bytes as f64 / self.seed_up_bytes_per_s?)
    }

    /// Makes the machines and their network. `number` tells them from those of other settings.
    pub(crate) fn machines(&self, number: u8) -> anyhow::Result<Vec<Machine>> {
        let Some(seed_up) = self.seed_up_bytes_per_s else {
            machine::hold_loopback(self.mtu)?;
            return Ok(machine::on_loopback(self.leechers));
        };
        let rate = |bytes_per_s: f64| Rate { bits_per_s: 8.0 * bytes_per_s, queue_s: QUEUE_S };
        let fast = Rate { bits_per_s: FAST_BITS_PER_S, queue_s: QUEUE_S };
        let others = self.link_bytes_per_s.map_or(fast, rate);
        let others = Line { up: others, down: others, payload_bytes: self.mtu };
        let seed = Line { up: rate(seed_up), ..others };
        machine::behind_lines(number, self.leechers, seed, others)
    }

    pub(crate) fn title(&self) -> String {
        let held = match (self.seed_up_bytes_per_s, self.link_bytes_per_s) {
            (_, Some(rate)) => format!("every line held to {:.0} MB/s each way, ", rate / 1e6),
            (Some(rate), None) => format!("the seed's upload held to {:.0} MB/s, ", rate / 1e6),
            (None, None) => String::new(),
        };
        let size = self.size_bytes as f64 / f64::from(1 << 20);
        let payload = self.mtu;
        format!(
            "1 to {}, {size:.0} MiB, {held}UDP payloads of at most {payload} bytes",
            self.leechers
        )
    }
}
