//! Questions and answers, each on a stream of its own.

use std::collections::VecDeque;

use bytes::Bytes;
use quinn::{RecvStream, SendStream, StoppedError, VarInt, WriteError, Written};
use shoal_proto::{
    manifest::PieceSize,
    peer::{
        CloseReason, STREAM_REPLY_MAX_BYTES, STREAM_REQUEST_MAX_BYTES, StreamReply, StreamRequest,
    },
};

use crate::{
    connection::Connection,
    error::{ReplyError, RequestError, describe},
    frame::{self, FrameError},
    pace::{Pacer, Turn},
};

/// Chunks taken from a stream at once: about the packets that one system call brings.
const CHUNKS_AT_ONCE: usize = 32;

/// Answers without a body go before the pieces of the same connection, and control messages before both:
/// a BUSY must not wait behind megabytes.
pub(crate) const PRIORITY_CONTROL: i32 = 2;
const PRIORITY_SHORT: i32 = 1;
const PRIORITY_PIECE: i32 = 0;

/// A piece is handed over in parts of this many bytes at most: a limit that is set in the middle of it holds for the rest.
const PART_BYTES: usize = 1 << 20;

/// The code of a stream that is given up.
const GIVEN_UP: VarInt = VarInt::from_u32(0);

/// Asks, and reads the answer's header.
pub(crate) async fn ask(
    connection: &Connection,
    request: &StreamRequest,
) -> Result<(StreamReply, ReplyBody), RequestError> {
    let request =
        frame::encode(request, STREAM_REQUEST_MAX_BYTES).map_err(RequestError::TooLong)?;
    let closed = |error| RequestError::Closed(describe(&error));
    let (send, mut stream) = connection.quinn().open_bi().await.map_err(closed)?;
    let mut send = Half(send);
    // A stop of the request's own stream means that the answer comes without its being read.
    match send.0.write_chunk(request).await {
        Ok(()) | Err(WriteError::Stopped(_)) => {}
        Err(WriteError::ConnectionLost(error)) => return Err(closed(error)),
        Err(error) => return Err(RequestError::Closed(error.to_string())),
    }
    let _ = send.0.finish();
    connection.touch();

    let reply = frame::read(&mut stream, STREAM_REPLY_MAX_BYTES).await;
    let reply: StreamReply = reply.map_err(|error| failed(connection, error))?;
    connection.touch();
    let left = body_len(&reply);
    if left as u64 > PieceSize::MAX.bytes() {
        return Err(failed(connection, FrameError::Malformed("a piece is too long")));
    }
    let pacer = connection.pacing().down.clone();
    let came = VecDeque::new();
    let mut body = ReplyBody { stream, left, came, pacer, connection: connection.clone() };
    if left == 0 {
        body.end().await?;
    }
    Ok((reply, body))
}

/// The bytes that follow a header.
fn body_len(reply: &StreamReply) -> usize {
    match reply {
        StreamReply::Piece { len, .. } => *len as usize,
        _ => 0,
    }
}

/// What a failed read means for the request; broken protocol closes the connection.
fn failed(connection: &Connection, error: FrameError) -> RequestError {
    match error {
        FrameError::Ended => RequestError::Dropped,
        FrameError::Lost(error) => RequestError::Closed(describe(&error)),
        FrameError::Malformed(what) => {
            connection.close(CloseReason::Malformed);
            RequestError::Malformed(what)
        }
    }
}

/// The bytes that follow a [`StreamReply::Piece`]; none after any other reply. Dropping it before its end
/// tells the sender to stop.
#[derive(Debug)]
pub struct ReplyBody {
    stream: RecvStream,
    left: usize,
    /// Came off the stream and is not read yet.
    came: VecDeque<Bytes>,
    pacer: Pacer,
    connection: Connection,
}

impl ReplyBody {
    /// Bytes that are left to read.
    #[must_use]
    pub fn left(&self) -> usize {
        self.left
    }

    /// Reads exactly `len` of the bytes that are left. At the end, it also sees to it that there are no
    /// more.
    ///
    /// # Errors
    /// [`RequestError`]; the body cannot be read further then.
    pub async fn read(&mut self, len: usize) -> Result<Vec<u8>, RequestError> {
        let mut out = Vec::new();
        self.read_into(len, &mut out).await?;
        Ok(out)
    }

