//! How far rollouts' waves are open, as region processes tell, and rollouts that are paused.

use std::collections::BTreeMap;

use shoal_proto::{AppName, MachineName, RegionName, Revision, state::RolloutStatus};
use sqlx::AnyConnection;

use crate::{
    audit::{self, Actor},
    db::{self, Queue, Write, count, get, number, parsed},
    error::{QueueError, Result},
    events::{self, EventKind},
    rollouts::{self, Rollout},
};

/// A region process lets more of its machines activate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaveSeen {
    /// The app.
    pub app: AppName,
    /// The goal's revision.
    pub revision: Revision,
    /// Machines of a rank below this may activate, in thousandths.
    pub open_permille: u16,
    /// When it opened, by the coordinator's clock.
    pub opened_at_ms: i64,
}

/// How far a goal's waves are open in each region: as far as the region process that is least far.
pub(crate) async fn open_in(
    connection: &mut AnyConnection,
    app: &AppName,
    revision: Revision,
) -> Result<BTreeMap<RegionName, u16>> {
    let rows = sqlx::query(
        "SELECT w.region, MIN(w.open_permille) AS open_permille FROM rollouts r \
         JOIN waves w ON w.rollout = r.id WHERE r.app = $1 AND r.epoch = $2 AND r.number = $3 GROUP BY w.region",
    )
    .bind(app.as_str())
    .bind(i64::from(revision.epoch))
    .bind(count(revision.number))
    .fetch_all(connection)
    .await?;
    rows.iter().map(|row| Ok((parsed(row, "region")?, number(row, "open_permille")?))).collect()
}

/// The same of every rollout that has not ended.
pub(crate) async fn open_in_all(
    connection: &mut AnyConnection,
) -> Result<Vec<(i64, RegionName, u16)>> {
    let rows = sqlx::query(
        "SELECT r.id, w.region, MIN(w.open_permille) AS open_permille FROM rollouts r \
         JOIN waves w ON w.rollout = r.id WHERE r.status IN ('RUNNING', 'PAUSED') \
         GROUP BY r.id, w.region",
    )
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| Ok((get(row, "id")?, parsed(row, "region")?, number(row, "open_permille")?)))
        .collect()
}

/// Keeps that a wave opened; false when that is known, or its rollout has ended.
async fn open(
    tx: &mut Write,
    region: &RegionName,
    process: &MachineName,
    wave: &WaveSeen,
) -> Result<bool> {
    let row = sqlx::query(
        "SELECT id FROM rollouts WHERE app = $1 AND epoch = $2 AND number = $3 \
         AND status IN ('RUNNING', 'PAUSED')",
    )
    .bind(wave.app.as_str())
    .bind(i64::from(wave.revision.epoch))
    .bind(count(wave.revision.number))
    .fetch_optional(&mut **tx)
    .await?;
    let Some(row) = row else { return Ok(false) };
    let rollout: i64 = get(&row, "id")?;
    let done = sqlx::query(
        "INSERT INTO waves (rollout, region, process, open_permille, opened_at) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT (rollout, region, process) DO UPDATE SET open_permille = excluded.open_permille, \
         opened_at = excluded.opened_at WHERE waves.open_permille < excluded.open_permille",
    )
    .bind(rollout)
    .bind(region.as_str())
    .bind(process.as_str())
    .bind(i64::from(wave.open_permille))
    .bind(wave.opened_at_ms)
    .execute(&mut **tx)
    .await?;
    if done.rows_affected() == 0 {
        return Ok(false);
    }
    events::of_wave(tx, rollout, (region, process), wave).await?;
    Ok(true)
}

impl Queue {
    /// Keeps which waves a region process has opened. Returns how many of them were news.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn keep_waves(
        &self,
        region: &RegionName,
        process: &MachineName,
        waves: &[WaveSeen],
    ) -> Result<u64> {
        if waves.is_empty() {
            return Ok(0);
        }
        let mut tx = self.write().await?;
        let mut news = 0;
        for wave in waves {
            news += u64::from(open(&mut tx, region, process, wave).await?);
        }
        tx.commit().await?;
        Ok(news)
    }

    /// Pauses a rollout, so that its regions open no further wave, or lets it go on. Returns it, and whether this call
    /// did so: false when it was so already.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when there is none of that number, [`QueueError::Conflict`] when it has ended.
    pub async fn pause_rollout(
        &self,
        id: i64,
        pause: bool,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<(Rollout, bool)> {
        let mut tx = self.write().await?;
        let sql = if pause {
            "UPDATE rollouts SET status = 'PAUSED', reason = $1, paused_at = $2 \
             WHERE id = $3 AND status = 'RUNNING'"
        } else {
            "UPDATE rollouts SET status = 'RUNNING', reason = $1, paused_ms = paused_ms + $2 - paused_at, \
             paused_at = NULL WHERE id = $3 AND status = 'PAUSED'"
        };
        let reason = pause.then(|| format!("paused by {}", actor.name));
        let done = sqlx::query(sql).bind(reason).bind(now_ms).bind(id).execute(&mut *tx).await?;
        let rollout = rollouts::rollout_in(&mut tx, id).await?;
        if done.rows_affected() == 0 {
            let wanted = if pause { RolloutStatus::Paused } else { RolloutStatus::Running };
            if rollout.status != wanted {
                let text = format!("rollout {id} has ended already: it is {}", rollout.status);
                return Err(QueueError::Conflict(text));
            }
            return Ok((rollout, false));
        }
        // Moves the cursor of the goals, so that waiting regions hear of it.
        db::next(&mut tx, "goal").await?;
        let (what, kind) = match pause {
            true => ("rollout.pause", EventKind::DeployPaused),
            false => ("rollout.resume", EventKind::DeployResumed),
        };
        audit::record(&mut tx, now_ms, actor, what, &format!("{}/{id}", rollout.app), "").await?;
        events::of_rollout(&mut tx, kind, id, now_ms).await?;
        tx.commit().await?;
        Ok((rollout, true))
    }
}
