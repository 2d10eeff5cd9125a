//! Who changed what, when, from where: one row a change, in the change's own transaction.

use crate::{
    db::{self, Queue, Write, get},
    dialect::Numbers,
    error::Result,
};

/// Who makes a change, and from where.
#[derive(Debug, Clone)]
pub struct Actor {
    /// The machine name of the certificate, or `token:` and the token's name.
    pub name: String,
    /// The address that it called from.
    pub origin: String,
    /// The request that it belongs to, where that may come again ([`Queue::begin_request`]).
    pub request: Option<String>,
}

/// A row of the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditRow {
    /// Rises with each row, not always by one; two that are written at the same moment may be either way round.
    pub id: i64,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// Who.
    pub who: String,
    /// From where.
    pub origin: String,
    /// What was done, such as `app.set`.
    pub what: String,
    /// To what; what is of an app begins with the app's name and a `/`.
    pub subject: String,
    /// The app, where it was about one.
    pub app: Option<String>,
    /// More about it.
    pub detail: String,
}

/// Which rows of the audit log are asked for: those that fit all that is given.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// About this app.
    pub app: Option<String>,
    /// To this.
    pub subject: Option<String>,
    /// By this one.
    pub who: Option<String>,
    /// This, or all of a kind: `job.submit`, or `job.`.
    pub what: Option<String>,
    /// Not before this, in milliseconds since the Unix epoch.
    pub since_ms: Option<i64>,
    /// Older than the row of this number.
    pub before: Option<i64>,
}

/// The kinds of what is done to something of an app; its subject begins with the app's name.
const OF_APPS: [&str; 4] = ["app", "job", "artifact", "rollout"];

/// The app that a change is about.
fn app_of<'a>(what: &str, subject: &'a str) -> Option<&'a str> {
    let kind = what.split('.').next()?;
    OF_APPS.contains(&kind).then(|| subject.split('/').next().unwrap_or(subject))
}

pub(crate) async fn record(
    tx: &mut Write,
    now_ms: i64,
    actor: &Actor,
    what: &'static str,
    subject: &str,
    detail: &str,
) -> Result<()> {
    let id = db::numbered(tx, Numbers::Audit).await?;
    let sql = format!(
        "INSERT INTO audit (id, at, who, origin, what, subject, detail, app) \
         VALUES ({id}, $1, $2, $3, $4, $5, $6, $7)"
    );
    sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(now_ms)
        .bind(actor.name.as_str())
        .bind(actor.origin.as_str())
        .bind(what)
        .bind(subject)
        .bind(detail)
        .bind(app_of(what, subject))
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
        self.audit_rows(&AuditFilter::default(), limit).await
    }

    /// The newest `limit` rows that fit a filter, newest first.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn audit_rows(&self, filter: &AuditFilter, limit: u32) -> Result<Vec<AuditRow>> {
        // Only the conditions that are asked for, so that each engine picks its index by them.
        let mut sql = String::from("SELECT * FROM audit WHERE id < $1");
        let texts = [
            (" AND app = ", &filter.app),
            (" AND subject = ", &filter.subject),
            (" AND who = ", &filter.who),
        ];
        let mut values = Vec::new();
        let mut add = |sql: &mut String, condition: &str, value: String| {
            values.push(value);
            // The first two placeholders are the row's number and the limit.
            sql.push_str(&format!("{condition}${}", values.len() + 2));
        };
        for (condition, value) in texts {
            if let Some(value) = value {
                add(&mut sql, condition, value.clone());
            }
        }
        match &filter.what {
            Some(kind) if kind.ends_with('.') => {
                let length = kind.chars().count();
                add(&mut sql, &format!(" AND substr(what, 1, {length}) = "), kind.clone());
            }
            Some(what) => add(&mut sql, " AND what = ", what.clone()),
            None => {}
        }
        if let Some(since) = filter.since_ms {
            sql.push_str(&format!(" AND at >= {since}"));
        }
        sql.push_str(" ORDER BY id DESC LIMIT $2");
        let mut query = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(filter.before.unwrap_or(i64::MAX))
            .bind(i64::from(limit));
        for value in &values {
            query = query.bind(value.as_str());
        }
        let rows = query.fetch_all(&mut *self.read().await?).await?;
        rows.iter()
            .map(|row| {
                Ok(AuditRow {
                    id: get(row, "id")?,
                    at_ms: get(row, "at")?,
                    who: get(row, "who")?,
                    origin: get(row, "origin")?,
                    what: get(row, "what")?,
                    subject: get(row, "subject")?,
                    app: get(row, "app")?,
                    detail: get(row, "detail")?,
                })
            })
            .collect()
    }
}
