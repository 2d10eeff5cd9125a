//! Where a machine or a container asks for the keys of its role: what an instance of EC2 answers (IMDSv2), and what
//! the agent beside a container does.

use std::{convert::Infallible, net::SocketAddr};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;

use crate::Key;

/// What a container shows to get its keys.
pub const CONTAINER_TOKEN: &str = "container-token";

/// What an instance is told to show.
const INSTANCE_TOKEN: &str = "instance-token";

const ROLE: &str = "/latest/meta-data/iam/security-credentials/";

/// A running service; it ends when it is dropped.
pub struct Roles {
    addr: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Roles {
    /// Starts one that gives out this key.
    ///
    /// # Errors
    /// When there is no free port.
    pub fn start(key: Key) -> anyhow::Result<Self> {
        let runtime = crate::runtime("roles")?;
        let (listener, addr) = crate::listen(&runtime, crate::ANY)?;
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let answer =
                    move |request| async move { Ok::<_, Infallible>(answer(&request, key)) };
                let connection = http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service_fn(answer));
                tokio::spawn(connection);
            }
        });
        Ok(Self { addr, runtime: Some(runtime) })
    }

    /// Its address.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }
}

impl Drop for Roles {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn answer(request: &Request<Incoming>, (key, secret): Key) -> Response<Full<Bytes>> {
    let shows = |header: &str, token: &str| {
        request.headers().get(header).is_some_and(|shown| shown.as_bytes() == token.as_bytes())
    };
    let keys = || {
        format!(
            r#"{{"Code":"Success","Type":"AWS-HMAC","AccessKeyId":"{key}","SecretAccessKey":"{secret}",
                "Token":"session","Expiration":"2999-01-01T00:00:00Z"}}"#
        )
    };
    let (method, path) = (request.method(), request.uri().path());
    let instance = shows("x-aws-ec2-metadata-token", INSTANCE_TOKEN);
    let text = match path {
        "/latest/api/token" if *method == Method::PUT => Some(INSTANCE_TOKEN.into()),
        ROLE if instance => Some("shoal".into()),
        "/container" if shows("authorization", CONTAINER_TOKEN) => Some(keys()),
        _ if instance && path.strip_prefix(ROLE) == Some("shoal") => Some(keys()),
        _ => None,
    };
    let status = if text.is_some() { StatusCode::OK } else { StatusCode::UNAUTHORIZED };
    let mut answer = Response::new(Full::from(text.unwrap_or_default()));
    *answer.status_mut() = status;
    answer
}
