//! The two listeners: HTTPS that knows its callers by certificate, and the metrics page.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::{
    Router,
    extract::connect_info::Connected,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
    serve::{IncomingStream, Listener},
};
use prometheus::{Encoder as _, Registry, TextEncoder};
use shoal_pki::{Member, member_of};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::{
    guard::{Guarded, Members},
    guests::{Guests, Limits},
    membership::Membership,
};

/// How long a TLS handshake may take: a caller that stalls holds a place, not the listener.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How many handshakes may be under way at once.
const HANDSHAKES_MAX: usize = 256;

/// How often the callers' certificates are checked again: they expire.
const RECHECK: Duration = Duration::from_secs(600);

/// How long open requests have to finish when the process stops: a long poll is 5 s at most.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(6);

/// Who makes a request.
#[derive(Debug, Clone)]
pub struct Caller {
    /// From where.
    pub addr: SocketAddr,
    /// Whose certificate it showed; none when it showed none.
    pub member: Option<Member>,
    /// That certificate, DER.
    pub certificate: Option<Arc<Vec<u8>>>,
}

/// Accepts TCP, shakes hands aside, and gives finished TLS streams to axum.
struct TlsListener {
    ready: mpsc::Receiver<(Guarded, Caller)>,
    local: SocketAddr,
}

async fn accept_loop(
    tcp: TcpListener,
    acceptor: TlsAcceptor,
    ready: mpsc::Sender<(Guarded, Caller)>,
    guests: Arc<Guests>,
    membership: Arc<Membership>,
) {
    let members = Arc::<Members>::default();
    tokio::spawn(recheck(membership.clone(), members.clone(), ready.clone()));
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let (stream, addr) = tokio::select! {
            accepted = tcp.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: it passes when connections close.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = ready.closed() => return,
        };
        let (acceptor, ready, guests) = (acceptor.clone(), ready.clone(), guests.clone());
        let (members, membership) = (members.clone(), membership.clone());
        tokio::spawn(async move {
            let _place = place;
            let _ = stream.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let certificates = stream.get_ref().1.peer_certificates();
                    let shown = certificates.and_then(|chain| chain.first());
                    let shown = shown.map(|certificate| certificate.to_vec());
                    let member = shown.as_ref().and_then(|der| member_of(der).ok());
                    let certificate = shown.clone().map(Arc::new);
                    let Some(stream) = guests.admit(stream, member.is_none()) else {
                        tracing::warn!(%addr, "too many callers without a certificate");
                        return;
                    };
                    let stream = members.guard(stream, shown);
                    // The trust may have changed since the handshake began, before the guard was there.
                    let good =
                        |der: &Arc<Vec<u8>>| membership.trust().verify_certificate(der).is_ok();
                    if certificate.as_ref().is_none_or(good) {
                        let _ = ready.send((stream, Caller { addr, member, certificate })).await;
                    }
                }
                Ok(Err(error)) => tracing::debug!(%addr, %error, "TLS handshake failed"),
                Err(_) => tracing::debug!(%addr, "TLS handshake timed out"),
            }
        });
    }
}

/// Ends the connections of callers that a new trust no longer covers.
async fn recheck(
    membership: Arc<Membership>,
    members: Arc<Members>,
    listener: mpsc::Sender<(Guarded, Caller)>,
) {
    let mut changes = membership.watch();
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RECHECK) => {}
            () = listener.closed() => return,
        }
        let (members, trust) = (members.clone(), membership.trust());
        let cut = tokio::task::spawn_blocking(move || members.recheck(&trust)).await;
        if let Ok(1..) = cut {
            tracing::info!(
                connections = cut.unwrap_or(0),
                "closed connections that are not trusted any more"
            );
        }
    }
}

impl Listener for TlsListener {
    type Io = Guarded;
    type Addr = Caller;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(accepted) => accepted,
            // The accept loop has ended, so the server is being shut down: never resolve.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(Caller { addr: self.local, member: None, certificate: None })
    }
}

impl Connected<IncomingStream<'_, TlsListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, TlsListener>) -> Self {
        stream.remote_addr().clone()
    }
}

/// Serves `router` over HTTPS until `token` is cancelled; handlers find the [`Caller`] as connect info. A connection whose
/// caller's certificate no longer counts is ended at once. Returns the address that it got and the task, which ends when open requests have been answered.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve_https(
    addr: SocketAddr,
    tls: rustls::ServerConfig,
    router: Router,
    membership: Arc<Membership>,
    token: CancellationToken,
) -> anyhow::Result<(SocketAddr, JoinHandle<()>)> {
    serve_within(Limits::default(), addr, tls, router, membership, token).await
}

pub(crate) async fn serve_within(
    limits: Limits,
    addr: SocketAddr,
    tls: rustls::ServerConfig,
    router: Router,
    membership: Arc<Membership>,
    token: CancellationToken,
) -> anyhow::Result<(SocketAddr, JoinHandle<()>)> {
    let guests = Arc::new(Guests::new(limits));
    let tcp = TcpListener::bind(addr).await.with_context(|| format!("cannot listen on {addr}"))?;
    let local = tcp.local_addr()?;
    let (sender, ready) = mpsc::channel(HANDSHAKES_MAX);
    tokio::spawn(accept_loop(tcp, TlsAcceptor::from(Arc::new(tls)), sender, guests, membership));
    let service = router.into_make_service_with_connect_info::<Caller>();
    let stop = token.clone();
    let server = axum::serve(TlsListener { ready, local }, service)
        .with_graceful_shutdown(async move { stop.cancelled().await });
    let task = tokio::spawn(async move {
        let drained = async {
            token.cancelled().await;
            tokio::time::sleep(DRAIN_TIMEOUT).await;
        };
        tokio::select! {
            result = server => if let Err(error) = result {
                tracing::error!(%error, "the HTTPS listener failed");
            },
            () = drained => tracing::info!("requests still open were dropped"),
        }
    });
    Ok((local, task))
}

/// Serves `registry` at `/metrics`, and `/healthz`, over plain HTTP until `token` is cancelled. Returns the
/// address that it got.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve_metrics(
    addr: SocketAddr,
    registry: Registry,
    token: CancellationToken,
) -> anyhow::Result<SocketAddr> {
    let page = move || {
        let registry = registry.clone();
        async move {
            let mut text = Vec::new();
            match TextEncoder::new().encode(&registry.gather(), &mut text) {
                Ok(()) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
                Err(error) => {
                    (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response()
                }
            }
        }
    };
    let router =
        Router::new().route("/metrics", get(page)).route("/healthz", get(|| async { "ok\n" }));
    let tcp = TcpListener::bind(addr)
        .await
        .with_context(|| format!("cannot listen for metrics on {addr}"))?;
    let local = tcp.local_addr()?;
    tokio::spawn(async move {
        let stop = async move { token.cancelled().await };
        if let Err(error) = axum::serve(tcp, router).with_graceful_shutdown(stop).await {
            tracing::error!(%error, "the metrics listener failed");
        }
    });
    Ok(local)
}
