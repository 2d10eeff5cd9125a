//! Who changed what, when, from where: one row a change, in the change's own transaction.

use crate::{
    db::{self, Queue, Write, get},
    error::Result,
};

/// Who makes a change, and from where.
#[derive(Debug, Clone)]
pub struct Actor {
    /// The machine name of the certificate.
    pub name: String,
    /// The address that it called from.
    pub origin: String,
}

/// A row of the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditRow {
    /// Rises by one with each row.
    pub id: i64,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// Who.
    pub who: String,
    /// From where.
    pub origin: String,
    /// What was done, such as `app.set`.
    pub what: String,
    /// To what.
    pub subject: String,
    /// More about it.
    pub detail: String,
}

pub(crate) async fn record(
    tx: &mut Write,
    now_ms: i64,
    actor: &Actor,
    what: &'static str,
    subject: &str,
    detail: &str,
) -> Result<()> {
    let id = db::next(tx, "audit").await?;
    sqlx::query(
        "INSERT INTO audit (id, at, who, origin, what, subject, detail) \
         VALUES ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(id)
    .bind(now_ms)
    .bind(actor.name.as_str())
    .bind(actor.origin.as_str())
    .bind(what)
    .bind(subject)
    .bind(detail)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

impl Queue {
    /// The newest `limit` rows of the audit log, newest first.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn audit(&self, limit: u32) -> Result<Vec<AuditRow>> {
        let rows = sqlx::query("SELECT * FROM audit ORDER BY id DESC LIMIT $1")
            .bind(i64::from(limit))
            .fetch_all(&mut *self.read().await?)
            .await?;
        rows.iter()
            .map(|row| {
                Ok(AuditRow {
                    id: get(row, "id")?,
                    at_ms: get(row, "at")?,
                    who: get(row, "who")?,
                    origin: get(row, "origin")?,
                    what: get(row, "what")?,
                    subject: get(row, "subject")?,
                    detail: get(row, "detail")?,
                })
            })
            .collect()
    }
}
