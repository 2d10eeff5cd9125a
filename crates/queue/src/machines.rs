//! Machines, and what each one does about each of its apps, in batches from the regions.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use shoal_proto::{
    AppName, MachineName, NodeId, RegionName, Revision,
    goal::Labels,
    region::{FetchProgress, MachineReport, REASON_MAX_BYTES},
    state::MachineState,
};
use sqlx::any::AnyRow;

use crate::{
    db::{self, Queue, Write, count, get, json, number, parsed, parsed_opt, placeholders, to_json},
    error::Result,
    pages::Reports,
};

/// How many rows one INSERT carries: 16 columns of each stay far below any database's limit of parameters
/// (SQLite's is 32,766).
const ROWS_CHUNK: usize = 500;

/// A machine that a region has heard of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineSeen {
    /// Its name.
    pub name: MachineName,
    /// Its zone.
    pub zone: String,
    /// All its labels.
    pub labels: Labels,
    /// The release that its agent runs.
    pub version: String,
    /// Where its data plane is.
    pub address: String,
    /// Its key; none when the region process is of a release that does not tell.
    pub node: Option<NodeId>,
    /// When it was heard of, by the coordinator's clock.
    pub last_seen_ms: i64,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// What was seen of it last.
    pub seen: MachineSeen,
    /// Its region.
    pub region: RegionName,
    /// Its newest report about each app, and when that state came about.
    pub apps: Vec<(MachineReport, i64)>,
}

/// A machine whose region or labels changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineLabels {
    /// Its name.
    pub name: MachineName,
    /// Its region.
    pub region: RegionName,
    /// All its labels.
    pub labels: Labels,
}

/// Numbers that rise with what becomes of machines, by whichever coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MachineNumbers {
    /// Rises when some are forgotten: who holds machines in memory reads them all again.
    pub forgotten: i64,
    /// Rises with each batch of what was heard of machines: with the same number none has changed.
    pub heard: i64,
}

/// Where a reader of changed machines stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MachineCursor {
    changed: i64,
    name: String,
}

/// A machine's new state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateSeen {
    /// The machine.
    pub machine: MachineName,
    /// Its report.
    pub report: MachineReport,
    /// When the state came about, by the coordinator's clock.
    pub state_at_ms: i64,
}

/// Keeps, of several rows of a key, the one that `newer` prefers: one INSERT may touch a row once.
fn newest<'a, K: Ord, V>(
    rows: impl IntoIterator<Item = (K, &'a V)>,
    newer: impl Fn(&V, &V) -> bool,
) -> Vec<&'a V> {
    let mut kept: BTreeMap<K, &V> = BTreeMap::new();
    for (key, value) in rows {
        match kept.entry(key) {
            Entry::Vacant(place) => {
                place.insert(value);
            }
            Entry::Occupied(mut place) if newer(value, place.get()) => {
                place.insert(value);
            }
            Entry::Occupied(_) => {}
        }
    }
    kept.into_values().collect()
}

async fn put_machines(tx: &mut Write, region: &RegionName, machines: &[MachineSeen]) -> Result<()> {
    let changed = db::next(tx, "machine").await?;
    let rows =
        newest(machines.iter().map(|machine| (&machine.name, machine)), |a: &MachineSeen, b| {
            a.last_seen_ms >= b.last_seen_ms
        });
    for chunk in rows.chunks(ROWS_CHUNK) {
        let mut sql = String::from(
            "INSERT INTO machines (name, region, zone, labels, version, address, node, last_seen, changed) \
             VALUES ",
        );
        placeholders(&mut sql, chunk.len(), 9);
        sql.push_str(
            " ON CONFLICT (name) DO UPDATE SET region = excluded.region, zone = excluded.zone, \
             labels = excluded.labels, version = excluded.version, address = excluded.address, node = excluded.node, \
             last_seen = excluded.last_seen, changed = CASE WHEN machines.region <> excluded.region \
             OR machines.labels <> excluded.labels THEN excluded.changed ELSE machines.changed END \
             WHERE machines.last_seen <= excluded.last_seen",
        );
        // As many texts as batch sizes: not worth a place among the prepared statements.
        let mut query = sqlx::query(sqlx::AssertSqlSafe(sql)).persistent(false);
        for machine in chunk {
            query = query
                .bind(machine.name.as_str())
                .bind(region.as_str())
                .bind(machine.zone.as_str())
                .bind(to_json(&machine.labels)?)
                .bind(machine.version.as_str())
                .bind(machine.address.as_str())
                .bind(machine.node.map(|node| node.to_string()))
                .bind(machine.last_seen_ms)
                .bind(changed);
        }
        query.execute(&mut **tx).await?;
    }
    Ok(())
}

