//! What happened: events get their numbers, and old ones are forgotten, by the coordinator on duty; any coordinator
//! streams them.

use std::{sync::Arc, time::Duration};

use axum::body::Bytes;
use futures::Stream;
use shoal_client::types;
use shoal_queue::{Bell, Event, EventFilter, QueueError};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;

use crate::state::{Shared, bell, ms, now_ms, seconds};

/// How often it is looked for events without numbers when nobody rings.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Events that come within this time of each other are numbered together.
const GATHER: Duration = Duration::from_millis(10);

/// How often old events are forgotten, at most.
const FORGET_INTERVAL_MAX: Duration = Duration::from_secs(600);

/// How many streams a coordinator serves at once.
pub(crate) const STREAMS_MAX: usize = 64;

/// How many events wait for a stream's reader.
const STREAM_BUFFER: usize = 256;

/// How many events are read for a stream at once.
const STREAM_PAGE: u32 = 200;

/// How long a stream rests between two looks at least: many streams never take over the database.
const STREAM_REST: Duration = Duration::from_millis(100);

/// How often a stream says that it is there.
const STREAM_BEAT: Duration = Duration::from_secs(15);

/// Gives numbers to events until it is stopped.
pub(crate) async fn number(shared: Arc<Shared>, stop: CancellationToken) {
    loop {
        // Before the look: what happens meanwhile is not waited for.
        let bell = bell(&shared.happened);
        let wait = match shared.queue.number_events().await {
            Ok(0) => LOOK_AGAIN,
            Ok(numbered) => {
                shared.metrics.events.inc_by(u64::from(numbered));
                shared.ring(Bell::Events);
                // There may be more.
                GATHER
            }
            Err(error) => {
                tracing::warn!(%error, "events cannot be numbered; it is tried again");
                shared.metrics.task_failures.with_label_values(&["events"]).inc();
                LOOK_AGAIN
            }
        };
        tokio::select! {
            () = async { bell.await; tokio::time::sleep(GATHER).await } => {}
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Forgets old events, deliveries and history until it is stopped.
pub(crate) async fn forget(shared: Arc<Shared>, stop: CancellationToken) {
    let config = &shared.config;
    let shortest = config.events.keep_s.min(config.webhooks.keep_s);
    let shortest = shortest.min(config.history_keep_s.unwrap_or(shortest));
    let interval = FORGET_INTERVAL_MAX.min(seconds(shortest) / 2);
    loop {
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = stop.cancelled() => return,
        }
        if let Err(error) = forget_once(&shared).await {
            tracing::warn!(%error, "old events cannot be forgotten");
            shared.metrics.task_failures.with_label_values(&["forget events"]).inc();
        }
    }
}

async fn forget_once(shared: &Shared) -> Result<(), QueueError> {
    let (config, now_ms) = (&shared.config, now_ms());
    let before = |keep_s: f64| now_ms - ms(seconds(keep_s));
    let keep_max = i64::from(config.events.keep_max);
    let events = shared.queue.forget_events(before(config.events.keep_s), keep_max).await?;
    let deliveries = shared.queue.forget_deliveries(before(config.webhooks.keep_s)).await?;
    let jobs = match config.history_keep_s {
        Some(keep_s) => shared.queue.forget_history(before(keep_s)).await?,
        None => 0,
    };
    if events + deliveries + jobs > 0 {
        tracing::info!(events, deliveries, jobs, "what was kept for long enough was forgotten");
    }
    Ok(())
}

/// A frame of a stream: an event.
fn frame(event: Event) -> Bytes {
    let (id, kind) = (event.seq, event.kind.as_str());
    // Never an error: there is no map with keys that are no text.
    let data = serde_json::to_string(&told(event)).unwrap_or_default();
    format!("id: {id}\nevent: {kind}\ndata: {data}\n\n").into()
}

/// A frame that says something of the stream itself; it has no id, so the last one stays the reader's.
fn notice(name: &str, data: &serde_json::Value) -> Bytes {
    format!("event: stream:{name}\ndata: {data}\n\n").into()
}

/// A stream to be.
pub(crate) struct Follow {
    pub(crate) filter: EventFilter,
    /// After this event; none: from now on.
    pub(crate) after: Option<i64>,
}

/// Streams events, from a place among the streams, until the reader hangs up, is too slow, or the coordinator stops.
///
/// # Errors
/// [`QueueError`] when the database fails before it begins.
pub(crate) async fn stream(
    shared: Arc<Shared>,
    follow: Follow,
    place: OwnedSemaphorePermit,
) -> Result<impl Stream<Item = Result<Bytes, std::convert::Infallible>> + use<>, QueueError> {
    let (frames, reader) = mpsc::channel(STREAM_BUFFER + 1);
    let head = shared.queue.events_cursor().await?;
    let mut cursor = follow.after.unwrap_or(head);
    let oldest = shared.queue.oldest_event().await?.unwrap_or(head + 1);
    // The first bytes come at once: a reader knows that it listens.
    let mut first = vec![Bytes::from_static(b": welcome\n\n")];
    if cursor > head || cursor + 1 < oldest {
        // Forgotten, or the database was restored from a backup that lacks them.
        let data = serde_json::json!({ "after": cursor, "oldest": oldest, "newest": head });
        first.push(notice("gap", &data));
        cursor = cursor.min(head).max(oldest - 1);
    }
    for bytes in first {
        // There is room.
        let _ = frames.try_send(bytes);
    }
    tokio::spawn(async move {
        pump(&shared, &follow, cursor, frames).await;
        drop(place);
    });
    Ok(futures::stream::unfold(reader, |mut reader| async {
        reader.recv().await.map(|bytes| (Ok(bytes), reader))
    }))
}

/// Why a stream ends.
enum End {
    /// Its reader has gone, or the coordinator goes.
    Quiet,
    Slow,
}

async fn pump(shared: &Shared, follow: &Follow, mut cursor: i64, frames: mpsc::Sender<Bytes>) {
    // Kept for the last word to a reader that takes nothing.
    let Ok(last) = frames.clone().reserve_owned().await else { return };
    if let End::Slow = feed(shared, follow, &mut cursor, &frames).await {
        shared.metrics.streams_dropped.inc();
        let data = serde_json::json!({
            "after": cursor,
            "message": "you read too slowly; go on with Last-Event-ID",
        });
        last.send(notice("slow", &data));
    }
}

async fn feed(
    shared: &Shared,
    follow: &Follow,
    cursor: &mut i64,
    frames: &mpsc::Sender<Bytes>,
) -> End {
    let slow = seconds(shared.config.events.slow_s);
    let mut beat = tokio::time::Instant::now() + STREAM_BEAT;
    loop {
        let bell = bell(&shared.events_moved);
        // First the head: what comes after it is not passed over.
        let page = async {
            let head = shared.queue.events_cursor().await?;
            let page = shared.queue.events_after(*cursor, &follow.filter, STREAM_PAGE).await?;
            Ok::<_, QueueError>((head, page))
        };
        let is_full = match page.await {
            Ok((head, page)) => {
                let is_full = page.len() == STREAM_PAGE as usize;
                for event in page {
                    let seq = event.seq;
                    match frames.send_timeout(frame(event), slow).await {
                        Ok(()) => *cursor = seq,
                        Err(mpsc::error::SendTimeoutError::Timeout(_)) => return End::Slow,
                        Err(mpsc::error::SendTimeoutError::Closed(_)) => return End::Quiet,
                    }
                }
                if !is_full {
                    *cursor = (*cursor).max(head);
                }
                is_full
            }
            Err(error) => {
                tracing::warn!(%error, "a stream of events waits for the database");
                false
            }
        };
        if is_full {
            continue;
        }
        tokio::select! {
            () = async { tokio::time::sleep(STREAM_REST).await; bell.await } => {}
            () = tokio::time::sleep(seconds(shared.config.look_again_s)) => {}
            () = tokio::time::sleep_until(beat) => {
                beat = tokio::time::Instant::now() + STREAM_BEAT;
                // A full buffer shows that it is there as well.
                let _ = frames.try_send(Bytes::from_static(b": here\n\n"));
            }
            () = frames.closed() => return End::Quiet,
            () = shared.stop.cancelled() => return End::Quiet,
        }
    }
}

/// An event as the API tells it.
pub(crate) fn told(event: Event) -> types::Event {
    types::Event {
        id: event.seq,
        kind: event.kind.as_str().into(),
        at_ms: event.at_ms,
        app: event.app,
        job: event.job,
        attempt: event.attempt,
        rollout: event.rollout,
        name: event.name,
        commit: event.commit,
        status: event.status,
        reason: event.reason,
        requested_by: event.requested_by,
        worker: event.worker,
        region: event.region,
        open_permille: event.open_permille,
    }
}