    /// Like [`Self::read`], into `out`, replacing what it held.
    ///
    /// # Errors
    /// As for [`Self::read`].
    pub async fn read_into(&mut self, len: usize, out: &mut Vec<u8>) -> Result<(), RequestError> {
        if len > self.left {
            return Err(RequestError::PastEnd { asked: len, left: self.left });
        }
        out.clear();
        out.reserve_exact(len);
        while out.len() < len {
            let Some(chunk) = self.came.front_mut() else {
                self.receive(self.left - out.len()).await?;
                continue;
            };
            let part = chunk.split_to(chunk.len().min(len - out.len()));
            out.extend_from_slice(&part);
            if chunk.is_empty() {
                // Gives the packet's buffer back at once.
                self.came.pop_front();
            }
        }
        self.left -= len;
        if self.left == 0 {
            self.end().await?;
        }
        self.connection.touch();
        Ok(())
    }

    /// Takes what is there off the stream, many packets a wake-up; no more than `most` bytes may still come.
    async fn receive(&mut self, most: usize) -> Result<(), RequestError> {
        let mut chunks = [const { Bytes::new() }; CHUNKS_AT_ONCE];
        let count = self.stream.read_chunks(&mut chunks).await;
        let count = count.map_err(FrameError::from).and_then(|n| n.ok_or(FrameError::Ended));
        let count = count.map_err(|error| failed(&self.connection, error))?;
        let bytes = chunks[..count].iter().map(Bytes::len).sum();
        if bytes > most {
            let error = FrameError::Malformed("a piece goes on past its length");
            return Err(failed(&self.connection, error));
        }
        self.came.extend(chunks.into_iter().take(count));
        // Waits for it to pass the limit. What comes meanwhile fills the connection's window, and then its sender waits: with
        // messages too. So each read is a turn of its own, and no connection stands still until others' pieces are whole.
        self.pacer.turn().all(bytes).await;
        Ok(())
    }

    async fn end(&mut self) -> Result<(), RequestError> {
        frame::read_end(&mut self.stream).await.map_err(|error| failed(&self.connection, error))
    }
}

/// A peer's question. Dropping it unanswered gives it up, which the peer sees at once.
#[derive(Debug)]
pub struct IncomingRequest {
    /// What is asked.
    pub request: StreamRequest,
    connection: Connection,
    answer: Half,
}

impl IncomingRequest {
    /// Reads the request off a stream that a peer opened.
    pub(crate) async fn read(
        connection: Connection,
        send: SendStream,
        mut stream: RecvStream,
    ) -> Result<Self, FrameError> {
        let answer = Half(send);
        let request = frame::read(&mut stream, STREAM_REQUEST_MAX_BYTES).await?;
        frame::read_end(&mut stream).await?;
        connection.touch();
        Ok(Self { request, connection, answer })
    }

    /// Who asks.
    #[must_use]
    pub fn from(&self) -> &Connection {
        &self.connection
    }

    /// Resolves when the peer no longer wants the answer, or is gone: what waits for a turn ends there.
    pub async fn stopped(&self) {
        let _ = self.answer.0.stopped().await;
    }

    /// Answers, and resolves once the peer has all of it: the bytes sent, header included. `body` is for
    /// [`StreamReply::Piece`] and of the length that it names; its bytes are sent as they lie, and given
    /// free when the peer has acknowledged them. Dropping the future stops the answer.
    ///
    /// # Errors
    /// [`ReplyError`].
    pub async fn reply(self, reply: StreamReply, body: Option<Bytes>) -> Result<u64, ReplyError> {
        let body = body.unwrap_or_default();
        let mut answer = self.answer(reply)?;
        if answer.left != body.len() {
            return Err(ReplyError::WrongLength { header: answer.left, body: body.len() });
        }
        answer.send(body).await?;
        answer.end().await
    }

    /// Begins an answer whose body is brought part by part. Nothing is sent yet.
    ///
    /// # Errors
    /// [`ReplyError::TooLong`].
    pub fn answer(self, reply: StreamReply) -> Result<Answer, ReplyError> {
        let promised = body_len(&reply);
        let header = frame::encode(&reply, STREAM_REPLY_MAX_BYTES).map_err(ReplyError::TooLong)?;
        let priority = if promised > 0 { PRIORITY_PIECE } else { PRIORITY_SHORT };
        let _ = self.answer.0.set_priority(priority);
        let turn = self.connection.pacing().up.turn();
        let (connection, stream) = (self.connection, self.answer);
        Ok(Answer { connection, stream, turn, header, promised, left: promised, sent_bytes: 0 })
    }
}

