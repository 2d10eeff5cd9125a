//! Frames: a length in four bytes, least first, and then an encoded message of that length.

use bytes::{BufMut, Bytes, BytesMut};
use quinn::{ConnectionError, ReadError, RecvStream};
use serde::{Serialize, de::DeserializeOwned};
use shoal_proto::codec::{self, CodecError};

const LENGTH_BYTES: usize = 4;

/// Claimed lengths are believed up to here; a longer frame's buffer grows with what really comes.
const BELIEVED_BYTES: usize = 64 << 10;

/// The frame that claims or welcomes a connection: one of no bytes, which no message can be.
pub(crate) const EMPTY: [u8; LENGTH_BYTES] = [0; LENGTH_BYTES];

/// Why a frame was not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FrameError {
    /// The stream ended or was reset before a whole frame.
    Ended,
    /// The peer broke the protocol.
    Malformed(&'static str),
    /// The connection is gone.
    Lost(ConnectionError),
}

impl From<ReadError> for FrameError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(error) => Self::Lost(error),
            // ClosedStream, IllegalOrderedRead and ZeroRttRejected cannot be: the stream is read in
            // order, by one reader, without 0-RTT.
            _ => Self::Ended,
        }
    }
}

/// A message as a frame of at most `limit` bytes after its length.
pub(crate) fn encode<T: Serialize>(message: &T, limit: usize) -> Result<Bytes, CodecError> {
    let body = codec::encode(message, limit)?;
    let mut frame = BytesMut::with_capacity(LENGTH_BYTES + body.len());
    frame.put_u32_le(body.len() as u32);
    frame.put_slice(&body);
    Ok(frame.freeze())
}

/// Reads one message of at most `limit` bytes.
pub(crate) async fn read<T: DeserializeOwned>(
    stream: &mut RecvStream,
    limit: usize,
) -> Result<T, FrameError> {
    let len = read_length(stream).await?;
    if len > limit {
        return Err(FrameError::Malformed("a message is too long"));
    }
    let mut body = Vec::with_capacity(len.min(BELIEVED_BYTES));
    while body.len() < len {
        let chunk = stream.read_chunk(len - body.len(), true).await?.ok_or(FrameError::Ended)?;
        body.extend_from_slice(&chunk.bytes);
    }
    codec::decode(&body, limit).map_err(|_| FrameError::Malformed("a message cannot be read"))
}

/// Reads the frame that claims or welcomes.
pub(crate) async fn read_empty(stream: &mut RecvStream) -> Result<(), FrameError> {
    match read_length(stream).await? {
        0 => Ok(()),
        _ => Err(FrameError::Malformed("the control stream does not begin with an empty frame")),
    }
}

async fn read_length(stream: &mut RecvStream) -> Result<usize, FrameError> {
    let mut length = [0; LENGTH_BYTES];
    stream.read_exact(&mut length).await.map_err(|error| match error {
        quinn::ReadExactError::ReadError(error) => error.into(),
        quinn::ReadExactError::FinishedEarly(_) => FrameError::Ended,
    })?;
    Ok(u32::from_le_bytes(length) as usize)
}

/// Reads to the end of a stream at which nothing more may come.
pub(crate) async fn read_end(stream: &mut RecvStream) -> Result<(), FrameError> {
    match stream.read_chunk(1, true).await? {
        None => Ok(()),
        Some(_) => Err(FrameError::Malformed("a stream goes on past its message")),
    }
}
