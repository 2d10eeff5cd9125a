//! The outbox: goals that the goal store outside of the database is to be told. Each goes in with its own
//! transaction and leaves when the store has it, so none that was acknowledged is lost on the way.

use std::collections::BTreeMap;

use shoal_proto::{AppName, Revision};

use crate::{
    db::{Queue, Write, get, number, parsed},
    error::Result,
};

/// A goal that the store is to be told: an app's newest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxGoal {
    /// Whose goal.
    pub app: AppName,
    /// Its place in the order of all goals.
    pub seq: i64,
    /// The signed goal, in hexadecimal.
    pub signed: String,
}

/// How much waits in the outbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OutboxDepth {
    /// Goals.
    pub goals: u64,
    /// Since when the one that waits longest does.
    pub oldest_since_ms: Option<i64>,
}

/// How a store and the database differ.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreDifference {
    /// How many goals the store lacks. They are in the outbox now.
    pub behind: usize,
    /// Goals of the store that are newer than what the database gives their apps next: it was restored from a backup
    /// that lacks them, and not recovered.
    pub ahead: Vec<(AppName, Revision)>,
}

/// Puts an app's goal into the outbox; it takes the place of the one before.
pub(crate) async fn add(tx: &mut Write, app: &AppName, seq: i64, now_ms: i64) -> Result<()> {
    sqlx::query(
        "INSERT INTO goal_outbox (app, seq, waits_since) VALUES ($1, $2, $3) \
         ON CONFLICT (app) DO UPDATE SET seq = excluded.seq",
    )
    .bind(app.as_str())
    .bind(seq)
    .bind(now_ms)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

impl Queue {
    /// Goals that the store is to be told, in their order.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn outbox(&self, limit: u32) -> Result<Vec<OutboxGoal>> {
        let rows = sqlx::query(
            "SELECT o.app, o.seq, g.signed FROM goal_outbox o JOIN goals g ON g.seq = o.seq \
             ORDER BY o.seq LIMIT $1",
        )
        .bind(i64::from(limit))
        .fetch_all(&mut *self.read().await?)
        .await?;
        let goal = |row| {
            Ok(OutboxGoal {
                app: parsed(row, "app")?,
                seq: get(row, "seq")?,
                signed: get(row, "signed")?,
            })
        };
        rows.iter().map(goal).collect()
    }

    /// The store has this goal. One that has come meanwhile stays in the outbox.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn outbox_told(&self, told: &OutboxGoal) -> Result<()> {
        let mut tx = self.write().await?;
        let gone = sqlx::query("DELETE FROM goal_outbox WHERE app = $1 AND seq = $2")
            .bind(told.app.as_str())
            .bind(told.seq)
            .execute(&mut *tx)
            .await?;
        if gone.rows_affected() == 0 {
            sqlx::query(
                "UPDATE goal_outbox SET waits_since = \
                 (SELECT created_at FROM goals WHERE goals.seq = goal_outbox.seq) \
                 WHERE app = $1 AND seq > $2",
            )
            .bind(told.app.as_str())
            .bind(told.seq)
            .execute(&mut *tx)
            .await?;
        }
        tx.commit().await
    }

    /// How much waits.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn outbox_depth(&self) -> Result<OutboxDepth> {
        let row =
            sqlx::query("SELECT COUNT(*) AS goals, MIN(waits_since) AS since FROM goal_outbox")
                .fetch_one(&mut *self.read().await?)
                .await?;
        Ok(OutboxDepth { goals: number(&row, "goals")?, oldest_since_ms: get(&row, "since")? })
    }

    /// Puts into the outbox what a store that holds `stored` lacks: one that is new, or was restored from a backup.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn outbox_compare(
        &self,
        stored: &BTreeMap<AppName, Revision>,
        now_ms: i64,
    ) -> Result<StoreDifference> {
        let rows = sqlx::query(
            "SELECT a.name, g.seq, g.epoch, g.number FROM apps a JOIN goals g ON g.seq = a.goal_seq",
        )
        .fetch_all(&mut *self.read().await?)
        .await?;
        let mut found = StoreDifference::default();
        let mut ours = BTreeMap::new();
        let row = sqlx::query("SELECT value AS epoch FROM counters WHERE name = 'epoch'")
            .fetch_one(&mut *self.read().await?)
            .await?;
        let epoch = number(&row, "epoch")?;
        let mut tx = self.write().await?;
        for row in &rows {
            let app: AppName = parsed(row, "name")?;
            let revision =
                Revision { epoch: number(row, "epoch")?, number: number(row, "number")? };
            if stored.get(&app).is_none_or(|stored| *stored < revision) {
                found.behind += 1;
                // Unless another goal has come, which is in the outbox by itself.
                sqlx::query(
                    "INSERT INTO goal_outbox (app, seq, waits_since) \
                     SELECT name, goal_seq, $3 FROM apps WHERE name = $1 AND goal_seq = $2 \
                     ON CONFLICT (app) DO NOTHING",
                )
                .bind(app.as_str())
                .bind(get::<i64>(row, "seq")?)
                .bind(now_ms)
                .execute(&mut *tx)
                .await?;
            }
            ours.insert(app, revision);
        }
        tx.commit().await?;
        // What the next goal is surely above.
        let least = Revision { epoch, number: 0 };
        let is_ahead = |(app, revision): &(&AppName, &Revision)| {
            ours.get(*app).copied().unwrap_or_default().max(least) < **revision
        };
        let ahead = stored.iter().filter(is_ahead);
        found.ahead = ahead.map(|(app, revision)| (app.clone(), *revision)).collect();
        Ok(found)
    }

    /// The highest epoch that the database knows of: its own, and those of goals and of what machines told.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn highest_epoch(&self) -> Result<u32> {
        let row = sqlx::query(
            "SELECT MAX(epoch) AS epoch FROM (\
             SELECT value AS epoch FROM counters WHERE name = 'epoch' \
             UNION ALL SELECT MAX(epoch) FROM goals UNION ALL SELECT MAX(epoch) FROM machine_apps\
             ) AS known",
        )
        .fetch_one(&mut *self.read().await?)
        .await?;
        number(&row, "epoch")
    }
}