/// An answer on its way. Dropping it before [`Answer::end`] stops it, which the peer sees at once.
#[derive(Debug)]
pub struct Answer {
    connection: Connection,
    stream: Half,
    turn: Turn,
    /// Not sent yet: it goes with the first part.
    header: Bytes,
    promised: usize,
    left: usize,
    sent_bytes: u64,
}

impl Answer {
    /// Bytes of the body that are left to send.
    #[must_use]
    pub fn left(&self) -> usize {
        self.left
    }

    /// Sends the next part of the body as it lies. It resolves when the connection has taken it over; its bytes are given
    /// free when the peer has acknowledged them.
    ///
    /// # Errors
    /// [`ReplyError`], also when there is more than the header has promised.
    pub async fn send(&mut self, mut part: Bytes) -> Result<(), ReplyError> {
        if part.len() > self.left {
            let body = self.promised - self.left + part.len();
            return Err(ReplyError::WrongLength { header: self.promised, body });
        }
        self.left -= part.len();
        while !self.header.is_empty() || !part.is_empty() {
            // The header waits with the piece: its reader makes room when it comes.
            let passes = tokio::select! {
                biased;
                passes = self.turn.some(part.len().min(PART_BYTES)) => passes,
                stopped = self.stream.0.stopped() => return Err(gone(stopped, self.sent_bytes)),
            };
            let mut chunks = [std::mem::take(&mut self.header), part.split_to(passes)];
            self.stream.write(&mut chunks, &mut self.sent_bytes).await?;
        }
        Ok(())
    }

    /// Resolves once the peer has all of it: the bytes sent, header included.
    ///
    /// # Errors
    /// [`ReplyError`], also when less was sent than the header has promised.
    pub async fn end(mut self) -> Result<u64, ReplyError> {
        if self.left > 0 {
            let body = self.promised - self.left;
            return Err(ReplyError::WrongLength { header: self.promised, body });
        }
        self.send(Bytes::new()).await?;
        let _ = self.stream.0.finish();
        match self.stream.0.stopped().await {
            Ok(None) => {
                self.connection.touch();
                Ok(self.sent_bytes)
            }
            stopped => Err(gone(stopped, self.sent_bytes)),
        }
    }
}

/// Why an answer ended before its end.
fn gone(stopped: Result<Option<VarInt>, StoppedError>, sent_bytes: u64) -> ReplyError {
    match stopped {
        Ok(_) => ReplyError::Stopped { sent_bytes },
        Err(StoppedError::ConnectionLost(error)) => ReplyError::Closed(describe(&error)),
        Err(error) => ReplyError::Closed(error.to_string()),
    }
}

/// The sending half of a stream, reset when it is dropped before its end. (quinn's own would finish:
/// the peer could take a half answer for a whole one, and all that is queued would still be sent.)
#[derive(Debug)]
struct Half(SendStream);

impl Half {
    /// Writes all of `chunks`, and adds what was written.
    async fn write(
        &mut self,
        chunks: &mut [Bytes],
        sent_bytes: &mut u64,
    ) -> Result<(), ReplyError> {
        let mut rest = chunks;
        loop {
            // An empty chunk is never taken by a write of its own.
            while rest.first().is_some_and(Bytes::is_empty) {
                rest = &mut rest[1..];
            }
            if rest.is_empty() {
                return Ok(());
            }
            let Written { bytes, chunks } = match self.0.write_chunks(rest).await {
                Ok(written) => written,
                Err(WriteError::Stopped(_)) => {
                    return Err(ReplyError::Stopped { sent_bytes: *sent_bytes });
                }
                Err(WriteError::ConnectionLost(error)) => {
                    return Err(ReplyError::Closed(describe(&error)));
                }
                Err(error) => return Err(ReplyError::Closed(error.to_string())),
            };
            *sent_bytes += bytes as u64;
            rest = &mut rest[chunks..];
        }
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        // After the acknowledged end this does nothing.
        let _ = self.0.reset(GIVEN_UP);
    }
}
