//! The tasks that serve a connection from its welcome to its end.

use std::time::Duration;

use bytes::Bytes;
use quinn::{RecvStream, SendStream, WriteError};
use shoal_proto::peer::{
    CloseReason, HAVE_BATCH_MAX, PEER_MESSAGE_MAX_BYTES, PEERS_BATCH_MAX, PeerMessage,
};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};

use crate::{
    connection::Connection,
    endpoint::Incoming,
    error::describe,
    frame::{self, FrameError},
    request::IncomingRequest,
};

/// A request must be whole this long after its stream was opened; slower ones are given up, so that no
/// stream is held for ever. 256 KiB take it at 26 kB/s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection's two control streams and what is to be sent.
pub(crate) struct Control {
    pub(crate) send: SendStream,
    pub(crate) receive: RecvStream,
    pub(crate) queue: mpsc::Receiver<Bytes>,
}

/// Serves `connection` to its end: says that it is connected, passes on what comes, sends what is queued,
/// and says that it is closed.
pub(crate) async fn serve(
    connection: Connection,
    control: Control,
    incoming: mpsc::Sender<Incoming>,
) {
    let Control { send, receive, queue } = control;
    let connected = incoming.send(Incoming::Connected(connection.clone()));
    if connected.await.is_ok() {
        tokio::select! {
            () = write(&connection, send, queue) => {}
            () = read(&connection, receive, &incoming) => {}
            () = accept(&connection, &incoming) => {}
        }
    } else {
        // Nobody listens any more.
        connection.close(CloseReason::Done);
    }
    // Whichever task ended first, it did so because the connection is closed or about to be.
    let reason = describe(&connection.quinn().closed().await);
    tracing::debug!(peer = %connection.member(), node = %connection.node(), reason, "closed");
    let _ = incoming.send(Incoming::Closed(connection, reason)).await;
}

/// Sends queued messages in order, until the connection ends.
async fn write(connection: &Connection, mut stream: SendStream, mut queue: mpsc::Receiver<Bytes>) {
    while let Some(message) = queue.recv().await {
        connection.touch();
        match stream.write_chunk(message).await {
            Ok(()) => {}
            Err(WriteError::Stopped(_)) => {
                return malformed(connection, "the peer stopped the control stream");
            }
            Err(_) => return,
        }
    }
}

/// Passes control messages on, one at a time: while nobody takes them, none is read.
async fn read(connection: &Connection, mut stream: RecvStream, incoming: &mpsc::Sender<Incoming>) {
    let fault = loop {
        match frame::read::<PeerMessage>(&mut stream, PEER_MESSAGE_MAX_BYTES).await {
            Ok(message) if within_limits(&message) => {
                connection.touch();
                let message = Incoming::Message(connection.clone(), message);
                if incoming.send(message).await.is_err() {
                    connection.close(CloseReason::Done);
                    return;
                }
            }
            Ok(_) => break "a control message lists too much",
            Err(FrameError::Malformed(what)) => break what,
            Err(FrameError::Ended) => break "the control stream ended before its connection",
            Err(FrameError::Lost(_)) => return,
        }
    };
    malformed(connection, fault);
}

/// Whether a message keeps to what proto says of its lists.
fn within_limits(message: &PeerMessage) -> bool {
    match message {
        PeerMessage::Have { pieces, .. } => pieces.len() <= HAVE_BATCH_MAX,
        PeerMessage::Peers { peers, .. } => peers.len() <= PEERS_BATCH_MAX,
        _ => true,
    }
}

/// Passes requests on. Each is read by a task of its own, so that a slow one holds up no other; QUIC's
/// limit of open streams bounds them.
async fn accept(connection: &Connection, incoming: &mpsc::Sender<Incoming>) {
    let mut reading = JoinSet::new();
    loop {
        tokio::select! {
            stream = connection.quinn().accept_bi() => {
                let Ok((send, receive)) = stream else { return };
                reading.spawn(pass_on(connection.clone(), send, receive, incoming.clone()));
            }
            Some(_) = reading.join_next() => {}
        }
    }
}

async fn pass_on(
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
    incoming: mpsc::Sender<Incoming>,
) {
    let request = IncomingRequest::read(connection.clone(), send, receive);
    match timeout(REQUEST_TIMEOUT, request).await {
        // The process takes requests in its own time; until then this stream stays open.
        Ok(Ok(request)) => drop(incoming.send(Incoming::Request(request)).await),
        Ok(Err(FrameError::Malformed(what))) => malformed(&connection, what),
        // Given up by the asker, lost with the connection, or too slow.
        Ok(Err(FrameError::Ended | FrameError::Lost(_))) | Err(_) => {}
    }
}

fn malformed(connection: &Connection, what: &str) {
    tracing::warn!(peer = %connection.member(), node = %connection.node(), what,
        "closing a connection that broke the protocol");
    connection.close(CloseReason::Malformed);
}
