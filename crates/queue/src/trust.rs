//! The trust bundles, and whose certificates no longer count.
//!
//! A change of trust takes the lock of its counter first, reads the newest bundle, has its successor signed, and writes
//! it with its audit row: changes come one after the other, whichever coordinator makes them.

use std::collections::BTreeSet;

use shoal_proto::{AppName, MachineName, NodeId, RegionName};

use crate::{
    audit::{self, Actor},
    db::{self, Queue, Write, count, get, number, parsed},
    error::{QueueError, Result},
    outbox,
};

/// A signed trust bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustRow {
    /// Its number.
    pub number: u64,
    /// The goal key that signed it.
    pub key_id: u32,
    /// The signed bundle, in hexadecimal.
    pub signed: String,
}

/// A member, by its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberSeen {
    /// The key.
    pub node: NodeId,
    /// The name in its certificate.
    pub machine: MachineName,
    /// What it is for.
    pub role: String,
    /// Its region, if it belongs to one.
    pub region: Option<RegionName>,
}

/// What is done to the trust, for the audit log.
#[derive(Debug, Clone, Copy)]
pub struct TrustChange<'a> {
    /// Such as `trust.revoke`.
    pub what: &'static str,
    /// To whom or what.
    pub subject: &'a str,
    /// More about it.
    pub detail: &'a str,
}

fn row(row: &sqlx::any::AnyRow) -> Result<TrustRow> {
    Ok(TrustRow {
        number: number(row, "number")?,
        key_id: number(row, "key_id")?,
        signed: get(row, "signed")?,
    })
}

async fn newest(tx: &mut Write) -> Result<TrustRow> {
    let found = sqlx::query("SELECT * FROM trust ORDER BY number DESC LIMIT 1")
        .fetch_optional(&mut **tx)
        .await?;
    let found = found.ok_or_else(|| {
        QueueError::Conflict("no trust bundle is stored yet: ask again in a moment".into())
    })?;
    row(&found)
}

