//! The one door to the wire: bincode behind a version byte and a size limit.
//!
//! bincode is no longer maintained, so nothing outside this module names it: another codec would be
//! another version byte here.

use alloc::vec::Vec;
use core::fmt;

use serde::{Serialize, de::DeserializeOwned};

/// The first byte of every encoded message.
pub const CODEC_VERSION: u8 = 1;

/// Why a message could not be written or read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodecError {
    /// Longer than its kind may be.
    TooLong {
        /// The length met, in bytes.
        len: usize,
        /// The limit, in bytes.
        limit: usize,
    },
    /// Another codec version; its first byte.
    Version(u8),
    /// Not a message of this kind, or bytes left over after it.
    Malformed,
}

impl fmt::Display for CodecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong { len, limit } => {
                write!(f, "message of {len} bytes is over its limit of {limit}")
            }
            Self::Version(v) => write!(f, "message of codec version {v}, not {CODEC_VERSION}"),
            Self::Malformed => f.write_str("malformed message"),
        }
    }
}

impl core::error::Error for CodecError {}

/// What reading may claim of memory for each byte of a message: the densest honest ones, numbers and the lengths of
/// empty lists, claim 8.
const CLAIM_FACTOR: usize = 8;

/// The lengths of messages, in bytes, up to which claims go: for what neighbours say, for what machines ask and the
/// trust bundle, for an index, and for what lies on this machine's own disk. bincode makes room for a string before
/// it looks whether the message has so much left, and takes its limit as a constant: with one step, ten bytes from
/// anybody could claim what the longest index needs.
const STEPS_BYTES: [usize; 4] = [16 << 10, 256 << 10, 8 << 20, 16 << 20];

/// Reads a message that may claim `CLAIM` bytes; also says how many bytes of `body` it took.
fn read<T: DeserializeOwned, const CLAIM: usize>(body: &[u8]) -> Result<(T, usize), CodecError> {
    let config = bincode::config::standard().with_limit::<CLAIM>();
    bincode::serde::decode_from_slice(body, config).map_err(|_| CodecError::Malformed)
}

fn read_within_step<T: DeserializeOwned>(body: &[u8]) -> Result<(T, usize), CodecError> {
    match STEPS_BYTES.iter().position(|step| body.len() <= *step) {
        Some(0) => read::<T, { CLAIM_FACTOR * STEPS_BYTES[0] }>(body),
        Some(1) => read::<T, { CLAIM_FACTOR * STEPS_BYTES[1] }>(body),
        Some(2) => read::<T, { CLAIM_FACTOR * STEPS_BYTES[2] }>(body),
        _ => read::<T, { CLAIM_FACTOR * STEPS_BYTES[3] }>(body),
    }
}

/// Encodes `message`, version byte first.
///
/// # Errors
/// [`CodecError::TooLong`] when the result is longer than `limit` bytes.
pub fn encode<T: Serialize>(message: &T, limit: usize) -> Result<Vec<u8>, CodecError> {
    let body = bincode::serde::encode_to_vec(message, bincode::config::standard())
        .map_err(|_| CodecError::Malformed)?;
    let len = body.len() + 1;
    if len > limit {
        return Err(CodecError::TooLong { len, limit });
    }
    let mut out = Vec::with_capacity(len);
    out.push(CODEC_VERSION);
    out.extend_from_slice(&body);
    Ok(out)
}

/// Decodes a whole message. It never panics, and whatever lengths the message claims inside, what it allocates
/// before it has met the bytes is bounded: 1 MiB for each list in a list, and for a string what the longest message
/// of its kind could hold.
///
/// # Errors
/// [`CodecError`] when it is too long, of another version, malformed, or has bytes left over.
pub fn decode<T: DeserializeOwned>(bytes: &[u8], limit: usize) -> Result<T, CodecError> {
    if bytes.len() > limit {
        return Err(CodecError::TooLong { len: bytes.len(), limit });
    }
    match bytes.split_first() {
        Some((&CODEC_VERSION, body)) => {
            let (message, read) = read_within_step(body)?;
            if read == body.len() { Ok(message) } else { Err(CodecError::Malformed) }
        }
        Some((&version, _)) => Err(CodecError::Version(version)),
        None => Err(CodecError::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use alloc::{string::String, vec::Vec};

    use super::*;

    #[test]
    fn limits_versions_and_leftovers_are_refused() {
        let bytes = encode(&(7u32, "x"), 64).unwrap();
        assert_eq!(decode::<(u32, String)>(&bytes, 64).unwrap(), (7, "x".into()));
        assert!(matches!(encode(&[0u64; 32].as_slice(), 32), Err(CodecError::TooLong { .. })));
        assert!(matches!(decode::<(u32, String)>(&bytes, 2), Err(CodecError::TooLong { .. })));
        let mut other = bytes.clone();
        other[0] = 9;
        assert_eq!(decode::<(u32, String)>(&other, 64), Err(CodecError::Version(9)));
        let mut longer = bytes.clone();
        longer.push(0);
        assert_eq!(decode::<(u32, String)>(&longer, 64), Err(CodecError::Malformed));
        assert_eq!(decode::<(u32, String)>(&[], 64), Err(CodecError::Malformed));
    }

    #[test]
    fn a_lying_length_does_not_allocate() {
        // A vector that claims 2^60 elements in a message of ten bytes.
        let mut bytes = encode(&0u8, 64).unwrap();
        bytes.truncate(1);
        bytes.push(253);
        bytes.extend_from_slice(&(1u64 << 60).to_le_bytes());
        assert_eq!(decode::<Vec<u64>>(&bytes, 64), Err(CodecError::Malformed));
    }
}
