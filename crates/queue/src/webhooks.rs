//! Webhooks: who is told of events at an address of its own, and what became of each message.
//!
//! A delivery's row comes about in the transaction that numbers its event, so none is forgotten; it is the outbox until it
//! has ended, and the log from then on.

use shoal_proto::AppName;
use sqlx::any::AnyRow;

use crate::{
    audit::{self, Actor},
    db::{self, Queue, Write, corrupt, count, get, number, parsed_opt},
    error::{QueueError, Result},
    events::EventKind,
    finish::short,
    pages::Select,
};

/// How many deliveries are forgotten in one transaction.
const FORGOTTEN_AT_ONCE: i64 = 5_000;

/// The most webhooks: each is a task and a connection of the coordinator on duty.
const WEBHOOKS_MAX: i64 = 100;

/// A webhook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Webhook {
    /// Its number.
    pub id: i64,
    /// Where messages go.
    pub url: String,
    /// Only events of this app; none: of all.
    pub app: Option<AppName>,
    /// Only events of these kinds; empty: of all.
    pub kinds: Vec<EventKind>,
    /// What signs its messages, as it was sealed.
    pub sealed: String,
    /// Since when it is there.
    pub created_at_ms: i64,
    /// Who made it.
    pub created_by: String,
}

/// A webhook to be.
#[derive(Debug, Clone)]
pub struct NewWebhook {
    /// Where messages go.
    pub url: String,
    /// Only events of this app; none: of all.
    pub app: Option<AppName>,
    /// Only events of these kinds; empty: of all.
    pub kinds: Vec<EventKind>,
    /// What signs its messages, sealed.
    pub sealed: String,
}

/// The state of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryStatus {
    /// It is to be tried, for the first time or again.
    Pending,
    /// The receiver took it.
    Delivered,
    /// It was tried for as long as it is: nobody takes it.
    GivenUp,
}

impl DeliveryStatus {
    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Delivered => "DELIVERED",
            Self::GivenUp => "GIVEN_UP",
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::Pending, Self::Delivered, Self::GivenUp]
            .into_iter()
            .find(|status| status.as_str() == name)
    }
}

/// A message to a webhook and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// The webhook.
    pub webhook: i64,
    /// The message's id, the same in every attempt.
    pub message: String,
    /// The event; none for a test.
    pub seq: Option<i64>,
    /// The event's kind.
    pub kind: String,
    /// Its state.
    pub status: DeliveryStatus,
    /// Since when it is to be delivered.
    pub created_at_ms: i64,
    /// How often it was tried.
    pub tries: u32,
    /// While it is pending: when it is tried next.
    pub next_try_at_ms: i64,
    /// When it was tried last.
    pub last_try_at_ms: Option<i64>,
    /// The HTTP status of the last answer.
    pub answer: Option<u16>,
    /// How long the last attempt took.
    pub latency_ms: Option<u64>,
    /// Why the last attempt failed.
    pub reason: Option<String>,
    /// When it ended.
    pub finished_at_ms: Option<i64>,
}

/// A webhook that has something to deliver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// The webhook.
    pub webhook: i64,
    /// When its next delivery is to be tried.
    pub at_ms: i64,
}

/// How an attempt at a delivery went.
#[derive(Debug, Clone, Default)]
pub struct Attempted {
    /// The HTTP status, if there was an answer.
    pub answer: Option<u16>,
    /// How long it took.
    pub latency_ms: u64,
    /// Why it failed; none: the receiver took it.
    pub reason: Option<String>,
}

fn webhook(row: &AnyRow) -> Result<Webhook> {
    let kinds: String = get(row, "kinds")?;
    let kinds = kinds.split(',').filter(|kind| !kind.is_empty());
    let kind = |name: &str| EventKind::named(name).ok_or_else(|| corrupt("kinds", name));
    Ok(Webhook {
        id: get(row, "id")?,
        url: get(row, "url")?,
        app: parsed_opt(row, "app")?,
        kinds: kinds.map(kind).collect::<Result<_>>()?,
        sealed: get(row, "secret")?,
        created_at_ms: get(row, "created_at")?,
        created_by: get(row, "created_by")?,
    })
}

