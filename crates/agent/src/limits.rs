//! How much of the machine's line the agent may use: the settings, as people write them, and what they mean for the
//! policy's numbers.

use std::{fmt, str::FromStr};

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use shoal_swarm::{Config as Policy, LEASE_DURATION};

/// The lowest limit: the longest piece, 16 MiB, passes in 9 s at it, and its asker gives it up after 20 s.
const LIMIT_MIN: u64 = 2_000_000;

/// A limit on piece bytes, or none. Written `50MB/s`, `400Mbit/s`, `100MiB/s` or `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Limit(Option<u64>);

impl Limit {
    /// In bytes a second.
    #[must_use]
    pub fn bytes_per_s(self) -> Option<u64> {
        self.0
    }
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(None));
        }
        let size = text.strip_suffix("/s").map(str::trim_end);
        let bytes = size.and_then(|size| match size.strip_suffix("bit") {
            Some(number) => Some(format!("{number}B").parse::<ByteSize>().ok()?.as_u64() / 8),
            None if size.ends_with('B') => Some(size.parse::<ByteSize>().ok()?.as_u64()),
            None => None,
        });
        match bytes {
            None => Err(format!(
                "'{text}' is not a rate: write a number and KB/s, MB/s, GB/s, MiB/s, Kbit/s, Mbit/s or Gbit/s, or none"
            )),
            Some(bytes) if bytes < LIMIT_MIN => Err(format!(
                "'{text}' is too low: give at least {}, at which a piece of 16 MiB passes before it is given up, or none",
                Self(Some(LIMIT_MIN))
            )),
            Some(bytes) => Ok(Self(Some(bytes))),
        }
    }
}

impl TryFrom<String> for Limit {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Limit> for String {
    /// Exactly, for a machine.
    fn from(limit: Limit) -> Self {
        limit.0.map_or_else(|| "none".into(), |bytes| format!("{bytes}B/s"))
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, "{}/s", ByteSize(bytes).display().si()),
            None => f.write_str("none"),
        }
    }
}

/// What may be changed while an agent runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Limits {
    /// On what is sent to neighbours.
    pub(crate) up: Limit,
    /// On what is received, from neighbours and the bucket together.
    pub(crate) down: Limit,
    /// On what is read from the bucket.
    pub(crate) origin: Limit,
    /// Whether what is sent yields to other traffic.
    pub(crate) scavenger: bool,
}

/// Some of them, to be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct LimitsChange {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) up_limit: Option<Limit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) down_limit: Option<Limit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) origin_limit: Option<Limit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) scavenger: Option<bool>,
}

impl Limits {
    /// These, with some of them changed.
    pub(crate) fn with(self, change: LimitsChange) -> Self {
        Self {
            up: change.up_limit.unwrap_or(self.up),
            down: change.down_limit.unwrap_or(self.down),
            origin: change.origin_limit.unwrap_or(self.origin),
            scavenger: change.scavenger.unwrap_or(self.scavenger),
        }
    }

    /// What differs, for a line of the log; none when nothing does.
    pub(crate) fn changes_to(&self, new: &Self) -> Option<String> {
        let told = |key, old: String, new: String| {
            (old != new).then(|| format!("{key} was {old} and is {new}"))
        };
        let changed = [
            told("up_limit", self.up.to_string(), new.up.to_string()),
            told("down_limit", self.down.to_string(), new.down.to_string()),
            told("origin_limit", self.origin.to_string(), new.origin.to_string()),
            told("scavenger", self.scavenger.to_string(), new.scavenger.to_string()),
        ];
        let changed: Vec<String> = changed.into_iter().flatten().collect();
        (!changed.is_empty()).then(|| changed.join(", "))
    }

    /// The policy's numbers for pieces of at most so many bytes. A limited machine has fewer pieces under way, each at the full
    /// speed of the limit: none of them becomes late only because it waits for the others, and what is whole can be
    /// passed on.
    pub(crate) fn policy(&self, piece_bytes: u64) -> Policy {
        let all = Policy::default();
        let piece_bytes = piece_bytes.max(1) as f64;
        // How many pieces pass in so many seconds.
        let pass =
            |limit: Limit, seconds: f64| limit.0.map(|limit| limit as f64 * seconds / piece_bytes);
        let uploads = pass(self.up, NEXT_COMES_S)
            .map_or(all.upload_slots, |next| 1 + next.ceil() as usize)
            .min(pass(self.up, ALL_SENT_S).map_or(usize::MAX, |all| all as usize))
            .clamp(1, all.upload_slots);
        let requests = pass(self.down, ALL_RECEIVED_S)
            .map_or(all.requests_wanted, |most| most as usize)
            .clamp(1, all.requests_wanted);
        let fewer = all.requests_wanted - requests;
        let origin = Limit([self.origin.0, self.down.0].into_iter().flatten().min());
        let leased_s = LEASE_DURATION.as_secs_f64() / 2.0;
        let leased = pass(origin, leased_s).map_or(u32::MAX, |most| most as u32);
        let at_once = all.origin_reads_max as u32 * all.origin_read_pieces;
        // Reads side by side end late together.
        let (reads, each) = if leased < at_once * 2 {
            (1, 1)
        } else {
            (all.origin_reads_max, all.origin_read_pieces)
        };
        Policy {
            upload_slots: uploads,
            upload_start_slots: all.upload_start_slots.min(uploads),
            requests_wanted: requests,
            requests_max: if fewer > 0 { requests } else { all.requests_max },
            leased_max: leased.saturating_sub(reads as u32 * each).clamp(1, all.leased_max),
            origin_reads_max: reads,
            origin_read_pieces: each,
            ..all
        }
    }
}

