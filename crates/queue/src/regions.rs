//! Regions: those of the configuration, whether they are in service, and their processes.

use std::collections::BTreeMap;

use shoal_proto::{MachineName, RegionName};

use crate::{
    artifacts,
    audit::{self, Actor},
    db::{self, Queue, flag, get, number, parsed},
    error::{QueueError, Result},
};

/// A region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Its name.
    pub name: RegionName,
    /// Whether it is out of service.
    pub drained: bool,
    /// Its processes, and when each was last heard of.
    pub processes: BTreeMap<MachineName, i64>,
    /// How many machines it knows.
    pub machines: u64,
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

    /// Wants a copy of an artifact in each region that has none yet (a region that came later). Returns how
    /// many were added.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn want_everywhere(&self, stored: &crate::Stored, now_ms: i64) -> Result<u64> {
        let regions: Vec<_> = self.regions().await?.into_iter().map(|region| region.name).collect();
        let mut tx = self.write().await?;
        let added = artifacts::want_copies(&mut tx, stored, &regions, now_ms).await?;
        tx.commit().await?;
        Ok(added)
    }

    /// The regions of the configuration, by name.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn regions(&self) -> Result<Vec<Region>> {
        let rows = sqlx::query(
            "SELECT r.name, r.drained, \
             (SELECT COUNT(*) FROM machines m WHERE m.region = r.name) AS machines \
             FROM regions r WHERE r.configured = 1 ORDER BY r.name",
        )
        .fetch_all(&mut *self.read().await?)
        .await?;
        let mut regions: Vec<Region> = Vec::with_capacity(rows.len());
        for row in &rows {
            regions.push(Region {
                name: parsed(row, "name")?,
                drained: flag(row, "drained")?,
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

    /// Takes a region out of service, or back into it.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when the configuration has none of that name.
    pub async fn drain(
        &self,
        name: &RegionName,
        drained: bool,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<()> {
        let mut tx = self.write().await?;
        let done =
            sqlx::query("UPDATE regions SET drained = $1 WHERE name = $2 AND configured = 1")
                .bind(i64::from(drained))
                .bind(name.as_str())
                .execute(&mut *tx)
                .await?;
        if done.rows_affected() == 0 {
            return Err(QueueError::NotFound(format!(
                "no region '{name}' in the coordinator's configuration: shoal regions lists them"
            )));
        }
        let what = if drained { "region.drain" } else { "region.undrain" };
        audit::record(&mut tx, now_ms, actor, what, name.as_str(), "").await?;
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
