//! Bells: what one coordinator did wakes those who wait at another one.
//!
//! PostgreSQL's NOTIFY carries them. It is sent after the change's own commit, by itself: within the change, the
//! server would put all commits that notify in one line, and none of them could share a sync. A bell that is lost
//! (a coordinator that died in between, a connection that broke) costs the time until the next look, so nothing
//! relies on it. On SQLite there is nobody else to wake.

use std::{
    sync::atomic::{AtomicU8, AtomicU32, Ordering},
    time::Duration,
};

use sqlx::{Connection as _, PgConnection, Row as _, postgres::PgListener};
use tokio::sync::Notify;

use crate::{db::Queue, dialect::Dialect, error::Result};

/// The channel of NOTIFY. Databases on one server do not hear each other.
const CHANNEL: &str = "shoal";

/// Bells that ring within this time of each other are one: at most 100 messages a second.
const GATHER: Duration = Duration::from_millis(10);

/// How long after a failure it is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// Something that others may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bell {
    /// A job waits.
    Jobs,
    /// A copy waits.
    Copies,
    /// The cursor of the goals moved.
    Goals,
    /// Something happened that may end a rollout.
    Rollouts,
    /// A job that runs is to be stopped.
    Cancels,
    /// Something happened that is told, or was numbered to be told.
    Events,
    /// Objects are to be removed, or inspected at once.
    Upkeep,
}

impl Bell {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Jobs,
        Self::Copies,
        Self::Goals,
        Self::Rollouts,
        Self::Cancels,
        Self::Events,
        Self::Upkeep,
    ];

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// The bells that are to be rung at the other coordinators.
#[derive(Default)]
pub(crate) struct Bells {
    rung: AtomicU8,
    wake: Notify,
    /// The server's process that sends ours: what it sends was heard here before.
    sender: AtomicU32,
}

impl Queue {
    /// Rings a bell at the other coordinators, soon.
    pub fn ring(&self, bell: Bell) {
        if self.dialect() == Dialect::Postgres {
            self.bells().rung.fetch_or(bell.bit(), Ordering::AcqRel);
            self.bells().wake.notify_one();
        }
    }

    /// Carries bells to the other coordinators, and calls `heard` for each that they ring. Runs until it is dropped. While the database is away nothing is heard; when it is back, everything
    /// rings.
    pub async fn carry_bells(&self, heard: impl Fn(Bell)) {
        match self.dialect() {
            Dialect::Sqlite => std::future::pending().await,
            Dialect::Postgres => {
                tokio::join!(self.ring_others(), self.hear_others(heard));
            }
        }
    }

    async fn ring_others(&self) {
        loop {
            // Whatever ends a connection, the next one follows; what could not be sent is found by looking.
            let _ = self.ring_by_one_connection().await;
            // The next process of that number may be another coordinator's.
            self.bells().sender.store(0, Ordering::Release);
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }

    async fn ring_by_one_connection(&self) -> Result<()> {
        let mut connection = PgConnection::connect(self.url()).await?;
        let row = sqlx::query("SELECT pg_backend_pid()").fetch_one(&mut connection).await?;
        let sender = row.try_get::<i32, _>(0)?.cast_unsigned();
        self.bells().sender.store(sender, Ordering::Release);
        loop {
            self.bells().wake.notified().await;
            tokio::time::sleep(GATHER).await;
            let rung = self.bells().rung.swap(0, Ordering::AcqRel);
            sqlx::query("SELECT pg_notify($1, $2)")
                .bind(CHANNEL)
                .bind(rung.to_string())
                .execute(&mut connection)
                .await?;
        }
    }

    async fn hear_others(&self, heard: impl Fn(Bell)) {
        loop {
            let _ = self.hear_by_one_listener(&heard).await;
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }

    async fn hear_by_one_listener(&self, heard: &impl Fn(Bell)) -> Result<()> {
        let mut listener = PgListener::connect(self.url()).await?;
        listener.listen(CHANNEL).await?;
        loop {
            // What was missed until now may be anything.
            Bell::ALL.into_iter().for_each(heard);
            while let Some(message) = listener.try_recv().await? {
                if message.process_id() == self.bells().sender.load(Ordering::Acquire) {
                    continue;
                }
                // Another release's message is no number, or has more bells: not ours.
                let rung: u8 = message.payload().parse().unwrap_or_default();
                Bell::ALL.into_iter().filter(|bell| rung & bell.bit() != 0).for_each(heard);
            }
        }
    }
}