async fn put_reports(tx: &mut Write, region: &RegionName, reports: &[StateSeen]) -> Result<u64> {
    let place = |seen: &StateSeen| (seen.report.revision, seen.report.sequence);
    let rows = newest(
        reports
            .iter()
            // Only this side ever decides that a machine is UNREACHABLE.
            .filter(|seen| seen.report.state != MachineState::Unreachable)
            .map(|seen| ((&seen.machine, &seen.report.app), seen)),
        |a, b| place(a) > place(b),
    );
    let mut kept = 0;
    for chunk in rows.chunks(ROWS_CHUNK) {
        let mut sql = String::from(
            "INSERT INTO machine_apps (machine, app, region, epoch, number, sequence, artifact, state, \
             reason, pieces, pieces_total, peer_bytes, origin_bytes, corrupt_pieces, state_at, active) VALUES ",
        );
        placeholders(&mut sql, chunk.len(), 16);
        sql.push_str(
            " ON CONFLICT (machine, app) DO UPDATE SET region = excluded.region, \
             epoch = excluded.epoch, number = excluded.number, sequence = excluded.sequence, \
             artifact = excluded.artifact, state = excluded.state, reason = excluded.reason, \
             pieces = excluded.pieces, pieces_total = excluded.pieces_total, \
             peer_bytes = excluded.peer_bytes, origin_bytes = excluded.origin_bytes, \
             corrupt_pieces = excluded.corrupt_pieces, \
             was_active = CASE WHEN excluded.active <> machine_apps.active \
             THEN machine_apps.active ELSE machine_apps.was_active END, \
             active = COALESCE(excluded.active, machine_apps.active), \
             state_at = CASE WHEN machine_apps.epoch = excluded.epoch \
             AND machine_apps.number = excluded.number AND machine_apps.state = excluded.state \
             THEN machine_apps.state_at ELSE excluded.state_at END \
             WHERE (machine_apps.epoch, machine_apps.number, machine_apps.sequence) \
             < (excluded.epoch, excluded.number, excluded.sequence)",
        );
        // As many texts as batch sizes: not worth a place among the prepared statements.
        let mut query = sqlx::query(sqlx::AssertSqlSafe(sql)).persistent(false);
        for StateSeen { machine, report, state_at_ms } in chunk {
            let reason = report.reason.as_deref();
            let reason = reason.map(|text| &text[..text.floor_char_boundary(REASON_MAX_BYTES)]);
            query = query
                .bind(machine.as_str())
                .bind(report.app.as_str())
                .bind(region.as_str())
                .bind(i64::from(report.revision.epoch))
                .bind(count(report.revision.number))
                .bind(count(report.sequence))
                .bind(report.artifact.to_string())
                .bind(report.state.as_str())
                .bind(reason)
                .bind(i64::from(report.progress.pieces))
                .bind(i64::from(report.progress.pieces_total))
                .bind(count(report.progress.peer_bytes))
                .bind(count(report.progress.origin_bytes))
                .bind(i64::from(report.progress.corrupt_pieces))
                .bind(*state_at_ms)
                .bind((report.state == MachineState::Active).then(|| report.artifact.to_string()));
        }
        kept += query.execute(&mut **tx).await?.rows_affected();
    }
    Ok(kept)
}

pub(crate) fn report(row: &AnyRow) -> Result<(MachineReport, i64)> {
    let report = MachineReport {
        app: parsed(row, "app")?,
        revision: Revision { epoch: number(row, "epoch")?, number: number(row, "number")? },
        artifact: parsed(row, "artifact")?,
        state: parsed(row, "state")?,
        reason: get(row, "reason")?,
        progress: FetchProgress {
            pieces: number(row, "pieces")?,
            pieces_total: number(row, "pieces_total")?,
            peer_bytes: number(row, "peer_bytes")?,
            origin_bytes: number(row, "origin_bytes")?,
            corrupt_pieces: number(row, "corrupt_pieces")?,
        },
        sequence: number(row, "sequence")?,
        age_ms: 0,
    };
    Ok((report, get(row, "state_at")?))
}

