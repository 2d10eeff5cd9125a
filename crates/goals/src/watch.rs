//! Following the goals in etcd: its watch tells at once, a poll every few seconds makes it certain.

use std::time::Duration;

use bytes::BytesMut;
use tokio::time::{Instant, sleep_until};

use crate::{
    Changes, Cursor, Entry, EtcdStore, GoalStore as _, GoalWatch, GoalsError, Result,
    api::{Blob, Long, WatchCreate, WatchLine, WatchRequest, WatchResponse},
    client::ANSWER_MAX_BYTES,
};

/// How long to wait before a stream that broke is opened again; doubled up to the time between polls.
const REOPEN_MIN: Duration = Duration::from_millis(100);

/// When a watch asks by itself.
#[derive(Debug, Clone, Copy)]
pub struct WatchTimes {
    /// How often it asks for what has changed: a stream may hang without a word.
    pub poll: Duration,
    /// How often it asks for everything: an etcd that was restored from a backup looks like itself.
    pub relist: Duration,
}

/// Follows the goals in etcd.
pub struct EtcdWatch {
    store: EtcdStore,
    times: WatchTimes,
    after: Option<Cursor>,
    stream: Option<Stream>,
    reopen: Duration,
    reopen_at: Instant,
    poll_at: Instant,
    relist_at: Instant,
}

/// What a stream brought.
enum Told {
    /// Goals, up to a revision of etcd.
    Changes(u64, Vec<Entry>),
    /// What was asked for is compacted away.
    Compacted,
}

struct Stream {
    response: reqwest::Response,
    buffer: BytesMut,
    /// The goals of an answer whose end has not come yet.
    pending: Vec<Entry>,
}

impl Stream {
    async fn open(store: &EtcdStore, after: Cursor) -> Result<Self> {
        let create_request = WatchCreate {
            key: Blob::from(store.prefix()),
            range_end: store.end(),
            start_revision: Long(after.revision + 1),
            // Nobody takes a goal back: a key that is deleted says nothing.
            filters: ["NODELETE"],
            progress_notify: true,
            fragment: true,
        };
        let response = store.client().open("watch", &WatchRequest { create_request }).await?;
        Ok(Self { response, buffer: BytesMut::new(), pending: Vec::new() })
    }

    fn broken(store: &EtcdStore, reason: impl Into<String>) -> GoalsError {
        let endpoint = store.client().endpoint().into();
        GoalsError::Unreachable { endpoint, reason: reason.into() }
    }

    /// A whole line, as soon as there is one. Nothing is lost when this is given up in between.
    async fn line(&mut self, store: &EtcdStore) -> Result<BytesMut> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                return Ok(self.buffer.split_to(end + 1));
            }
            if self.buffer.len() > ANSWER_MAX_BYTES {
                return Err(Self::broken(store, "a line of a watch without an end"));
            }
            match self.response.chunk().await {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk),
                Ok(None) => return Err(Self::broken(store, "the watch ended")),
                Err(error) => {
                    return Err(Self::broken(store, error.without_url().to_string()));
                }
            }
        }
    }

    async fn next(&mut self, store: &EtcdStore) -> Result<Told> {
        loop {
            let line = self.line(store).await?;
            let answer: WatchResponse = match serde_json::from_slice(&line) {
                Ok(WatchLine::Result(answer)) => answer,
                Ok(WatchLine::Error(error)) => return Err(Self::broken(store, error.to_string())),
                Err(error) => return Err(Self::broken(store, error.to_string())),
            };
            if answer.compact_revision.0 > 0 {
                return Ok(Told::Compacted);
            }
            if answer.canceled {
                return Err(Self::broken(store, answer.cancel_reason));
            }
            if answer.created {
                continue;
            }
            // The newest of an answer's own events: one that catches up may tell of a part, and names etcd's
            // present revision in its header. Without events that is what all is told up to.
            let revision = answer.events.iter().map(|event| event.kv.mod_revision.0).max();
            let revision = revision.unwrap_or(answer.header.revision.0);
            self.pending.extend(answer.events.iter().filter_map(|event| store.entry(&event.kv)));
            if !answer.fragment {
                return Ok(Told::Changes(revision, std::mem::take(&mut self.pending)));
            }
            if self.pending.len() > ANSWER_MAX_BYTES / 1_024 {
                return Err(Self::broken(store, "an answer of a watch without an end"));
            }
        }
    }
}

