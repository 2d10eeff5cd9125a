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
