//! What every database must do: functions over its URL, each of which wants an empty database.

mod access;
mod copies;
mod events;
mod jobs;
mod outbox;
mod queue;
mod records;
mod together;
mod trust;

use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) use access::*;
pub(crate) use copies::*;
pub(crate) use events::*;
pub(crate) use jobs::*;
pub(crate) use outbox::*;
pub(crate) use queue::*;
pub(crate) use records::*;
use shoal_proto::{AppName, ArtifactId, CommitSha, EncodingId, RegionName, state::Priority};
use shoal_queue::{Actor, AppRow, Ask, Backoff, Claimant, Job, Lease, Queue, Stored};
pub(crate) use together::*;
pub(crate) use trust::*;

pub(crate) fn actor() -> Actor {
    Actor { name: "alice".into(), origin: "127.0.0.1".into(), request: None }
}

pub(crate) fn name(app: &str) -> AppName {
    app.parse().unwrap()
}

pub(crate) fn regions(names: &[&str]) -> Vec<RegionName> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

pub(crate) async fn app(queue: &Queue, app: &str) {
    let row = AppRow { name: name(app), spec: "{}".into() };
    queue.set_app(&row, &actor(), 0).await.unwrap();
}

/// A commit that nobody asked for before.
pub(crate) fn commit() -> CommitSha {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("0123456789ab{number:028x}").parse().unwrap()
}

/// An ordinary build of a commit of its own, started twice at most.
pub(crate) fn ask(app: &str) -> Ask {
    Ask { app: name(app), commit: commit(), priority: Priority::Normal, max_attempts: 2 }
}

pub(crate) async fn submit(queue: &Queue, app: &str, now_ms: i64) -> Job {
    queue.submit(&ask(app), &actor(), now_ms).await.unwrap().job
}

/// A database with an artifact that may be deployed.
pub(crate) async fn deployable(url: &str) -> Queue {
    records::ready(url, &["web/a"]).await
}

/// Changes of several kinds, each with its audit row.
pub(crate) async fn change_this_and_that(queue: &Queue) {
    submit(queue, "web", 1).await;
    records::deploy(queue, "web", &records::named("web/a")).await.unwrap();
    queue.pause(Some("why"), &actor(), 3).await.unwrap();
}

/// Ten, twenty, at most thirty milliseconds.
pub(crate) const BACKOFF: Backoff = Backoff { first_ms: 10, max_ms: 30, random: 0.0 };

fn token() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("token-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

pub(crate) async fn claim(queue: &Queue, now_ms: i64) -> Option<(Job, Lease)> {
    let worker = Claimant { worker: "w1".into(), host: "host".into(), incarnation: "first".into() };
    let token = token();
    let job = queue.claim(&worker, &token, now_ms).await.unwrap()?;
    let lease = Lease { attempt: job.attempt, token };
    Some((job, lease))
}

pub(crate) fn stored(seed: u8) -> Stored {
    Stored {
        artifact: ArtifactId([seed; 32]),
        encoding: EncodingId([seed ^ 0x80; 32]),
        size_bytes: 10_000_000_000,
        encoded_bytes: 4_000_000_000,
        piece_size_bytes: 4 << 20,
        pieces: 2_385,
    }
}