fn delivery(row: &AnyRow) -> Result<Delivery> {
    let status: String = get(row, "status")?;
    let narrow = |column: &str| -> Result<Option<i64>> { get(row, column) };
    Ok(Delivery {
        webhook: get(row, "webhook")?,
        message: get(row, "message")?,
        seq: get(row, "seq")?,
        kind: get(row, "kind")?,
        status: DeliveryStatus::named(&status).ok_or_else(|| corrupt("status", status))?,
        created_at_ms: get(row, "created_at")?,
        tries: number(row, "tries")?,
        next_try_at_ms: get(row, "next_try_at")?,
        last_try_at_ms: get(row, "last_try_at")?,
        answer: narrow("answer")?.map(|_| number(row, "answer")).transpose()?,
        latency_ms: narrow("latency_ms")?.map(|_| number(row, "latency_ms")).transpose()?,
        reason: get(row, "reason")?,
        finished_at_ms: get(row, "finished_at")?,
    })
}

/// Makes the deliveries of the events after `base` and up to `last`.
pub(crate) async fn deliver_in(tx: &mut Write, base: i64, last: i64) -> Result<()> {
    // The moment is part of the message's id: after a restore of the database numbers come again.
    sqlx::query(
        "INSERT INTO deliveries (webhook, message, seq, kind, status, created_at, tries, next_try_at) \
         SELECT w.id, 'evt_' || e.seq || '_' || e.at, e.seq, e.kind, 'PENDING', e.at, 0, 0 \
         FROM events e JOIN webhooks w ON (w.app IS NULL OR w.app = e.app) \
         AND (w.kinds = '' OR w.kinds LIKE '%,' || e.kind || ',%') WHERE e.seq > $1 AND e.seq <= $2",
    )
    .bind(base)
    .bind(last)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

fn no_webhook(id: i64) -> QueueError {
    QueueError::NotFound(format!("no webhook {id}: shoal webhook list shows them"))
}

impl Queue {
    /// Adds a webhook: it is told of what happens from now on.
    ///
    /// # Errors
    /// [`QueueError::Conflict`] when there are as many as there may be.
    pub async fn add_webhook(
        &self,
        new: &NewWebhook,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<Webhook> {
        let mut tx = self.write().await?;
        let id = db::next(&mut tx, "webhook").await?;
        let row = sqlx::query("SELECT COUNT(*) AS n FROM webhooks").fetch_one(&mut *tx).await?;
        if get::<i64>(&row, "n")? >= WEBHOOKS_MAX {
            return Err(QueueError::Conflict(format!(
                "there are {WEBHOOKS_MAX} webhooks, and no more are possible: remove one with shoal webhook remove"
            )));
        }
        let names: Vec<_> = new.kinds.iter().map(|kind| kind.as_str()).collect();
        let kinds = if names.is_empty() { String::new() } else { format!(",{},", names.join(",")) };
        sqlx::query(
            "INSERT INTO webhooks (id, url, app, kinds, secret, created_at, created_by) \
             VALUES ($1, $2, $3, $4, $5, $6, $7)",
        )
        .bind(id)
        .bind(new.url.as_str())
        .bind(new.app.as_ref().map(AppName::as_str))
        .bind(kinds.as_str())
        .bind(new.sealed.as_str())
        .bind(now_ms)
        .bind(actor.name.as_str())
        .execute(&mut *tx)
        .await?;
        let app = new.app.as_ref().map_or("all apps", AppName::as_str);
        let names = if names.is_empty() { "all events".into() } else { names.join(",") };
        let detail = format!("{} {app} {names}", new.url);
        audit::record(&mut tx, now_ms, actor, "webhook.add", &id.to_string(), &detail).await?;
        tx.commit().await?;
        self.webhook(id).await
    }

    /// Removes a webhook and all that it was to be told.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when there is none of that number.
    pub async fn remove_webhook(&self, id: i64, actor: &Actor, now_ms: i64) -> Result<()> {
        let mut tx = self.write().await?;
        let gone =
            sqlx::query("DELETE FROM webhooks WHERE id = $1").bind(id).execute(&mut *tx).await?;
        if gone.rows_affected() == 0 {
            return Err(no_webhook(id));
        }
        sqlx::query("DELETE FROM deliveries WHERE webhook = $1").bind(id).execute(&mut *tx).await?;
        audit::record(&mut tx, now_ms, actor, "webhook.remove", &id.to_string(), "").await?;
        tx.commit().await
    }

    /// One webhook.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when there is none of that number.
    pub async fn webhook(&self, id: i64) -> Result<Webhook> {
        let row = sqlx::query("SELECT * FROM webhooks WHERE id = $1")
            .bind(id)
            .fetch_optional(&mut *self.read().await?)
            .await?;
        webhook(&row.ok_or_else(|| no_webhook(id))?)
    }

    /// All webhooks, by number.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn webhooks(&self) -> Result<Vec<Webhook>> {
        let rows = sqlx::query("SELECT * FROM webhooks ORDER BY id")
            .fetch_all(&mut *self.read().await?)
            .await?;
        rows.iter().map(webhook).collect()
    }

    /// The webhooks that have something to deliver, and when each has.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn webhooks_due(&self) -> Result<Vec<Due>> {
        let rows = sqlx::query(
            "SELECT d.webhook, MIN(d.next_try_at) AS due FROM deliveries d \
             JOIN webhooks w ON w.id = d.webhook WHERE d.status = 'PENDING' \
             GROUP BY d.webhook ORDER BY d.webhook",
        )
        .fetch_all(&mut *self.read().await?)
        .await?;
        rows.iter()
            .map(|row| Ok(Due { webhook: get(row, "webhook")?, at_ms: get(row, "due")? }))
            .collect()
    }

    /// A webhook's deliveries that are due, in the order of their events.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn deliveries_due(
        &self,
        webhook: i64,
        now_ms: i64,
        limit: u32,
    ) -> Result<Vec<Delivery>> {
        let rows = sqlx::query(
            "SELECT * FROM deliveries WHERE webhook = $1 AND status = 'PENDING' AND next_try_at <= $2 \
             ORDER BY seq LIMIT $3",
        )
        .bind(webhook)
        .bind(now_ms)
        .bind(i64::from(limit))
        .fetch_all(&mut *self.read().await?)
        .await?;
        rows.iter().map(delivery).collect()
    }

    /// Writes down how an attempt at a pending delivery went: it ended, or is tried again at `next_try_at_ms`.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn delivery_tried(
        &self,
        delivery: &Delivery,
        attempted: &Attempted,
        next_try_at_ms: Option<i64>,
        now_ms: i64,
    ) -> Result<DeliveryStatus> {
        let (status, finished) = match (&attempted.reason, next_try_at_ms) {
            (None, _) => (DeliveryStatus::Delivered, Some(now_ms)),
            (Some(_), Some(_)) => (DeliveryStatus::Pending, None),
            (Some(_), None) => (DeliveryStatus::GivenUp, Some(now_ms)),
        };
        let mut tx = self.write().await?;
        sqlx::query(
            "UPDATE deliveries SET status = $1, tries = tries + 1, next_try_at = $2, last_try_at = $3, \
             answer = $4, latency_ms = $5, reason = $6, finished_at = $7 \
             WHERE webhook = $8 AND message = $9 AND status = 'PENDING'",
        )
        .bind(status.as_str())
        .bind(next_try_at_ms.unwrap_or(delivery.next_try_at_ms))
        .bind(now_ms)
        .bind(attempted.answer.map(i64::from))
        .bind(count(attempted.latency_ms))
        .bind(attempted.reason.as_deref().map(short))
        .bind(finished)
        .bind(delivery.webhook)
        .bind(delivery.message.as_str())
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(status)
    }

    /// Gives up what waits for a webhook since before a time, because it fails for this reason. Returns how many.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn give_up_deliveries(
        &self,
        webhook: i64,
        before_ms: i64,
        reason: &str,
        now_ms: i64,
    ) -> Result<u64> {
        let mut tx = self.write().await?;
        let given_up = sqlx::query(
            "UPDATE deliveries SET status = 'GIVEN_UP', finished_at = $1, reason = COALESCE(reason, $2) \
             WHERE webhook = $3 AND status = 'PENDING' AND created_at < $4",
        )
        .bind(now_ms)
        .bind(short(reason))
        .bind(webhook)
        .bind(before_ms)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(given_up.rows_affected())
    }

    /// Keeps what became of a test message, which is tried once.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn keep_test(
        &self,
        webhook: i64,
        message: &str,
        kind: &str,
        attempted: &Attempted,
        now_ms: i64,
    ) -> Result<Delivery> {
        let status = match attempted.reason {
            None => DeliveryStatus::Delivered,
            Some(_) => DeliveryStatus::GivenUp,
        };
        let mut tx = self.write().await?;
        let row = sqlx::query(
            "INSERT INTO deliveries (webhook, message, kind, status, created_at, tries, next_try_at, last_try_at, \
             answer, latency_ms, reason, finished_at) VALUES ($1, $2, $3, $4, $5, 1, 0, $5, $6, $7, $8, $5) \
             RETURNING *",
        )
        .bind(webhook)
        .bind(message)
        .bind(kind)
        .bind(status.as_str())
        .bind(now_ms)
        .bind(attempted.answer.map(i64::from))
        .bind(count(attempted.latency_ms))
        .bind(attempted.reason.as_deref().map(short))
        .fetch_one(&mut *tx)
        .await?;
        let kept = delivery(&row)?;
        tx.commit().await?;
        Ok(kept)
    }

    /// The next at most `limit` deliveries of a webhook after the one of that creation time and message, newest first.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when there is no such webhook.
    pub async fn deliveries(
        &self,
        webhook: i64,
        after: Option<(i64, &str)>,
        limit: u32,
    ) -> Result<Vec<Delivery>> {
        self.webhook(webhook).await?;
        let mut wanted = Select::new("SELECT * FROM deliveries WHERE webhook = ");
        wanted.value(webhook);
        if let Some((created, message)) = after {
            wanted.text(" AND (created_at, message) < (").value(created).text(", ");
            wanted.value(message).text(")");
        }
        wanted.text(" ORDER BY created_at DESC, message DESC LIMIT ").value(i64::from(limit));
        let rows = wanted.query().fetch_all(&mut *self.read().await?).await?;
        rows.iter().map(delivery).collect()
    }

    /// How many deliveries wait, and since when the oldest of them does.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn deliveries_waiting(&self) -> Result<(u64, Option<i64>)> {
        let row = sqlx::query(
            "SELECT COUNT(*) AS n, MIN(created_at) AS since FROM deliveries WHERE status = 'PENDING'",
        )
        .fetch_one(&mut *self.read().await?)
        .await?;
        Ok((number(&row, "n")?, get(&row, "since")?))
    }

    /// Forgets deliveries that ended before a time. Returns how many.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn forget_deliveries(&self, before_ms: i64) -> Result<u64> {
        let mut forgotten = 0;
        loop {
            let mut tx = self.write().await?;
            // One whose webhook was removed while its event was numbered has nobody to end it.
            let gone = sqlx::query(
                "DELETE FROM deliveries WHERE (webhook, message) IN (SELECT d.webhook, d.message FROM deliveries d \
                 WHERE d.finished_at < $1 OR (d.status = 'PENDING' AND NOT EXISTS \
                 (SELECT 1 FROM webhooks w WHERE w.id = d.webhook)) LIMIT $2)",
            )
            .bind(before_ms)
            .bind(FORGOTTEN_AT_ONCE)
            .execute(&mut *tx)
            .await?;
            tx.commit().await?;
            forgotten += gone.rows_affected();
            if gone.rows_affected() < FORGOTTEN_AT_ONCE as u64 {
                return Ok(forgotten);
            }
        }
    }
}