/// Pieces wait to be sent behind the one that is being sent, so that the line is not idle until the next is asked for,
/// which takes so long, in seconds...
const NEXT_COMES_S: f64 = 0.1;

/// ...but no more than are sent in this many: their askers wait for them.
const ALL_SENT_S: f64 = 4.0;

/// As many pieces are asked for as are received in so many seconds: a request of a fetch that begins is late after 5.
const ALL_RECEIVED_S: f64 = 4.0;

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn limits(up: &str, down: &str, origin: &str) -> Limits {
        let limit = |text: &str| text.parse().unwrap();
        Limits { up: limit(up), down: limit(down), origin: limit(origin), scavenger: false }
    }

    #[test]
    fn rates_are_read_and_shown() {
        for (text, bytes) in [
            ("50MB/s", 50_000_000),
            ("400Mbit/s", 50_000_000),
            ("1.5 Gbit/s", 187_500_000),
            ("100MiB/s", 100 * MIB),
            ("2 MB/s", LIMIT_MIN),
        ] {
            let limit: Limit = text.parse().unwrap();
            assert_eq!(limit.bytes_per_s(), Some(bytes), "{text}");
            // Told exactly to another process.
            assert_eq!(String::from(limit).parse(), Ok(limit));
        }
        assert_eq!("none".parse::<Limit>().unwrap().bytes_per_s(), None);
        assert_eq!("50MB/s".parse::<Limit>().unwrap().to_string(), "50.0 MB/s");
        for wrong in ["", "50", "50MB", "50Mb/s", "50MBps", "fast", "-50MB/s", "/s", "bit/s", "B/s"]
        {
            let error = wrong.parse::<Limit>().unwrap_err();
            assert!(error.contains("is not a rate"), "{wrong}: {error}");
        }
        for low in ["0MB/s", "1999KB/s", "15Mbit/s"] {
            let error = low.parse::<Limit>().unwrap_err();
            assert!(error.contains("at least 2.0 MB/s"), "{low}: {error}");
            assert_eq!(error.lines().count(), 1);
        }
    }

    #[test]
    fn without_limits_the_policy_is_the_default() {
        assert_eq!(Limits::default().policy(4 * MIB), Policy::default());
        // Nor does a fast one change anything.
        let fast = limits("10GB/s", "10GB/s", "10GB/s");
        assert_eq!(fast.policy(4 * MIB), Policy::default());
    }

    #[test]
    fn what_is_under_way_passes_in_time() {
        for rate in ["2MB/s", "3MB/s", "10MB/s", "50MB/s", "1GB/s"] {
            let limited = limits(rate, rate, rate);
            let rate = limited.up.bytes_per_s().unwrap() as f64;
            for piece in [MIB / 4, MIB, 4 * MIB, 16 * MIB] {
                let policy = limited.policy(piece);
                let seconds = |pieces: usize| (pieces as u64 * piece) as f64 / rate;
                let context = format!("{rate} bytes a second, {piece} a piece: {policy:?}");
                assert!(seconds(policy.upload_slots) < 10.0, "{context}");
                assert!(seconds(policy.requests_max) < 10.0, "{context}");
                let leased =
                    policy.leased_max + policy.origin_reads_max as u32 * policy.origin_read_pieces;
                assert!(seconds(leased as usize) < 20.0, "{context}");
                // And the line is not idle meanwhile.
                if seconds(1) < 2.0 {
                    assert!(policy.upload_slots > 1, "{context}");
                }
            }
        }
    }

    #[test]
    fn what_changed_is_told_in_one_line() {
        let old = limits("none", "50MB/s", "none");
        let change = LimitsChange {
            up_limit: Some("20MB/s".parse().unwrap()),
            scavenger: Some(true),
            ..LimitsChange::default()
        };
        let told = old.changes_to(&old.with(change)).unwrap();
        assert_eq!(told, "up_limit was none and is 20.0 MB/s, scavenger was false and is true");
        assert_eq!(old.changes_to(&old.with(LimitsChange::default())), None);
    }
}
