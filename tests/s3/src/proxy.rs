//! A proxy that lies: it passes requests on to a server, and changes what comes back.

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
};

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Frame, Incoming, SizeHint},
    client, header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::{Server, files::on_disk};

/// What the proxy does to a request or to its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// 503 SlowDown; the server hears nothing of it.
    SlowDown,
    /// 501 NotImplemented; the server hears nothing of it.
    NotImplemented,
    /// Hangs up without an answer; the server hears nothing of it.
    HangUp,
    /// Answers nothing, for as long as the asker waits; the server hears nothing of it.
    Hang,
    /// Hangs up without an answer, after the server has done it.
    HangUpAfter,
    /// Gives the whole object, and says 200.
    Whole,
    /// Says 206 and the right range, and gives the bytes one further on.
    Shifted,
    /// Says 206 and the range one further on, with its bytes.
    OtherRange,
    /// Ends the body in good order after half of it.
    Short,
    /// The same, and the head does not say how long it is.
    ShortUntold,
    /// Hangs up in the middle of the body.
    BrokenOff,
    /// Turns a bit of the request's body.
    CorruptUpload,
    /// Turns a bit of the answer's body.
    CorruptAnswer,
}

/// For which requests a fault is meant.
type Wanted = Box<dyn Fn(&Method, &str) -> bool + Send>;

/// The faults to come.
type Faults = Arc<Mutex<VecDeque<(Wanted, Fault)>>>;

type Failed = anyhow::Error;

/// What a proxy stands in front of.
#[derive(Clone)]
struct Target {
    addr: SocketAddr,
    dir: PathBuf,
}

