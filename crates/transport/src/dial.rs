//! From an address to a connection: handshake, claim, welcome. And the same from the other side.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use quinn::{ConnectionError, RecvStream};
use rustls::pki_types::CertificateDer;
use shoal_pki::{Member, Role, member_of, server_name};
use shoal_proto::{
    NodeId,
    peer::{CloseReason, StreamReply, StreamRequest, TRUST_SINCE},
};
use tokio::time::timeout;

use crate::{
    connection::Connection,
    control::Control,
    endpoint::Inner,
    error::{ConnectError, closed_by_peer, code, describe, names, no_common_version},
    frame::{self, FrameError},
    peers::{Claim, Outcome, Waiter, Want},
    request::PRIORITY_CONTROL,
};

/// A handshake must be done by then, and a claim come: a dead address costs this much.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// A claim must be answered by then: the other side may first wait out a dial of its own.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(12);

/// No two dials of a pair that are further apart than this can have crossed: a handshake and a claim at
/// each end.
pub(crate) const CROSSING: Duration = Duration::from_secs(20);

/// What the caller knows of whom it dials.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Expect {
    Node(NodeId),
    Role(Role),
}

impl Expect {
    fn check(self, found: &Member) -> Result<(), ConnectError> {
        match self {
            Self::Node(expected) if expected != found.node => {
                Err(ConnectError::WrongPeer { expected, found: found.node })
            }
            Self::Role(expected) if expected != found.role => {
                Err(ConnectError::WrongRole { expected, found: found.role })
            }
            _ => Ok(()),
        }
    }
}

/// Waits until somebody's dial is decided.
pub(crate) async fn decided(mut waiter: Waiter) -> Outcome {
    match waiter.wait_for(Option::is_some).await {
        Ok(outcome) => outcome.clone().unwrap_or(Err(ConnectError::ShutDown)),
        // The dialler is gone without a word, as at a shutdown.
        Err(_) => Err(ConnectError::ShutDown),
    }
}

/// Dials a node whose slot has been taken for `attempt`, and decides the slot.
pub(crate) async fn dial_node(
    inner: Arc<Inner>,
    addr: SocketAddr,
    node: NodeId,
    attempt: u64,
    waiter: Waiter,
) {
    let elsewhere = decided(waiter.clone());
    let dial = async {
        let (quinn, member) = handshake(&inner, addr, Expect::Node(node)).await?;
        claim(&inner, addr, quinn, member, attempt, waiter).await
    };
    tokio::select! {
        outcome = dial => {
            if let Err(error) = outcome {
                inner.peers().dial_failed(&node, attempt, error);
            }
        }
        // The peer's own dial came first, and is the one that is kept. Dropping ours closes it.
        _ = elsewhere => {}
    }
}

/// Dials an address whose node is not known.
pub(crate) async fn dial_role(inner: Arc<Inner>, addr: SocketAddr, role: Role) -> Outcome {
    let (quinn, member) = handshake(&inner, addr, Expect::Role(role)).await?;
    let node = member.node;
    // Not claimed yet, so the other side does not count this connection.
    let want = inner.peers().want(node);
    match want {
        Want::Have(connection) => {
            quinn.close(code(CloseReason::Duplicate), b"");
            Ok(connection)
        }
        Want::Join(waiter) => {
            quinn.close(code(CloseReason::Duplicate), b"");
            decided(waiter).await
        }
        Want::Full => {
            quinn.close(code(CloseReason::Full), b"");
            Err(ConnectError::Full)
        }
        Want::Dial(attempt, waiter) => {
            let outcome = claim(&inner, addr, quinn, member, attempt, waiter).await;
            if let Err(error) = &outcome {
                inner.peers().dial_failed(&node, attempt, error.clone());
            }
            outcome
        }
    }
}

