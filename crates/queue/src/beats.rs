//! Heartbeats, many to a commit: whoever gets the writer next carries all that wait.
//!
//! A heartbeat changes one row and is worth nothing by itself, but on SQLite it would sync the disk and hold up the
//! one writer as long as any other change. So each caller lays its own beside the others', and all of them wait for
//! the writer; the first to get it writes them all, and the others are told. PostgreSQL does not sync them: one that a server
//! forgets with its failure is as one that did not come, and after an outage the reaper waits anyway.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::{
    db::{Queue, flag},
    error::{QueueError, Result},
    jobs::Lease,
};

/// How many one transaction carries at most: it holds the writer for some ten milliseconds.
const BATCH_MAX: usize = 500;

/// A heartbeat that waits.
struct Beat {
    job: i64,
    lease: Lease,
    now_ms: i64,
    /// Whether the worker shall stop the job; none when it does not hold it.
    tell: oneshot::Sender<Option<bool>>,
}

/// The heartbeats that wait: at most one a caller.
#[derive(Default)]
pub(crate) struct Beats {
    waiting: Mutex<Vec<Beat>>,
}

impl Beats {
    fn lock(&self) -> MutexGuard<'_, Vec<Beat>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next batch, in the order of the jobs: two batches never wait for each other's rows crosswise.
    fn next(&self) -> Vec<Beat> {
        let mut waiting = self.lock();
        let count = waiting.len().min(BATCH_MAX);
        let mut batch: Vec<_> = waiting.drain(..count).collect();
        batch.sort_by_key(|beat| beat.job);
        batch
    }
}

impl Queue {
    /// Keeps a job alive; true when its worker shall stop it.
    ///
    /// # Errors
    /// [`QueueError::LeaseLost`] when the attempt no longer holds the job.
    pub async fn heartbeat(&self, job: i64, lease: &Lease, now_ms: i64) -> Result<bool> {
        loop {
            let (tell, told) = oneshot::channel();
            let lease = lease.clone();
            self.beats().lock().push(Beat { job, lease, now_ms, tell });
            match self.carried(told).await? {
                Ok(Some(cancel)) => return Ok(cancel),
                Ok(None) => return Err(QueueError::LeaseLost { job }),
                // The one who carried it failed or hung up: once more.
                Err(_) => {}
            }
        }
    }

    /// Waits until a heartbeat is carried, by whoever has the writer first.
    async fn carried(
        &self,
        mut told: oneshot::Receiver<Option<bool>>,
    ) -> Result<std::result::Result<Option<bool>, oneshot::error::RecvError>> {
        loop {
            tokio::select! {
                biased;
                told = &mut told => return Ok(told),
                wrote = self.write_beats() => if !wrote? {
                    // Nothing was left: another one has it in hand.
                    return Ok(told.await);
                }
            }
        }
    }

    /// Gets the writer, and writes those that wait then. False: none did.
    async fn write_beats(&self) -> Result<bool> {
        let mut tx = self.write_unsynced().await?;
        let batch = self.beats().next();
        if batch.is_empty() {
            tx.undo().await?;
            return Ok(false);
        }
        let mut answers = Vec::with_capacity(batch.len());
        for beat in batch {
            let kept = sqlx::query(
                "UPDATE jobs SET last_heartbeat = $1 \
                 WHERE id = $2 AND attempt = $3 AND lease = $4 AND status = 'RUNNING' \
                 RETURNING cancel_requested",
            )
            .bind(beat.now_ms)
            .bind(beat.job)
            .bind(i64::from(beat.lease.attempt))
            .bind(beat.lease.token.as_str())
            .fetch_optional(&mut *tx)
            .await?;
            let cancel = kept.as_ref().map(|row| flag(row, "cancel_requested")).transpose()?;
            answers.push((beat.tell, cancel));
        }
        tx.commit().await?;
        for (tell, cancel) in answers {
            // Who has hung up needs no answer.
            let _ = tell.send(cancel);
        }
        Ok(true)
    }
}
