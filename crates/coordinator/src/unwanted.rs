//! The rest of a body that is refused.

use std::time::Duration;

use axum::body::Bytes;
use futures::{Stream, StreamExt as _};

/// How long it is read: 64 MiB at 18 Mbit/s.
const READ_MAX: Duration = Duration::from_secs(30);

/// Reads what is not wanted: the answer is lost with a connection that is closed on a sender. Whoever sends on for
/// longer gets one that is.
pub(crate) async fn drain<E>(body: impl Stream<Item = Result<Bytes, E>>) {
    let rest = body.take_while(|read| std::future::ready(read.is_ok())).count();
    let _ = tokio::time::timeout(READ_MAX, rest).await;
}
