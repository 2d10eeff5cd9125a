//! Regions: those of the configuration, whether they are in service, and their processes.

use std::collections::BTreeMap;

use shoal_proto::{MachineName, RegionName};

use crate::{
    artifacts,
    audit::{self, Actor},
    db::{self, Queue, Write, get, number, parsed},
    error::{QueueError, Result},
    finish::short,
    workers::Drain,
};

/// A region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Its name.
    pub name: RegionName,
    /// Why it is out of service; none when it is in service.
    pub drain: Option<Drain>,
    /// Its processes, and when each was last heard of.
    pub processes: BTreeMap<MachineName, i64>,
    /// How many machines it knows.
    pub machines: u64,
}

/// What a region that comes back into service missed: copies, which are made in the order that [`Queue::take_copy`] says,
/// removals, and the inspection of what it should still have.
async fn come_back(tx: &mut Write, name: &RegionName, now_ms: i64) -> Result<()> {
    sqlx::query("UPDATE regions SET back_at = $1 WHERE name = $2")
        .bind(now_ms)
        .bind(name.as_str())
        .execute(&mut **tx)
        .await?;
    sqlx::query("UPDATE encodings SET next_try_at = 0 WHERE removal = 1")
        .execute(&mut **tx)
        .await?;
    sqlx::query(
        "UPDATE encodings SET urgent = 1 WHERE checked_at IS NOT NULL AND removal = 0 \
         AND EXISTS (SELECT 1 FROM replications c WHERE c.artifact = encodings.artifact \
         AND c.encoding = encodings.encoding AND c.region = $1 AND c.status = 'COMPLETE')",
    )
    .bind(name.as_str())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

impl Queue {
    /// Makes the regions those of the configuration. A region that is new gets a copy of every artifact that
    /// an app's goal names now; older ones are copied when they are asked for. One that is no longer named
    /// keeps its rows and counts for nothing.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn set_regions(&self, names: &[RegionName], now_ms: i64) -> Result<()> {
        let mut tx = self.write().await?;
        // Coordinators that start at the same moment do this one after the other.
        db::next(&mut tx, "region").await?;
        sqlx::query("UPDATE regions SET configured = 0").execute(&mut *tx).await?;
        for name in names {
            sqlx::query(
                "INSERT INTO regions (name, configured, drained, created_at) VALUES ($1, 1, 0, $2) \
                 ON CONFLICT (name) DO UPDATE SET configured = 1",
            )
            .bind(name.as_str())
            .bind(now_ms)
            .execute(&mut *tx)
            .await?;
        }
        let current = sqlx::query(
            "SELECT r.artifact_name FROM apps a JOIN goals g ON g.seq = a.goal_seq \
             JOIN rollouts r ON r.id = g.rollout",
        )
        .fetch_all(&mut *tx)
        .await?;
        for row in &current {
            let name: String = get(row, "artifact_name")?;
            if let Some(artifact) = artifacts::by_name(&mut tx, &name).await? {
                artifacts::want_copies(&mut tx, &artifact.stored, names, now_ms).await?;
            }
        }
        tx.commit().await
    }

    /// Wants a copy of a living artifact in each region that has none yet (a region that came later). Returns how
    /// many were added.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn want_everywhere(&self, name: &str, now_ms: i64) -> Result<u64> {
        let regions: Vec<_> = self.regions().await?.into_iter().map(|region| region.name).collect();
        let mut tx = self.write().await?;
        let artifact = artifacts::by_name(&mut tx, name).await?;
        let Some(artifact) = artifact.filter(|artifact| artifact.deleted.is_none()) else {
            return Ok(0);
        };
        let added = artifacts::want_copies(&mut tx, &artifact.stored, &regions, now_ms).await?;
        tx.commit().await?;
        Ok(added)
    }

    /// The regions of the configuration, by name.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn regions(&self) -> Result<Vec<Region>> {
        let rows = sqlx::query(
            "SELECT r.name, r.drained, r.drain_reason, r.drained_by, r.drained_at, \
             (SELECT COUNT(*) FROM machines m WHERE m.region = r.name) AS machines \
             FROM regions r WHERE r.configured = 1 ORDER BY r.name",
        )
        .fetch_all(&mut *self.read().await?)
        .await?;
        let mut regions: Vec<Region> = Vec::with_capacity(rows.len());
        for row in &rows {
            regions.push(Region {
                name: parsed(row, "name")?,
                drain: Drain::of(row)?,
                processes: BTreeMap::new(),
                machines: number(row, "machines")?,
            });
        }
        let rows = sqlx::query("SELECT region, machine, last_seen FROM region_processes")
            .fetch_all(&mut *self.read().await?)
            .await?;
        for row in &rows {
            let name: RegionName = parsed(row, "region")?;
            if let Some(region) = regions.iter_mut().find(|region| region.name == name) {
                region.processes.insert(parsed(row, "machine")?, get(row, "last_seen")?);
            }
        }
        Ok(regions)
    }

    /// Takes a region out of service, for a reason that is shown, or back into it.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when the configuration has none of that name.
    pub async fn drain(
        &self,
        name: &RegionName,
        drained: bool,
        reason: Option<&str>,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<()> {
        let mut tx = self.write().await?;
        let reason = reason.filter(|_| drained).map(short);
        let done = sqlx::query(
            "UPDATE regions SET drained = $1, drain_reason = $2, drained_by = $3, drained_at = $4 \
             WHERE name = $5 AND configured = 1",
        )
        .bind(i64::from(drained))
        .bind(reason)
        .bind(actor.name.as_str())
        .bind(now_ms)
        .bind(name.as_str())
        .execute(&mut *tx)
        .await?;
        if done.rows_affected() == 0 {
            return Err(QueueError::NotFound(format!(
                "no region '{name}' in the coordinator's configuration: shoal regions lists them"
            )));
        }
        let change = if drained {
            // Who copies into it finds at its next word that it does so no more.
            "UPDATE replications SET status = 'PENDING', owner = NULL, owned_until = 0 \
             WHERE region = $1 AND status = 'COPYING'"
        } else {
            "UPDATE replications SET next_try_at = 0, tries = 0 \
             WHERE region = $1 AND status IN ('PENDING', 'FAILED')"
        };
        sqlx::query(change).bind(name.as_str()).execute(&mut *tx).await?;
        if !drained {
            come_back(&mut tx, name, now_ms).await?;
        }
        let what = if drained { "region.drain" } else { "region.undrain" };
        audit::record(&mut tx, now_ms, actor, what, name.as_str(), reason.unwrap_or_default())
            .await?;
        tx.commit().await
    }

    /// A region process was heard of.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn region_process_seen(
        &self,
        region: &RegionName,
        machine: &MachineName,
        now_ms: i64,
    ) -> Result<()> {
        let mut tx = self.write().await?;
        sqlx::query(
            "INSERT INTO region_processes (region, machine, last_seen) VALUES ($1, $2, $3) \
             ON CONFLICT (region, machine) DO UPDATE SET last_seen = excluded.last_seen",
        )
        .bind(region.as_str())
        .bind(machine.as_str())
        .bind(now_ms)
        .execute(&mut *tx)
        .await?;
        tx.commit().await
    }
}