/// A running proxy.
pub struct Proxy {
    addr: SocketAddr,
    faults: Faults,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Proxy {
    /// Starts one in front of a server.
    ///
    /// # Errors
    /// When there is no free port.
    pub fn start(server: &Server) -> anyhow::Result<Self> {
        let target = Target { addr: server.addr(), dir: server.dir().into() };
        let runtime = crate::runtime("s3-proxy")?;
        let (listener, addr) = crate::listen(&runtime, crate::ANY)?;
        let faults = Faults::default();
        let told = faults.clone();
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, target.clone(), told.clone()));
            }
        });
        Ok(Self { addr, faults, runtime: Some(runtime) })
    }

    /// Its address, for `AWS_ENDPOINT_URL`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Has the next `times` requests that `wanted` accepts (by method, and path with query) go wrong so.
    pub fn next(
        &self,
        times: usize,
        fault: Fault,
        wanted: impl Fn(&Method, &str) -> bool + Clone + Send + 'static,
    ) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..times {
            faults.push_back((Box::new(wanted.clone()), fault));
        }
    }

    /// How many faults have not come about yet.
    #[must_use]
    pub fn left(&self) -> usize {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Forgets the faults that have not come about.
    pub fn behave(&self) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Takes the first fault that is meant for a request.
fn take(faults: &Faults, request: &Request<Incoming>) -> Option<Fault> {
    let path = request.uri().path_and_query().map_or("", |path| path.as_str());
    let mut faults = faults.lock().unwrap_or_else(PoisonError::into_inner);
    let at = faults.iter().position(|(wanted, _)| wanted(request.method(), path))?;
    Some(faults.remove(at)?.1)
}

async fn serve(stream: TcpStream, server: Target, faults: Faults) {
    let answer = |request: Request<Incoming>| {
        let (fault, server) = (take(&faults, &request), server.clone());
        async move { pass(request, &server, fault).await }
    };
    // An error is the end of the connection, and the asker sees it.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)).await;
}

type Answer = Response<BoxBody<Bytes, Failed>>;

fn refusal(status: StatusCode, code: &str, message: &str) -> Answer {
    let xml = format!(
        "<?xml version=\"1.0\"?>\n<Error><Code>{code}</Code>\n<Message>{message}</Message></Error>"
    );
    let mut answer =
        Response::new(Full::from(xml).map_err(|never: Infallible| match never {}).boxed());
    *answer.status_mut() = status;
    answer
}

async fn pass(
    request: Request<Incoming>,
    server: &Target,
    fault: Option<Fault>,
) -> Result<Answer, Failed> {
    match fault {
        Some(Fault::SlowDown) => {
            return Ok(refusal(
                StatusCode::SERVICE_UNAVAILABLE,
                "SlowDown",
                "Please reduce your request rate.",
            ));
        }
        Some(Fault::NotImplemented) => {
            let message = "A header you provided implies functionality that is not implemented.";
            return Ok(refusal(StatusCode::NOT_IMPLEMENTED, "NotImplemented", message));
        }
        Some(Fault::Hang) => return std::future::pending().await,
        Some(Fault::HangUp) => return Err(anyhow!("hung up")),
        _ => {}
    }
    let asked = request.headers().get(header::RANGE).cloned();
    let path = request.uri().path().trim_start_matches('/').to_string();
    let answer = forward(request, server.addr, fault == Some(Fault::CorruptUpload)).await?;
    let (mut head, body) = answer.into_parts();
    match fault {
        Some(Fault::HangUpAfter) => {
            body.collect().await?;
            Err(anyhow!("hung up"))
        }
        Some(Fault::CorruptAnswer) => {
            let mut bytes = body.collect().await?.to_bytes().to_vec();
            if let Some(byte) = bytes.first_mut() {
                *byte ^= 1;
            }
            Ok(Response::from_parts(head, whole(bytes)))
        }
        Some(Fault::Whole) => {
            let all = tokio::fs::read(server.dir.join(on_disk(&path))).await?;
            head.status = StatusCode::OK;
            head.headers.remove(header::CONTENT_RANGE);
            head.headers.insert(header::CONTENT_LENGTH, all.len().into());
            Ok(Response::from_parts(head, whole(all)))
        }
        Some(Fault::Shifted | Fault::OtherRange) => {
            // The range is part of the signature: the bytes beside it come from the disk.
            let all = Bytes::from(tokio::fs::read(server.dir.join(on_disk(&path))).await?);
            let (first, last) = range(asked.as_ref()).context("no range was asked for")?;
            let told =
                if fault == Some(Fault::Shifted) { first..=last } else { first + 1..=last + 1 };
            let given = all.slice(first + 1..last + 2);
            head.status = StatusCode::PARTIAL_CONTENT;
            let (first, last) = (told.start(), told.end());
            let content_range = format!("bytes {first}-{last}/{}", all.len());
            head.headers.insert(header::CONTENT_RANGE, content_range.parse()?);
            head.headers.insert(header::CONTENT_LENGTH, given.len().into());
            Ok(Response::from_parts(head, whole(given)))
        }
        Some(Fault::Short) => {
            let all = body.collect().await?.to_bytes();
            head.headers.insert(header::CONTENT_LENGTH, (all.len() / 2).into());
            Ok(Response::from_parts(head, whole(all.slice(..all.len() / 2))))
        }
        Some(Fault::BrokenOff | Fault::ShortUntold) => {
            let all = body.collect().await?.to_bytes();
            let promised = (fault == Some(Fault::BrokenOff)).then_some(all.len() as u64);
            if promised.is_none() {
                head.headers.remove(header::CONTENT_LENGTH);
            }
            let half = Half { half: Some(all.slice(..all.len() / 2)), promised };
            Ok(Response::from_parts(head, half.boxed()))
        }
        _ => Ok(Response::from_parts(head, body.map_err(Failed::from).boxed())),
    }
}

fn whole(bytes: impl Into<Bytes>) -> BoxBody<Bytes, Failed> {
    Full::new(bytes.into()).map_err(|never: Infallible| match never {}).boxed()
}

/// `bytes=FIRST-LAST`.
fn range(header: Option<&header::HeaderValue>) -> Option<(usize, usize)> {
    let (first, last) = header?.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

/// Sends a request on, on a connection of its own.
async fn forward(
    request: Request<Incoming>,
    server: SocketAddr,
    corrupt: bool,
) -> Result<Response<Incoming>, Failed> {
    let stream = TcpStream::connect(server).await?;
    let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let (head, body) = request.into_parts();
    let body: BoxBody<Bytes, Failed> = if corrupt {
        let mut bytes = body.collect().await?.to_bytes().to_vec();
        if let Some(byte) = bytes.first_mut() {
            *byte ^= 1;
        }
        whole(bytes)
    } else {
        body.map_err(Failed::from).boxed()
    };
    Ok(sender.send_request(Request::from_parts(head, body)).await?)
}

/// Half of a body. If more was promised, an error follows, at which the connection is ended.
struct Half {
    half: Option<Bytes>,
    /// In bytes.
    promised: Option<u64>,
}

impl Body for Half {
    type Data = Bytes;
    type Error = Failed;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Failed>>> {
        Poll::Ready(match self.half.take() {
            Some(half) => Some(Ok(Frame::data(half))),
            None => self.promised.map(|_| Err(anyhow!("hung up"))),
        })
    }

    fn size_hint(&self) -> SizeHint {
        self.promised.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