/// The newest of each app, in the order in which they came.
fn newest(mut entries: Vec<Entry>) -> Vec<Entry> {
    let mut seen = std::collections::BTreeSet::new();
    entries.reverse();
    entries.retain(|entry| seen.insert(entry.app.clone()));
    entries.reverse();
    entries
}

impl EtcdWatch {
    pub(crate) fn new(store: EtcdStore, after: Option<Cursor>, times: WatchTimes) -> Self {
        let now = Instant::now();
        Self {
            store,
            times,
            after,
            stream: None,
            reopen: REOPEN_MIN,
            reopen_at: now,
            poll_at: now + times.poll,
            relist_at: now + times.relist,
        }
    }

    async fn relist(&mut self) -> Result<Changes> {
        let changes = self.store.list().await?;
        self.after = Some(changes.cursor);
        self.relist_at = Instant::now() + self.times.relist;
        self.poll_at = Instant::now() + self.times.poll;
        self.stream = None;
        Ok(changes)
    }

    /// What the stream has missed, if anything.
    async fn poll(&mut self, after: Cursor) -> Result<Option<Changes>> {
        // Put off first: an etcd that does not answer is asked at the caller's pace.
        self.poll_at = Instant::now() + self.times.poll;
        let changes = match self.store.changes(after).await {
            Ok(changes) => changes,
            Err(error) => {
                // The next call asks at once, and its stream is not to be trusted either.
                self.poll_at = Instant::now();
                self.stream = None;
                return Err(error);
            }
        };
        self.after = Some(changes.cursor);
        if !changes.complete && changes.entries.is_empty() {
            // A stream that is opened now need not begin where compaction may have been.
            return Ok(None);
        }
        // The stream should have told: whatever it is, a new one begins here.
        self.stream = None;
        Ok(Some(changes))
    }

    /// Gives the stream up, and opens another one a little later.
    fn stream_failed(&mut self, error: &GoalsError) {
        tracing::debug!(%error, "a watch of etcd broke; it is opened again");
        self.stream = None;
        self.reopen_at = Instant::now() + self.reopen;
        self.reopen = (self.reopen * 2).min(self.times.poll);
        // What came in between is asked for at once.
        self.poll_at = Instant::now() + REOPEN_MIN;
    }
}

impl GoalWatch for EtcdWatch {
    async fn next(&mut self) -> Result<Changes> {
        loop {
            let now = Instant::now();
            let after = match self.after {
                Some(after) if now < self.relist_at => after,
                _ => return self.relist().await,
            };
            if now >= self.poll_at
                && let Some(changes) = self.poll(after).await?
            {
                return Ok(changes);
            }
            if self.stream.is_none() && now >= self.reopen_at {
                match Stream::open(&self.store, after).await {
                    Ok(stream) => self.stream = Some(stream),
                    Err(error) => self.stream_failed(&error),
                }
            }
            let wake = self.poll_at.min(self.relist_at);
            let Some(stream) = &mut self.stream else {
                sleep_until(wake.min(self.reopen_at).max(now)).await;
                continue;
            };
            let told = tokio::select! {
                told = stream.next(&self.store) => told,
                () = sleep_until(wake) => continue,
            };
            match told {
                Ok(Told::Compacted) => return self.relist().await,
                Ok(Told::Changes(revision, entries)) => {
                    self.reopen = REOPEN_MIN;
                    let revision = after.revision.max(revision);
                    let cursor = Cursor { revision, ..after };
                    self.after = Some(cursor);
                    if !entries.is_empty() {
                        let entries = newest(entries);
                        return Ok(Changes { cursor, entries, complete: false });
                    }
                }
                Err(error) => self.stream_failed(&error),
            }
        }
    }
}
