//! A receiver of webhooks: a real HTTPS server with a certificate of its own, which fails when it is told to.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Received {
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
    pub answered: u16,
}

/// A running receiver; it ends when it is dropped.
pub struct Receiver {
    pub addr: SocketAddr,
    /// What a caller has to believe.
    pub ca_pem: String,
    got: Arc<Mutex<Vec<Received>>>,
    failures: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Receiver {
    /// Starts one that answers its first `failures` requests with 503.
    pub async fn start(failures: usize) -> Self {
        let key = rcgen::generate_simple_self_signed(["127.0.0.1".to_string()]).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let private = rustls::pki_types::PrivateKeyDer::try_from(key.signing_key.serialize_der());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![key.cert.der().clone()], private.unwrap())
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let got = Arc::new(Mutex::new(vec![]));
        let failures = Arc::new(AtomicUsize::new(failures));
        let mut tasks = JoinSet::new();
        let (kept, left) = (got.clone(), failures.clone());
        tasks.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, kept, left) = (acceptor.clone(), kept.clone(), left.clone());
                // A caller that is killed in the middle is no error of ours.
                open.spawn(
                    async move { serve(stream, acceptor, &kept, &left).await.unwrap_or(()) },
                );
                while open.try_join_next().is_some() {}
            }
        });
        Self { addr, ca_pem: key.cert.pem(), got, failures, _tasks: tasks }
    }

    /// All that came so far.
    pub fn got(&self) -> Vec<Received> {
        self.got.lock().unwrap().clone()
    }

    /// Fails so many requests more.
    pub fn fail(&self, times: usize) {
        self.failures.fetch_add(times, Ordering::SeqCst);
    }
}

async fn serve(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    got: &Mutex<Vec<Received>>,
    failures: &AtomicUsize,
) -> std::io::Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    let mut read = vec![];
    let end = loop {
        if let Some(end) = read.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut read).await? == 0 {
            return Ok(());
        }
    };
    let head = String::from_utf8_lossy(&read[..end]).into_owned();
    let headers: BTreeMap<_, _> = head
        .lines()
        .skip(1)
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_string()))
        .collect();
    let length: usize = headers["content-length"].parse().unwrap();
    let mut body = read.split_off(end);
    while body.len() < length {
        if stream.read_buf(&mut body).await? == 0 {
            return Ok(());
        }
    }
    let fails =
        failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
    let answered = if fails.is_ok() { 503 } else { 204 };
    got.lock().unwrap().push(Received { headers, body, answered });
    let answer = format!("HTTP/1.1 {answered} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}