/// Dials, and checks who answers.
async fn handshake(
    inner: &Inner,
    addr: SocketAddr,
    expect: Expect,
) -> Result<(quinn::Connection, Member), ConnectError> {
    let name = server_name(inner.cluster());
    let connecting = match expect {
        Expect::Role(Role::Region) => {
            inner.quinn().connect_with(inner.regions().clone(), addr, &name)
        }
        _ => inner.quinn().connect(addr, &name),
    };
    let connecting = connecting.map_err(|error| ConnectError::Address(addr, error.to_string()))?;
    let quinn = timeout(HANDSHAKE_TIMEOUT, connecting)
        .await
        .map_err(|_| ConnectError::Timeout(addr))?
        .map_err(|error| match no_common_version(&error) {
            true => ConnectError::NoCommonVersion { addr, ours: inner.versions().to_vec() },
            false => failed(addr, &error),
        })?;
    let member = peer_member(&quinn).ok_or_else(|| no_member(&quinn))?;
    if member.node == inner.me() {
        quinn.close(code(CloseReason::WrongPeer), b"");
        return Err(ConnectError::Own);
    }
    if let Err(error) = expect.check(&member) {
        quinn.close(code(CloseReason::WrongPeer), b"");
        return Err(error);
    }
    Ok((quinn, member))
}

/// Asks whoever is at `addr` for trust bundles, on a connection that takes no slot and is for nothing else.
pub(crate) async fn ask_trust(
    inner: &Inner,
    addr: SocketAddr,
    after: u64,
) -> Result<Vec<Vec<u8>>, ConnectError> {
    let name = server_name(inner.cluster());
    let connecting = inner
        .quinn()
        .connect_with(inner.asking().clone(), addr, &name)
        .map_err(|error| ConnectError::Address(addr, error.to_string()))?;
    let late = |_| ConnectError::Timeout(addr);
    let quinn = timeout(HANDSHAKE_TIMEOUT, connecting).await.map_err(late)?;
    let quinn = quinn.map_err(|error| failed(addr, &error))?;
    let member = peer_member(&quinn).ok_or_else(|| no_member(&quinn))?;
    let (connection, _queue) = Connection::new(quinn, member, true, inner.pacing().clone());
    let asked = async {
        let _streams = welcomed(&connection).await.map_err(|error| failed(addr, &error))?;
        let old = || ConnectError::Refused("it is of a release that gives no trust".into());
        if connection.version().is_none_or(|version| version < TRUST_SINCE) {
            return Err(old());
        }
        match connection.request(StreamRequest::Trust { after }).await {
            Ok((StreamReply::Trust(bundles), _)) => Ok(bundles),
            Ok(_) => Err(old()),
            Err(error) => Err(ConnectError::Refused(error.to_string())),
        }
    };
    let asked = timeout(WELCOME_TIMEOUT, asked).await;
    connection.close(CloseReason::Done);
    asked.map_err(late)?
}

fn no_member(quinn: &quinn::Connection) -> ConnectError {
    quinn.close(code(CloseReason::WrongPeer), b"");
    ConnectError::Handshake("the certificate names no member".into())
}

/// Who is at the other end, by the certificate that the handshake has verified.
fn peer_member(quinn: &quinn::Connection) -> Option<Member> {
    let chain = quinn.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    member_of(chain.first()?).ok()
}

/// Claims the pair, waits for the welcome, and takes the slot.
async fn claim(
    inner: &Arc<Inner>,
    addr: SocketAddr,
    quinn: quinn::Connection,
    member: Member,
    attempt: u64,
    waiter: Waiter,
) -> Outcome {
    let (connection, queue) = Connection::new(quinn, member, true, inner.pacing().clone());
    match timeout(WELCOME_TIMEOUT, welcomed(&connection)).await {
        Ok(Ok((send, receive))) => {
            if inner.peers().dialled(attempt, &connection) {
                inner.serve(connection.clone(), Control { send, receive, queue });
                return Ok(connection);
            }
            connection.close(CloseReason::Duplicate);
            decided(waiter).await
        }
        Ok(Err(error)) if closed_by_peer(&error) == Some(CloseReason::Duplicate) => {
            // The other side keeps a connection that it dialled; its claim is under way to us.
            let refused = || ConnectError::Refused(describe(&error));
            timeout(HANDSHAKE_TIMEOUT, decided(waiter)).await.unwrap_or_else(|_| Err(refused()))
        }
        Ok(Err(error)) => {
            connection.close(CloseReason::Malformed);
            Err(failed(addr, &error))
        }
        Err(_) => {
            connection.close(CloseReason::Done);
            Err(ConnectError::Timeout(addr))
        }
    }
}

