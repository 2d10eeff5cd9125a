//! Sizes and rates as people write them.

/// Reads a size such as `10GB`, `256MiB` or `1024`, in bytes.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let units = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("B", 1),
        ("", 1),
    ];
    let bytes = scaled(text, &units).ok_or_else(|| {
        format!("'{text}' is not a size: write a number and B, KB, MB, GB, KiB, MiB or GiB")
    })?;
    if bytes == 0 { Err("a size of 0 bytes leaves nothing to simulate".into()) } else { Ok(bytes) }
}

/// Reads a rate such as `10Gbps` or `300MBps`, in bits a second.
pub(crate) fn rate(text: &str) -> Result<u64, String> {
    let units = [
        ("Kbps", 1_000),
        ("Mbps", 1_000_000),
        ("Gbps", 1_000_000_000),
        ("KBps", 8_000),
        ("MBps", 8_000_000),
        ("GBps", 8_000_000_000),
        ("bps", 1),
    ];
    match scaled(text, &units) {
        Some(0) => Err("a rate of 0 moves nothing".into()),
        Some(bits) => Ok(bits),
        None => Err(format!(
            "'{text}' is not a rate: write a number and Kbps, Mbps, Gbps, KBps, MBps or GBps"
        )),
    }
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = units.iter().find(|(name, _)| *name == unit.trim())?.1;
    let product = number.parse::<f64>().ok()? * factor as f64;
    (product <= u64::MAX as f64 / 16.0).then_some(product.round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_rates_are_read() {
        assert_eq!(size("10GB"), Ok(10_000_000_000));
        assert_eq!(size("1.5 MiB"), Ok(1_572_864));
        assert_eq!(size("7"), Ok(7));
        assert_eq!(rate("10Gbps"), Ok(10_000_000_000));
        assert_eq!(rate("300MBps"), Ok(2_400_000_000));
        for wrong in ["", "GB", "0", "0B", "-1GB", "1..2GB", "10 XB", "1e3MB", "99999999999999GB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        for wrong in ["10", "10GB", "0Gbps", "fast"] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
    }
}
