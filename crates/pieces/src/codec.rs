//! The stored form of one piece: one zstd frame, or the bytes as they are.

use std::fmt;

use shoal_proto::manifest::Codec;
use zstd::bulk::{Compressor, Decompressor};

/// The lowest zstd level that an [`Encoder`] takes; lower ones are raised to it.
pub const LEVEL_MIN: i32 = 1;

/// The highest zstd level that an [`Encoder`] takes; higher ones are lowered to it: above 9 the tables grow
/// past 20 MiB a thread and the speed falls under 100 MB/s a core, while a build waits for it.
pub const LEVEL_MAX: i32 = 9;

/// zstd -1 leaves 30-43 % of native binaries where -3 leaves 26-33 %, at twice its speed.
pub const LEVEL_DEFAULT: i32 = 1;

/// A frame must save at least a 32nd (3.1 %) of the raw bytes: below that, decoding it at every machine
/// costs more than sending the rest.
const SAVING_MIN_SHIFT: u32 = 5;

/// Encodes pieces; one a thread, kept, because its tables are large.
pub struct Encoder {
    zstd: Option<Compressor<'static>>,
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}

impl Encoder {
    /// An encoder of zstd level `level`, held to [`LEVEL_MIN`]..=[`LEVEL_MAX`].
    #[must_use]
    pub fn new(level: i32) -> Self {
        // zstd fails here only for want of memory; a piece that is not compressed is still a piece.
        Self { zstd: Compressor::new(level.clamp(LEVEL_MIN, LEVEL_MAX)).ok() }
    }

    /// Encodes `raw` and says how: [`Codec::Zstd`] with the frame in `out`, or [`Codec::Raw`] when a frame
    /// would save less than about 3 %, with `out` left empty: the stored form is then `raw` itself.
    /// What `out` held is gone; its memory is used again and grows to at most 97 % of `raw`.
    pub fn encode(&mut self, raw: &[u8], out: &mut Vec<u8>) -> Codec {
        out.clear();
        let limit = raw.len() - (raw.len() >> SAVING_MIN_SHIFT).max(1).min(raw.len());
        out.reserve_exact(limit);
        if limit == 0 {
            return Codec::Raw;
        }
        let Some(zstd) = &mut self.zstd else { return Codec::Raw };
        // The capacity bounds the output, so zstd gives up as soon as the saving is out of reach.
        match zstd.compress_to_buffer(raw, out) {
            Ok(len) if len <= limit => Codec::Zstd,
            _ => {
                out.clear();
                Codec::Raw
            }
        }
    }
}

/// Why a stored piece could not be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The stored form is longer than the codec allows for a piece of this length.
    #[error("a stored piece of {stored} bytes is too long for {raw} raw ones")]
    StoredLength {
        /// The stored length, in bytes.
        stored: usize,
        /// The piece's raw length, in bytes.
        raw: usize,
    },
    /// It decodes to fewer bytes than the piece has.
    #[error("a piece of {want} bytes was decoded to {got}")]
    Length {
        /// The decoded length, in bytes.
        got: usize,
        /// The piece's raw length, in bytes.
        want: usize,
    },
    /// Not a zstd frame, a damaged one, or one that holds more bytes than the piece has.
    #[error("not a zstd frame of at most {raw} bytes: {reason}")]
    Frame {
        /// The piece's raw length, in bytes.
        raw: usize,
        /// What zstd says.
        reason: String,
    },
}

/// Decodes pieces; one a thread, kept.
pub struct Decoder {
    zstd: Option<Decompressor<'static>>,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder.
    #[must_use]
    pub fn new() -> Self {
        Self { zstd: Decompressor::new().ok() }
    }

    /// Decodes `stored` into `out`, to exactly `raw_len` bytes. A frame is decoded straight into `out`, which
    /// is also its window: whatever the frame claims, no more than `raw_len` bytes are written or
    /// allocated. On an error `out` is empty. The bytes are not verified yet.
    ///
    /// # Errors
    /// [`DecodeError`] when `stored` is not a form of `raw_len` bytes.
    pub fn decode(
        &mut self,
        codec: Codec,
        stored: &[u8],
        raw_len: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), DecodeError> {
        let decoded = match codec {
            Codec::Raw => copy(stored, raw_len, out),
            Codec::Zstd => self.inflate(stored, raw_len, out),
        };
        if decoded.is_err() {
            out.clear();
        }
        decoded
    }

    fn inflate(
        &mut self,
        stored: &[u8],
        raw_len: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), DecodeError> {
        if stored.len() >= raw_len {
            return Err(DecodeError::StoredLength { stored: stored.len(), raw: raw_len });
        }
        let frame = |reason: String| DecodeError::Frame { raw: raw_len, reason };
        let zstd = self.zstd.as_mut().ok_or_else(|| frame("no memory for zstd".into()))?;
        // Only what was not there is zeroed, so a buffer that is used again costs nothing here.
        out.resize(raw_len, 0);
        let got = zstd
            .decompress_to_buffer(stored, out.as_mut_slice())
            .map_err(|error| frame(error.to_string()))?;
        if got != raw_len {
            return Err(DecodeError::Length { got, want: raw_len });
        }
        Ok(())
    }
}

fn copy(stored: &[u8], raw_len: usize, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    if stored.len() > raw_len {
        return Err(DecodeError::StoredLength { stored: stored.len(), raw: raw_len });
    }
    if stored.len() < raw_len {
        return Err(DecodeError::Length { got: stored.len(), want: raw_len });
    }
    out.clear();
    out.extend_from_slice(stored);
    Ok(())
}
