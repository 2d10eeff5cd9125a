//! What is left of a request's body when the request was refused: it is read, because an answer is lost with a connection
//! that is closed on a sender.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    body::{Body, BodyDataStream, HttpBody as _},
    extract::Request,
    http::header,
    middleware::Next,
    response::Response,
};
use futures::{
    StreamExt as _,
    stream::{self, Stream},
};

use crate::state::lock;

/// How long it is read: 64 MiB at 18 Mbit/s. Whoever sends on for longer gets a closed connection.
const READ_MAX: Duration = Duration::from_secs(30);

/// A body that is lent to a handler.
struct Lent {
    body: BodyDataStream,
    /// The handler has asked for some of it.
    is_begun: bool,
}

fn read(lent: Arc<Mutex<Lent>>) -> impl Stream<Item = <BodyDataStream as Stream>::Item> {
    stream::poll_fn(move |cx| {
        let mut lent = lock(&lent);
        lent.is_begun = true;
        lent.body.poll_next_unpin(cx)
    })
}

/// Reads what a refused request still sends.
pub(crate) async fn drain(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    if body.is_end_stream() {
        return next.run(Request::from_parts(parts, body)).await;
    }
    // Who waits to be asked for the body sends none before.
    let is_asked_first = parts.headers.contains_key(header::EXPECT);
    let lent = Lent { body: body.into_data_stream(), is_begun: false };
    let lent = Arc::new(Mutex::new(lent));
    let body = Body::from_stream(read(lent.clone()));
    let response = next.run(Request::from_parts(parts, body)).await;
    let status = response.status();
    if (status.is_client_error() || status.is_server_error())
        && (!is_asked_first || lock(&lent).is_begun)
    {
        let rest = read(lent).take_while(|read| std::future::ready(read.is_ok())).count();
        let _ = tokio::time::timeout(READ_MAX, rest).await;
    }
    response
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use axum::{Router, body::Bytes, http::StatusCode, middleware, routing::post};
    use tower::ServiceExt as _;

    use super::*;

    /// The answer to a request with a body of three chunks, and how many of them were read.
    async fn chunks_read(path: &str, expect: bool) -> (StatusCode, usize) {
        let read = Arc::new(AtomicUsize::new(0));
        let counted = read.clone();
        let chunks = stream::iter(0..3).map(move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
            Ok::<_, Infallible>(Bytes::from_static(b"x"))
        });
        let router = Router::new()
            .route("/refused", post(|| async { StatusCode::UNAUTHORIZED }))
            .route("/taken", post(|body: Bytes| async move { format!("{}", body.len()) }))
            .route(
                "/half",
                post(|body: Body| async move {
                    body.into_data_stream().next().await;
                    StatusCode::BAD_REQUEST
                }),
            )
            .layer(middleware::from_fn(drain));
        let mut request = Request::post(path);
        if expect {
            request = request.header(header::EXPECT, "100-continue");
        }
        let request = request.body(Body::from_stream(chunks)).unwrap();
        let response = router.oneshot(request).await.unwrap();
        (response.status(), read.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn what_a_refused_request_sends_is_read_unless_it_waits_to_be_asked() {
        assert_eq!(chunks_read("/refused", false).await, (StatusCode::UNAUTHORIZED, 3));
        assert_eq!(chunks_read("/refused", true).await, (StatusCode::UNAUTHORIZED, 0));
        assert_eq!(chunks_read("/none", false).await, (StatusCode::NOT_FOUND, 3));
        // Who was asked for it sends on.
        assert_eq!(chunks_read("/half", true).await, (StatusCode::BAD_REQUEST, 3));
        assert_eq!(chunks_read("/taken", false).await, (StatusCode::OK, 3));
    }
}
