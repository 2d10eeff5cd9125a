//! Requests with an idempotency key: done once, and answered alike as often as they come.
//!
//! A row goes through three states: a coordinator works on it (its `beat` rises), it has made something (`made`, written in
//! the very transaction that made it), it is answered. A coordinator that dies in between leaves a beat that stands still;
//! whoever sees that by its own clock takes the row over ([`Queue::take_over_request`]) and does the request again, which
//! then finds what was made. Nothing here compares the clocks of two machines.

use crate::{
    audit::Actor,
    db::{Queue, Write, get},
    error::{QueueError, Result},
};

/// The most requests that are remembered; the oldest are forgotten first. Ten days of 20,000.
pub const REQUESTS_MAX: i64 = 200_000;

/// What is known of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// Nothing: it is the caller's to do now, from this beat on.
    New,
    /// It was another request that had this key.
    Other,
    /// It is being done, or whoever did it is gone.
    UnderWay {
        /// Rises while somebody does it.
        beat: i64,
    },
    /// It was done, with this answer.
    Answered {
        /// The HTTP status.
        status: u16,
        /// The body.
        body: String,
    },
}

impl Queue {
    /// Begins a request: [`Known::New`] when its caller is to do it.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn begin_request(&self, id: &str, fingerprint: &str, now_ms: i64) -> Result<Known> {
        // What the request makes is committed later and synced, and with that this is. A server that fails before has made nothing,
        // and whoever does the request finds no note of it any more ([`made`]).
        let sql = format!(
            "INSERT INTO requests (id, fingerprint, created_at, beat) SELECT $1, $2, $3, 0 FROM {} WHERE 1 = 1 \
             ON CONFLICT (id) DO NOTHING RETURNING id",
            self.dialect().unsynced()
        );
        let query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(id).bind(fingerprint).bind(now_ms);
        match self.once(query).await?.is_empty() {
            false => Ok(Known::New),
            true => self.known_request(id, fingerprint).await,
        }
    }

    /// What is known of a request that was begun; [`Known::New`] when it is so no longer, and is to be begun again.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn known_request(&self, id: &str, fingerprint: &str) -> Result<Known> {
        let row =
            self.look_at(sqlx::query("SELECT * FROM requests WHERE id = $1").bind(id)).await?;
        let Some(row) = row else { return Ok(Known::New) };
        if get::<String>(&row, "fingerprint")? != fingerprint {
            return Ok(Known::Other);
        }
        match (get::<Option<i64>>(&row, "status")?, get::<Option<i64>>(&row, "beat")?) {
            (Some(status), _) => Ok(Known::Answered {
                status: u16::try_from(status).unwrap_or(500),
                body: get::<Option<String>>(&row, "body")?.unwrap_or_default(),
            }),
            (None, beat) => Ok(Known::UnderWay { beat: beat.unwrap_or_default() }),
        }
    }

    /// Says that a request is still being done.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn beat_request(&self, id: &str) -> Result<()> {
        let sql = "UPDATE requests SET beat = beat + 1 WHERE id = $1 AND status IS NULL";
        self.once(sqlx::query(sql).bind(id)).await?;
        Ok(())
    }

    /// Takes over a request whose beat stands still. False: it does not.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn take_over_request(&self, id: &str, beat: i64) -> Result<bool> {
        let mut tx = self.write().await?;
        let done = sqlx::query(
            "UPDATE requests SET beat = beat + 1 WHERE id = $1 AND beat = $2 AND status IS NULL",
        )
        .bind(id)
        .bind(beat)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    /// Keeps a request's answer.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn answer_request(&self, id: &str, status: u16, body: &str) -> Result<()> {
        // A server that fails right now may forget it, and never what was made: who asks again has it done again, which finds that.
        let sql = format!(
            "UPDATE requests SET status = $1, body = $2, beat = NULL FROM {} WHERE id = $3",
            self.dialect().unsynced()
        );
        let query = sqlx::query(sqlx::AssertSqlSafe(sql));
        self.once(query.bind(i64::from(status)).bind(body).bind(id)).await?;
        Ok(())
    }

    /// Forgets a request that was refused, and so has made nothing: it may come again.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn drop_request(&self, id: &str) -> Result<()> {
        let mut tx = self.write().await?;
        sqlx::query("DELETE FROM requests WHERE id = $1 AND made IS NULL AND status IS NULL")
            .bind(id)
            .execute(&mut *tx)
            .await?;
        tx.commit().await
    }

    /// Forgets requests that came before `before_ms`, and the oldest of more than [`REQUESTS_MAX`]. Returns how many.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn forget_requests(&self, before_ms: i64) -> Result<u64> {
        let mut tx = self.write().await?;
        let gone = sqlx::query(
            "DELETE FROM requests WHERE created_at < $1 OR created_at < \
             (SELECT created_at FROM requests ORDER BY created_at DESC LIMIT 1 OFFSET $2)",
        )
        .bind(before_ms)
        .bind(REQUESTS_MAX)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(gone.rows_affected())
    }
}

/// What a request has made already, if anything: its row is locked to the end of the transaction, so that of two who do
/// the same request one makes something and the other finds it.
pub(crate) async fn made(tx: &mut Write, actor: &Actor) -> Result<Option<i64>> {
    let Some(id) = actor.request.as_deref() else { return Ok(None) };
    let sql = format!("SELECT made FROM requests WHERE id = $1{}", tx.dialect.for_update());
    let row = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(id).fetch_optional(&mut **tx).await?;
    // Nobody could tell any more what it has made.
    let row = row.ok_or(QueueError::Forgotten)?;
    get(&row, "made")
}

/// Notes what a request has made, in the transaction that makes it.
pub(crate) async fn note(tx: &mut Write, actor: &Actor, made: i64) -> Result<()> {
    let Some(id) = actor.request.as_deref() else { return Ok(()) };
    sqlx::query("UPDATE requests SET made = $1 WHERE id = $2")
        .bind(made)
        .bind(id)
        .execute(&mut **tx)
        .await?;
    Ok(())
}
