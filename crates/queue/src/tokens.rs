//! Tokens of the API: kept as hashes, given roles, bound to apps, revoked.
//!
//! A secret is 32 random bytes, so a plain fast hash of it can't be guessed back; whoever reads the database can't use it.

use std::collections::BTreeSet;

use shoal_proto::{AppName, MachineName, state::TokenRole};
use sqlx::any::AnyRow;

use crate::{
    audit::{self, Actor},
    db::{self, Queue, corrupt, get, parsed, to_json},
    error::{QueueError, Result},
};

/// The most tokens that are in force at once.
pub const TOKENS_MAX: i64 = 10_000;

/// A token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Its number.
    pub id: i64,
    /// Its name, which the audit log tells as `token:NAME`.
    pub name: MachineName,
    /// What its holder may do.
    pub role: TokenRole,
    /// The apps that it is bound to; none: all.
    pub apps: Option<BTreeSet<AppName>>,
    /// When it was made.
    pub created_at_ms: i64,
    /// Who made it.
    pub created_by: String,
    /// From when on it counts no more.
    pub expires_at_ms: Option<i64>,
    /// When it was revoked.
    pub revoked_at_ms: Option<i64>,
    /// Who revoked it.
    pub revoked_by: Option<String>,
    /// When it was used last, to a minute.
    pub last_used_at_ms: Option<i64>,
}

/// A token to be made.
#[derive(Debug, Clone)]
pub struct NewToken {
    /// Its name.
    pub name: MachineName,
    /// The hash of its secret.
    pub hash: String,
    /// What its holder may do.
    pub role: TokenRole,
    /// The apps that it is bound to; none: all.
    pub apps: Option<BTreeSet<AppName>>,
    /// From when on it counts no more.
    pub expires_at_ms: Option<i64>,
}

fn token(row: &AnyRow) -> Result<Token> {
    let apps: Option<String> = get(row, "apps")?;
    let apps = apps.map(|text| serde_json::from_str(&text).map_err(|error| corrupt("apps", error)));
    Ok(Token {
        id: get(row, "id")?,
        name: parsed(row, "name")?,
        role: parsed(row, "role")?,
        apps: apps.transpose()?,
        created_at_ms: get(row, "created_at")?,
        created_by: get(row, "created_by")?,
        expires_at_ms: get(row, "expires_at")?,
        revoked_at_ms: get(row, "revoked_at")?,
        revoked_by: get(row, "revoked_by")?,
        last_used_at_ms: get(row, "last_used_at")?,
    })
}

impl Queue {
    /// Makes a token.
    ///
    /// # Errors
    /// [`QueueError::Conflict`] when the name is taken, or too many are in force.
    pub async fn create_token(&self, new: &NewToken, actor: &Actor, now_ms: i64) -> Result<Token> {
        let mut tx = self.write().await?;
        let id = db::next(&mut tx, "token").await?;
        let count = sqlx::query(
            "SELECT COUNT(*) AS n FROM tokens \
             WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > $1)",
        )
        .bind(now_ms)
        .fetch_one(&mut *tx)
        .await?;
        if get::<i64>(&count, "n")? >= TOKENS_MAX {
            return Err(QueueError::Conflict(format!(
                "there are {TOKENS_MAX} tokens in force: revoke some with shoal token revoke"
            )));
        }
        let apps = new.apps.as_ref().map(to_json).transpose()?;
        let done = sqlx::query(
            "INSERT INTO tokens (id, name, hash, role, apps, created_at, created_by, expires_at) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (name) DO NOTHING",
        )
        .bind(id)
        .bind(new.name.as_str())
        .bind(new.hash.as_str())
        .bind(new.role.as_str())
        .bind(apps.as_deref())
        .bind(now_ms)
        .bind(actor.name.as_str())
        .bind(new.expires_at_ms)
        .execute(&mut *tx)
        .await?;
        if done.rows_affected() == 0 {
            return Err(QueueError::Conflict(format!(
                "there is or was a token '{}' already: give another name; a secret that was lost can't be \
                 shown again",
                new.name
            )));
        }
        let of = apps.map(|apps| format!(" of {apps}")).unwrap_or_default();
        let detail = format!("{}{of}", new.role);
        audit::record(&mut tx, now_ms, actor, "token.create", new.name.as_str(), &detail).await?;
        tx.commit().await?;
        Ok(Token {
            id,
            name: new.name.clone(),
            role: new.role,
            apps: new.apps.clone(),
            created_at_ms: now_ms,
            created_by: actor.name.clone(),
            expires_at_ms: new.expires_at_ms,
            revoked_at_ms: None,
            revoked_by: None,
            last_used_at_ms: None,
        })
    }

    /// The token whose secret has this hash, if it is in force.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn token_of(&self, hash: &str, now_ms: i64) -> Result<Option<Token>> {
        let query = sqlx::query(
            "SELECT * FROM tokens WHERE hash = $1 AND revoked_at IS NULL \
             AND (expires_at IS NULL OR expires_at > $2)",
        );
        let row = self.look_at(query.bind(hash).bind(now_ms)).await?;
        row.as_ref().map(token).transpose()
    }

    /// Notes that a token was used.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn token_used(&self, id: i64, now_ms: i64) -> Result<()> {
        let mut tx = self.write().await?;
        sqlx::query(
            "UPDATE tokens SET last_used_at = $1 \
             WHERE id = $2 AND (last_used_at IS NULL OR last_used_at < $1)",
        )
        .bind(now_ms)
        .bind(id)
        .execute(&mut *tx)
        .await?;
        tx.commit().await
    }

    /// The next at most `limit` tokens after the one of that number, oldest first; those that are no longer in force
    /// until they are forgotten.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn tokens(&self, after: i64, limit: u32) -> Result<Vec<Token>> {
        let rows = sqlx::query("SELECT * FROM tokens WHERE id > $1 ORDER BY id LIMIT $2")
            .bind(after)
            .bind(i64::from(limit))
            .fetch_all(&mut *self.read().await?)
            .await?;
        rows.iter().map(token).collect()
    }

    /// Revokes a token: it counts no more from the moment that this returns, at any coordinator. One that is revoked
    /// already stays as it is.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when there is none of that name.
    pub async fn revoke_token(
        &self,
        name: &MachineName,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<Token> {
        let mut tx = self.write().await?;
        let done = sqlx::query(
            "UPDATE tokens SET revoked_at = $1, revoked_by = $2 WHERE name = $3 AND revoked_at IS NULL",
        )
        .bind(now_ms)
        .bind(actor.name.as_str())
        .bind(name.as_str())
        .execute(&mut *tx)
        .await?;
        let row = sqlx::query("SELECT * FROM tokens WHERE name = $1")
            .bind(name.as_str())
            .fetch_optional(&mut *tx)
            .await?;
        let row = row.ok_or_else(|| {
            QueueError::NotFound(format!("no token '{name}': shoal token list shows them"))
        })?;
        let token = token(&row)?;
        if done.rows_affected() == 1 {
            audit::record(&mut tx, now_ms, actor, "token.revoke", name.as_str(), "").await?;
            tx.commit().await?;
        }
        Ok(token)
    }

    /// Forgets tokens that ended before `before_ms`; their names are free again. Returns how many.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn forget_tokens(&self, before_ms: i64) -> Result<u64> {
        let mut tx = self.write().await?;
        let gone = sqlx::query("DELETE FROM tokens WHERE revoked_at < $1 OR expires_at < $1")
            .bind(before_ms)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(gone.rows_affected())
    }
}