async fn welcomed(
    connection: &Connection,
) -> Result<(quinn::SendStream, RecvStream), ConnectionError> {
    let quinn = connection.quinn();
    let send = open_control(quinn).await?;
    let receive = accept_control(quinn).await?;
    Ok((send, receive))
}

/// Opens this side's control stream.
async fn open_control(quinn: &quinn::Connection) -> Result<quinn::SendStream, ConnectionError> {
    let mut send = quinn.open_uni().await?;
    let _ = send.set_priority(PRIORITY_CONTROL);
    match send.write_chunk(Bytes::from_static(&frame::EMPTY)).await {
        Err(quinn::WriteError::ConnectionLost(error)) => Err(error),
        // A peer that stops the stream is seen by whoever writes next.
        _ => Ok(send),
    }
}

/// Takes the other side's control stream.
async fn accept_control(quinn: &quinn::Connection) -> Result<RecvStream, ConnectionError> {
    let mut receive = quinn.accept_uni().await?;
    match frame::read_empty(&mut receive).await {
        Ok(()) => Ok(receive),
        Err(FrameError::Lost(error)) => Err(error),
        Err(FrameError::Ended | FrameError::Malformed(_)) => {
            quinn.close(code(CloseReason::Malformed), b"");
            Err(quinn.closed().await)
        }
    }
}

/// Why a dial came to nothing.
fn failed(addr: SocketAddr, error: &ConnectionError) -> ConnectError {
    match (closed_by_peer(error), error) {
        (Some(CloseReason::Full), _) => ConnectError::Full,
        (Some(_), _) => ConnectError::Refused(describe(error)),
        (None, ConnectionError::TimedOut) => ConnectError::Timeout(addr),
        (None, ConnectionError::LocallyClosed) => ConnectError::ShutDown,
        (None, _) => ConnectError::Handshake(describe(error)),
    }
}

/// Answers a dial: handshake, claim, welcome.
pub(crate) async fn answer(inner: Arc<Inner>, incoming: quinn::Incoming) {
    let addr = incoming.remote_address();
    let begun = async {
        let quinn = incoming.accept()?.await?;
        let receive = accept_control(&quinn).await?;
        Ok::<_, ConnectionError>((quinn, receive))
    };
    let (quinn, receive) = match timeout(HANDSHAKE_TIMEOUT, begun).await {
        Ok(Ok(begun)) => begun,
        Ok(Err(error)) if no_common_version(&error) => {
            let ours = names(inner.versions());
            tracing::warn!(%addr, ours, "no connection from a peer: it speaks none of our protocol versions");
            return;
        }
        Ok(Err(error)) => {
            tracing::info!(%addr, reason = describe(&error), "no connection from a peer");
            return;
        }
        Err(_) => {
            tracing::debug!(%addr, "a dialler did not claim its connection in time");
            return;
        }
    };
    let Some(member) = peer_member(&quinn) else {
        quinn.close(code(CloseReason::WrongPeer), b"");
        return;
    };
    let (connection, queue) = Connection::new(quinn, member, false, inner.pacing().clone());
    loop {
        let claim = inner.peers().claim(&connection);
        match claim {
            Claim::Taken => break,
            Claim::Wait(waiter) => drop(decided(waiter).await),
            Claim::Close(reason) => {
                tracing::debug!(peer = %connection.member(), %addr, ?reason, "claim refused");
                connection.close(reason);
                return;
            }
        }
    }
    match open_control(connection.quinn()).await {
        Ok(send) => inner.serve(connection, Control { send, receive, queue }),
        Err(_) => inner.peers().closed(&connection),
    }
}
