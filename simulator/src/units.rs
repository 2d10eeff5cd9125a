//! Sizes, rates and times as people write them on the command line and in scenario files.

use std::{fmt, str::FromStr};

use bytesize::ByteSize;
use serde::Deserialize;

/// The fastest line that can be asked for: a piece still takes whole nanoseconds.
const RATE_MAX_BPS: u64 = 1_000_000_000_000_000;

/// A size such as `10GB`, `256MiB` or `1024`, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Size(pub(crate) u64);

/// A rate such as `10Gbps` or `300MBps`, in bits a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Rate(pub(crate) u64);

/// A time such as `30s`, `500ms` or `15m`, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Seconds(pub(crate) f64);

/// A part of a whole: more than 0, at most 1.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "f64")]
pub(crate) struct Part(pub(crate) f64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<ByteSize>() {
            Ok(ByteSize(0)) => Err("a size of 0 bytes leaves nothing to simulate".into()),
            Ok(ByteSize(bytes)) => Ok(Self(bytes)),
            Err(_) => Err(format!(
                "'{text}' is not a size: write a number and B, KB, MB, GB, KiB, MiB or GiB"
            )),
        }
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // What stands before "ps" is a size: of bytes in `300MBps`, of bits in `10Gbps`.
        let (size, factor) = match (text.strip_suffix("bps"), text.strip_suffix("ps")) {
            (Some(number), _) => (format!("{number}B"), 1),
            (None, Some(size)) if size.ends_with('B') => (size.to_string(), 8),
            _ => (String::new(), 1),
        };
        let ByteSize(count) = size.parse().map_err(|_| {
            format!(
                "'{text}' is not a rate: write a number and Kbps, Mbps, Gbps, KBps, MBps or GBps"
            )
        })?;
        match count.saturating_mul(factor) {
            0 => Err("a rate of 0 moves nothing".into()),
            bps if bps > RATE_MAX_BPS => Err(format!("'{text}' is more than a petabit a second")),
            bps => Ok(Self(bps)),
        }
    }
}

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match humantime::parse_duration(text) {
            Ok(duration) => Ok(Self(duration.as_secs_f64())),
            Err(_) => Err(format!("'{text}' is not a time: write a number and ms, s, m or h")),
        }
    }
}

macro_rules! from_text {
    ($($unit:ty),*) => {$(
        impl TryFrom<String> for $unit {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }
    )*};
}

from_text!(Size, Rate, Seconds);

impl TryFrom<f64> for Part {
    type Error = String;

    fn try_from(part: f64) -> Result<Self, String> {
        if part > 0.0 && part <= 1.0 {
            Ok(Self(part))
        } else {
            Err(format!("{part} is no part: write more than 0 and at most 1"))
        }
    }
}

impl fmt::Display for Size {
    /// Binary units where they come out even, as piece sizes do; else decimal ones.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = ByteSize(self.0);
        if self.0 >= 1 << 10 && self.0.is_power_of_two() {
            write!(f, "{}", size.display().iec())
        } else {
            write!(f, "{}", size.display().si())
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (divisor, unit) = match self.0 {
            1_000_000_000.. => (1e9, "Gbit/s"),
            1_000_000.. => (1e6, "Mbit/s"),
            1_000.. => (1e3, "Kbit/s"),
            _ => (1.0, "bit/s"),
        };
        write!(f, "{} {unit}", self.0 as f64 / divisor)
    }
}

/// A count with a comma after every three digits.
pub(crate) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [("10GB", 10_000_000_000), ("1.5 MiB", 1_572_864), ("7", 7), ("7B", 7)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for wrong in ["", "GB", "0", "0B", "-1GB", "1..2GB", "10 XB", "1e3MB", "10Gbps"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn rates_are_read() {
        for (text, bps) in [
            ("10Gbps", 10_000_000_000),
            ("300MBps", 2_400_000_000),
            ("2.5 Gbps", 2_500_000_000),
            ("9bps", 9),
        ] {
            assert_eq!(text.parse(), Ok(Rate(bps)), "{text}");
        }
        for wrong in ["", "10", "10GB", "0Gbps", "fast", "bps", "Gps", "10Gps", "9999999Gbps"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_and_parts_are_read() {
        assert_eq!("500ms".parse(), Ok(Seconds(0.5)));
        assert_eq!("15m".parse(), Ok(Seconds(900.0)));
        for wrong in ["", "5", "5 parsecs", "-1s", "s"] {
            assert!(wrong.parse::<Seconds>().is_err(), "{wrong}");
        }
        assert_eq!(Part::try_from(0.2), Ok(Part(0.2)));
        for wrong in [0.0, -0.1, 1.01, f64::NAN, f64::INFINITY] {
            assert!(Part::try_from(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_read_is_shown_as_people_write_it() {
        assert_eq!(Size(10_000_000_000).to_string(), "10.0 GB");
        assert_eq!(Size(4 << 20).to_string(), "4.0 MiB");
        assert_eq!(Rate(793_000_000).to_string(), "793 Mbit/s");
        assert_eq!(Rate(2_500_000_000).to_string(), "2.5 Gbit/s");
        assert_eq!((grouped(7), grouped(1_234_567)), ("7".into(), "1,234,567".into()));
    }
}
