//! Connections of callers that showed no certificate. Anybody can open one, so there is a bound to how many there are
//! and how long each may stand still; those of the cluster's own processes never wait for them.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep},
};
use tokio_rustls::server::TlsStream;

/// What guests are allowed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// How many connections at once; one more is closed.
    pub(crate) connections: usize,
    /// How long one may take to say its first word.
    pub(crate) first_word: Duration,
    /// How long neither side may say anything: an answer may be long in the making (an index whose parts are read
    /// back from a bucket).
    pub(crate) quiet: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let (first_word, quiet) = (Duration::from_secs(10), Duration::from_secs(900));
        Self { connections: 512, first_word, quiet }
    }
}

/// The places for guests.
pub(crate) struct Guests {
    limits: Limits,
    places: Arc<Semaphore>,
}

impl Guests {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, places: Arc::new(Semaphore::new(limits.connections)) }
    }

    /// Takes in a connection; none when it is a guest's and there is no place left.
    pub(crate) fn admit(&self, stream: TlsStream<TcpStream>, is_guest: bool) -> Option<Connection> {
        let guest = match is_guest {
            true => Some(Guest {
                _place: self.places.clone().try_acquire_owned().ok()?,
                alarm: Box::pin(tokio::time::sleep(self.limits.first_word)),
                quiet: self.limits.quiet,
            }),
            false => None,
        };
        Some(Connection { stream, guest })
    }
}

struct Guest {
    _place: OwnedSemaphorePermit,
    alarm: Pin<Box<Sleep>>,
    quiet: Duration,
}

/// A connection, watched if it is a guest's.
pub(crate) struct Connection {
    stream: TlsStream<TcpStream>,
    guest: Option<Guest>,
}

impl Connection {
    /// Passes on what came of reading or writing, or ends the wait when it has lasted too long.
    fn watch<T>(
        &mut self,
        result: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        let Some(guest) = &mut self.guest else { return result };
        if result.is_ready() {
            guest.alarm.as_mut().reset(Instant::now() + guest.quiet);
            return result;
        }
        ready!(guest.alarm.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.watch(result, context)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(result, context)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A flush of nothing is no word.
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use axum::{Router, routing::get};
    use rustls::pki_types::ServerName;
    use shoal_pki::{
        CertificateAuthority, ClientAuth, Credentials, GoalSigner, Identity, IssueRequest, Role,
        Trust,
    };
    use shoal_proto::{
        codec,
        trust::{TRUST_MAX_BYTES, TrustBundle},
    };
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_rustls::{TlsConnector, client};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{https::serve_within, membership::Membership};

    type Stream = client::TlsStream<TcpStream>;

    /// A server with these limits, how a guest connects to it, and how a member does.
    async fn server(
        limits: Limits,
    ) -> (std::net::SocketAddr, [TlsConnector; 2], CancellationToken) {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let ca = CertificateAuthority::create("test").unwrap();
        let signer = GoalSigner::create(1).unwrap();
        let bundle = TrustBundle {
            cluster: "test".into(),
            number: 1,
            ca_certificates: vec![ca.cert_der().to_vec()],
            goal_keys: vec![signer.public()],
            revoked: vec![],
        };
        let signed = codec::encode(&signer.sign_trust(&bundle).unwrap(), TRUST_MAX_BYTES).unwrap();
        let trust = Trust::from_signed(&signed).unwrap();
        let issue = |role, name: &str| {
            let (machine, hosts) = (name.parse().unwrap(), vec!["127.0.0.1".into()]);
            let request = IssueRequest { machine, region: None, role, hosts, days: 1 };
            ca.issue(&request).unwrap()
        };
        let (dir, coordinator) = (tempfile::tempdir().unwrap(), issue(Role::Coordinator, "c1"));
        std::fs::write(dir.path().join("identity.pem"), coordinator.cert_pem).unwrap();
        std::fs::write(dir.path().join("identity.key"), coordinator.key_pem).unwrap();
        std::fs::write(dir.path().join("trust.bin"), &signed).unwrap();
        let membership = Arc::new(Membership::load(dir.path()).unwrap());
        let credentials = membership.credentials();
        let tls = shoal_pki::server_config(credentials, &[], ClientAuth::Optional).unwrap();
        let router = Router::new().route("/", get(|| async { "hello" }));
        let (addr, stop) = ("127.0.0.1:0".parse().unwrap(), CancellationToken::new());
        let served = serve_within(limits, addr, tls, router, membership, stop.clone()).await;
        let (addr, _) = served.unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca.cert_der().to_vec().into()).unwrap();
        let guest =
            rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let worker = issue(Role::Worker, "w1");
        let worker = Identity::from_pem(&worker.cert_pem, &worker.key_pem).unwrap();
        let member = shoal_pki::client_config(&Credentials::new(worker, trust), &[]).unwrap();
        (addr, [guest, member].map(|config| TlsConnector::from(Arc::new(config))), stop)
    }

    async fn connect(addr: std::net::SocketAddr, tls: &TlsConnector) -> io::Result<Stream> {
        let name = ServerName::from(addr.ip());
        tls.connect(name, TcpStream::connect(addr).await?).await
    }

    /// Whether a call on a connection is answered.
    async fn is_answered(stream: &mut Stream) -> bool {
        let request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
        let mut byte = [0];
        stream.write_all(request).await.is_ok() && stream.read_exact(&mut byte).await.is_ok()
    }

    #[tokio::test]
    async fn guests_have_their_number_of_places_and_members_need_none() {
        let limits = Limits { connections: 2, ..Limits::default() };
        let (addr, [guest, member], stop) = server(limits).await;
        let (mut one, mut two) =
            (connect(addr, &guest).await.unwrap(), connect(addr, &guest).await.unwrap());
        assert!(is_answered(&mut one).await && is_answered(&mut two).await);
        if let Ok(mut three) = connect(addr, &guest).await {
            assert!(!is_answered(&mut three).await, "there were two places");
        }
        let mut worker = connect(addr, &member).await.unwrap();
        assert!(is_answered(&mut worker).await);
        // One that leaves makes room.
        drop(one);
        let start = std::time::Instant::now();
        loop {
            let mut next = connect(addr, &guest).await.unwrap();
            if is_answered(&mut next).await {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(30), "no place came free");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        stop.cancel();
    }

    #[tokio::test]
    async fn a_guest_that_says_nothing_is_shown_out() {
        let first_word = Duration::from_millis(200);
        let (addr, [guest, member], stop) =
            server(Limits { first_word, ..Limits::default() }).await;
        let mut silent = connect(addr, &guest).await.unwrap();
        let mut worker = connect(addr, &member).await.unwrap();
        // It ends, whether in order or not.
        let ended = tokio::time::timeout(Duration::from_secs(30), silent.read(&mut [0])).await;
        assert!(matches!(ended.expect("it was closed"), Ok(0) | Err(_)));
        assert!(is_answered(&mut worker).await, "a member may take its time");
        stop.cancel();
    }
}