pub(crate) fn machine(row: &AnyRow) -> Result<Machine> {
    Ok(Machine {
        seen: MachineSeen {
            name: parsed(row, "name")?,
            zone: get(row, "zone")?,
            labels: json(row, "labels")?,
            version: get(row, "version")?,
            address: get(row, "address")?,
            node: parsed_opt(row, "node")?,
            last_seen_ms: get(row, "last_seen")?,
        },
        region: parsed(row, "region")?,
        apps: Vec::new(),
    })
}

impl Queue {
    /// Keeps a region's batch, all of it or nothing. A machine seen earlier, or a report that is not newer by
    /// (revision, sequence), replaces nothing. Returns how many reports were new.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn keep_reports(
        &self,
        region: &RegionName,
        machines: &[MachineSeen],
        reports: &[StateSeen],
    ) -> Result<u64> {
        if machines.is_empty() && reports.is_empty() {
            return Ok(0);
        }
        let mut tx = self.write().await?;
        if !machines.is_empty() {
            put_machines(&mut tx, region, machines).await?;
        }
        let kept = put_reports(&mut tx, region, reports).await?;
        tx.commit().await?;
        Ok(kept)
    }

    /// Forgets the machines that were last seen before `before_ms`, with all that they reported. Returns how
    /// many.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn forget_machines(&self, before_ms: i64) -> Result<u64> {
        let mut tx = self.write().await?;
        // The lock that whoever keeps a batch takes first: the two never wait for each other's rows crosswise.
        db::next(&mut tx, "machine").await?;
        sqlx::query(
            "DELETE FROM machine_apps WHERE machine IN \
             (SELECT name FROM machines WHERE last_seen < $1)",
        )
        .bind(before_ms)
        .execute(&mut *tx)
        .await?;
        let gone = sqlx::query("DELETE FROM machines WHERE last_seen < $1")
            .bind(before_ms)
            .execute(&mut *tx)
            .await?;
        if gone.rows_affected() == 0 {
            return Ok(0);
        }
        db::next(&mut tx, "forgotten").await?;
        tx.commit().await?;
        Ok(gone.rows_affected())
    }

    /// Whether there is anything new of the machines, for whoever holds them in memory.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn machine_numbers(&self) -> Result<MachineNumbers> {
        let query = sqlx::query(
            "SELECT f.value AS forgotten, m.value AS heard FROM counters f, counters m \
             WHERE f.name = 'forgotten' AND m.name = 'machine'",
        );
        let row = self.look_at(query).await?.ok_or(sqlx::Error::RowNotFound)?;
        Ok(MachineNumbers { forgotten: get(&row, "forgotten")?, heard: get(&row, "heard")? })
    }

    /// The next at most `limit` machines whose region or labels changed after `cursor`, which is moved on.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn machines_changed(
        &self,
        cursor: &mut MachineCursor,
        limit: u32,
    ) -> Result<Vec<MachineLabels>> {
        let rows = sqlx::query(
            "SELECT name, region, labels, changed FROM machines WHERE (changed, name) > ($1, $2) \
             ORDER BY changed, name LIMIT $3",
        )
        .bind(cursor.changed)
        .bind(cursor.name.as_str())
        .bind(i64::from(limit))
        .fetch_all(&mut *self.read().await?)
        .await?;
        if let Some(last) = rows.last() {
            *cursor = MachineCursor { changed: get(last, "changed")?, name: get(last, "name")? };
        }
        rows.iter()
            .map(|row| {
                Ok(MachineLabels {
                    name: parsed(row, "name")?,
                    region: parsed(row, "region")?,
                    labels: json(row, "labels")?,
                })
            })
            .collect()
    }

    /// Machines with their apps, by name: of one region or of all; with `app`, those that have reported about
    /// it, and only that report.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn machines(
        &self,
        region: Option<&RegionName>,
        app: Option<&AppName>,
    ) -> Result<Vec<Machine>> {
        let apps = app.map(|app| BTreeSet::from([app.clone()]));
        self.machines_page(region, Reports { apps: apps.as_ref(), failed: false }, "", u32::MAX)
            .await
    }
}