async fn add(tx: &mut Write, next: &TrustRow, now_ms: i64) -> Result<()> {
    sqlx::query("INSERT INTO trust (number, key_id, signed, created_at) VALUES ($1, $2, $3, $4)")
        .bind(count(next.number))
        .bind(i64::from(next.key_id))
        .bind(next.signed.as_str())
        .bind(now_ms)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

impl Queue {
    /// The last bundle that each goal key signed, by number, the newest last: from any bundle of the past they lead to
    /// the newest.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn trust_chain(&self) -> Result<Vec<TrustRow>> {
        let rows = sqlx::query(
            "SELECT number, key_id, signed FROM trust t WHERE NOT EXISTS \
             (SELECT 1 FROM trust later WHERE later.key_id = t.key_id AND later.number > t.number) \
             ORDER BY number",
        )
        .fetch_all(&mut *self.read().await?)
        .await?;
        rows.iter().map(row).collect()
    }

    /// The number of the newest bundle; 0 without any.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn trust_number(&self) -> Result<u64> {
        let row = sqlx::query("SELECT COALESCE(MAX(number), 0) AS number FROM trust")
            .fetch_one(&mut *self.read().await?)
            .await?;
        number(&row, "number")
    }

    /// Takes bundles that a coordinator has as files, if the last of them is newer than what is here: the first time, and
    /// after a restore of an older database. Returns whether it was.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn bring_trust(&self, chain: &[TrustRow], now_ms: i64) -> Result<bool> {
        let mut tx = self.write().await?;
        db::next(&mut tx, "trust").await?;
        let row = sqlx::query("SELECT COALESCE(MAX(number), 0) AS number FROM trust")
            .fetch_one(&mut *tx)
            .await?;
        let held: u64 = number(&row, "number")?;
        let newer: Vec<_> = chain.iter().filter(|bundle| bundle.number > held).collect();
        for bundle in &newer {
            add(&mut tx, bundle, now_ms).await?;
        }
        tx.commit().await?;
        Ok(!newer.is_empty())
    }

    /// Puts the next bundle behind the newest one, with its audit row. `seal` is given the newest and signs its successor.
    ///
    /// # Errors
    /// [`QueueError::Conflict`] when there is none yet, what `seal` returns, and when the database fails.
    pub async fn change_trust(
        &self,
        change: &TrustChange<'_>,
        seal: impl FnOnce(&TrustRow) -> Result<TrustRow> + Send,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<TrustRow> {
        let mut tx = self.write().await?;
        let next = self.change(&mut tx, change, seal, actor, now_ms).await?;
        tx.commit().await?;
        Ok(next)
    }

    async fn change(
        &self,
        tx: &mut Write,
        change: &TrustChange<'_>,
        seal: impl FnOnce(&TrustRow) -> Result<TrustRow> + Send,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<TrustRow> {
        db::next(tx, "trust").await?;
        let next = seal(&newest(tx).await?)?;
        add(tx, &next, now_ms).await?;
        let detail = match change.detail {
            "" => format!("trust {}", next.number),
            detail => format!("trust {}: {detail}", next.number),
        };
        audit::record(tx, now_ms, actor, change.what, change.subject, &detail).await?;
        Ok(next)
    }

    /// Revokes all keys that a machine was seen with, and `extra`: the next bundle, its audit row, and the machine
    /// forgotten, so that no rollout waits for it. Returns the keys with the bundle.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when no key of the machine is known, [`QueueError::Conflict`] when all of them are revoked
    /// already, what `seal` returns, and when the database fails.
    pub async fn revoke(
        &self,
        machine: &MachineName,
        extra: Option<NodeId>,
        seal: impl FnOnce(&TrustRow, &[NodeId]) -> Result<TrustRow> + Send,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<(TrustRow, Vec<NodeId>)> {
        let mut tx = self.write().await?;
        // The order in which whoever keeps a batch of machines takes its lock, too.
        db::next(&mut tx, "machine").await?;
        let rows = sqlx::query(
            "SELECT node FROM members WHERE machine = $1 \
             UNION SELECT node FROM machines WHERE name = $1 AND node IS NOT NULL",
        )
        .bind(machine.as_str())
        .fetch_all(&mut *tx)
        .await?;
        let mut nodes: BTreeSet<NodeId> = extra.into_iter().collect();
        for row in &rows {
            nodes.insert(parsed(row, "node")?);
        }
        if nodes.is_empty() {
            return Err(QueueError::NotFound(format!(
                "no key of a machine '{machine}' is known: give its key with --node"
            )));
        }
        let nodes: Vec<_> = nodes.into_iter().collect();
        let what = TrustChange { what: "trust.revoke", subject: machine.as_str(), detail: "" };
        let seal = |newest: &TrustRow| seal(newest, &nodes);
        let next = self.change(&mut tx, &what, seal, actor, now_ms).await?;
        for node in &nodes {
            sqlx::query(
                "INSERT INTO members (node, machine, role, last_seen, revoked_at, revoked_by) \
                 VALUES ($1, $2, '', $3, $3, $4) ON CONFLICT (node) DO UPDATE SET \
                 revoked_at = excluded.revoked_at, revoked_by = excluded.revoked_by",
            )
            .bind(node.to_string())
            .bind(machine.as_str())
            .bind(now_ms)
            .bind(actor.name.as_str())
            .execute(&mut *tx)
            .await?;
        }
        sqlx::query("DELETE FROM machine_apps WHERE machine = $1")
            .bind(machine.as_str())
            .execute(&mut *tx)
            .await?;
        let gone = sqlx::query("DELETE FROM machines WHERE name = $1")
            .bind(machine.as_str())
            .execute(&mut *tx)
            .await?;
        if gone.rows_affected() > 0 {
            db::next(&mut tx, "forgotten").await?;
        }
        tx.commit().await?;
        Ok((next, nodes))
    }

    /// Forgets machines of revoked keys: what a region told of them while they were being revoked. Returns how many.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn forget_revoked(&self) -> Result<u64> {
        const REVOKED: &str = "SELECT node FROM members WHERE revoked_at IS NOT NULL";
        let mut tx = self.write().await?;
        db::next(&mut tx, "machine").await?;
        let apps = format!(
            "DELETE FROM machine_apps WHERE machine IN (SELECT name FROM machines WHERE node IN ({REVOKED}))"
        );
        sqlx::query(sqlx::AssertSqlSafe(apps)).execute(&mut *tx).await?;
        let machines = format!("DELETE FROM machines WHERE node IN ({REVOKED})");
        let gone = sqlx::query(sqlx::AssertSqlSafe(machines)).execute(&mut *tx).await?;
        if gone.rows_affected() == 0 {
            return tx.undo().await.map(|()| 0);
        }
        db::next(&mut tx, "forgotten").await?;
        tx.commit().await?;
        Ok(gone.rows_affected())
    }

    /// Keeps what a region process says of its machines' trust and certificates, in its caller's JSON.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn region_stands(
        &self,
        region: &RegionName,
        machine: &MachineName,
        standing: &str,
        now_ms: i64,
    ) -> Result<()> {
        let mut tx = self.write().await?;
        sqlx::query(
            "INSERT INTO region_processes (region, machine, last_seen, standing) VALUES ($1, $2, $3, $4) \
             ON CONFLICT (region, machine) DO UPDATE SET last_seen = excluded.last_seen, \
             standing = excluded.standing",
        )
        .bind(region.as_str())
        .bind(machine.as_str())
        .bind(now_ms)
        .bind(standing)
        .execute(&mut *tx)
        .await?;
        tx.commit().await
    }

    /// What the region processes said that were heard of since `since_ms`, by region and process.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn standings(&self, since_ms: i64) -> Result<Vec<(RegionName, MachineName, String)>> {
        let rows = sqlx::query(
            "SELECT region, machine, standing FROM region_processes \
             WHERE standing IS NOT NULL AND last_seen >= $1 ORDER BY region, machine",
        )
        .bind(since_ms)
        .fetch_all(&mut *self.read().await?)
        .await?;
        let read =
            |row| Ok((parsed(row, "region")?, parsed(row, "machine")?, get(row, "standing")?));
        rows.iter().map(read).collect()
    }

    /// Has each app's present goal signed again, under new places in the order of goals, so that everybody is told:
    /// `sign` is given the signed goal and returns another one, both in hexadecimal. Returns how many.
    ///
    /// # Errors
    /// What `sign` returns, and when the database fails.
    pub async fn sign_goals_again(
        &self,
        sign: impl Fn(&str) -> Result<String> + Send,
        now_ms: i64,
    ) -> Result<u64> {
        let mut tx = self.write().await?;
        // Locks in the order of all who set goals: the apps, then the counter.
        db::next(&mut tx, "trust").await?;
        sqlx::query("UPDATE apps SET goal_seq = goal_seq").execute(&mut *tx).await?;
        let mut next = db::next(&mut tx, "goal").await?;
        let rows = sqlx::query(
            "SELECT a.name, g.seq, g.signed FROM apps a JOIN goals g ON g.seq = a.goal_seq ORDER BY g.seq",
        )
        .fetch_all(&mut *tx)
        .await?;
        for row in &rows {
            let (app, seq): (AppName, i64) = (parsed(row, "name")?, get(row, "seq")?);
            let signed = sign(&get::<String>(row, "signed")?)?;
            sqlx::query("UPDATE goals SET seq = $1, signed = $2 WHERE seq = $3")
                .bind(next)
                .bind(signed)
                .bind(seq)
                .execute(&mut *tx)
                .await?;
            sqlx::query("UPDATE apps SET goal_seq = $1 WHERE name = $2")
                .bind(next)
                .bind(app.as_str())
                .execute(&mut *tx)
                .await?;
            outbox::add(&mut tx, &app, next, now_ms).await?;
            next = db::next(&mut tx, "goal").await?;
        }
        tx.commit().await?;
        Ok(rows.len() as u64)
    }

    /// Notes that a member was heard of, or given a certificate.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn member_seen(&self, member: &MemberSeen, now_ms: i64) -> Result<()> {
        let mut tx = self.write().await?;
        put_member(&mut tx, member, now_ms).await?;
        tx.commit().await
    }
}

pub(crate) async fn put_member(tx: &mut Write, member: &MemberSeen, now_ms: i64) -> Result<()> {
    sqlx::query(
        "INSERT INTO members (node, machine, role, region, last_seen) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT (node) DO UPDATE SET machine = excluded.machine, role = excluded.role, \
         region = excluded.region, last_seen = excluded.last_seen",
    )
    .bind(member.node.to_string())
    .bind(member.machine.as_str())
    .bind(member.role.as_str())
    .bind(member.region.as_ref().map(RegionName::as_str))
    .bind(now_ms)
    .execute(&mut **tx)
    .await?;
    Ok(())
}
