//! Tokens by which new machines join: stored hashed, good for a time and a number of uses.

use shoal_proto::{RegionName, goal::Labels};

use crate::{
    audit::{self, Actor},
    db::{Queue, get, json, number, parsed_opt, to_json},
    error::{QueueError, Result},
    trust::{MemberSeen, put_member},
};

/// The most tokens that wait to be used; more are refused.
pub const JOIN_TOKENS_MAX: i64 = 10_000;

/// What a token gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinGrant {
    /// The role of the certificate.
    pub role: String,
    /// The region, for the roles that have one.
    pub region: Option<RegionName>,
    /// The zone that the machine's configuration names.
    pub zone: Option<String>,
    /// The labels that it names.
    pub labels: Labels,
}

/// A token, without what makes it one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Its public name.
    pub id: String,
    /// What it gives.
    pub grant: JoinGrant,
    /// How many machines may still join by it.
    pub uses_left: u32,
    /// When it was made.
    pub created_at_ms: i64,
    /// Until when it is good.
    pub expires_at_ms: i64,
    /// Who made it.
    pub created_by: String,
}

fn token(row: &sqlx::any::AnyRow) -> Result<JoinToken> {
    Ok(JoinToken {
        id: get(row, "id")?,
        grant: JoinGrant {
            role: get(row, "role")?,
            region: parsed_opt(row, "region")?,
            zone: get(row, "zone")?,
            labels: json(row, "labels")?,
        },
        uses_left: number(row, "uses_left")?,
        created_at_ms: get(row, "created_at")?,
        expires_at_ms: get(row, "expires_at")?,
        created_by: get(row, "created_by")?,
    })
}

impl Queue {
    /// Keeps a new token by its `hash`.
    ///
    /// # Errors
    /// [`QueueError::Conflict`] when [`JOIN_TOKENS_MAX`] are there, and when the database fails.
    pub async fn add_join_token(&self, new: &JoinToken, hash: &str, actor: &Actor) -> Result<()> {
        let now_ms = new.created_at_ms;
        let mut tx = self.write().await?;
        // What is over is of use to nobody; its making and its uses are in the audit log.
        sqlx::query("DELETE FROM join_tokens WHERE expires_at <= $1 OR uses_left = 0")
            .bind(now_ms)
            .execute(&mut *tx)
            .await?;
        let row =
            sqlx::query("SELECT COUNT(*) AS tokens FROM join_tokens").fetch_one(&mut *tx).await?;
        if get::<i64>(&row, "tokens")? >= JOIN_TOKENS_MAX {
            return Err(QueueError::Conflict(format!(
                "{JOIN_TOKENS_MAX} join tokens wait to be used: revoke some with shoal join-token revoke"
            )));
        }
        let grant = &new.grant;
        sqlx::query(
            "INSERT INTO join_tokens (id, hash, role, region, zone, labels, uses_left, created_at, \
             expires_at, created_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        )
        .bind(new.id.as_str())
        .bind(hash)
        .bind(grant.role.as_str())
        .bind(grant.region.as_ref().map(RegionName::as_str))
        .bind(grant.zone.as_deref())
        .bind(to_json(&grant.labels)?)
        .bind(i64::from(new.uses_left))
        .bind(now_ms)
        .bind(new.expires_at_ms)
        .bind(new.created_by.as_str())
        .execute(&mut *tx)
        .await?;
        let detail = format!("role {}, {} uses", grant.role, new.uses_left);
        audit::record(&mut tx, now_ms, actor, "join_token.create", &new.id, &detail).await?;
        tx.commit().await
    }

    /// The tokens that are good at `now_ms`, newest first.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn join_tokens(&self, now_ms: i64) -> Result<Vec<JoinToken>> {
        let rows = sqlx::query(
            "SELECT * FROM join_tokens WHERE expires_at > $1 AND uses_left > 0 \
             ORDER BY created_at DESC, id LIMIT $2",
        )
        .bind(now_ms)
        .bind(JOIN_TOKENS_MAX)
        .fetch_all(&mut *self.read().await?)
        .await?;
        rows.iter().map(token).collect()
    }

    /// Makes a token good for nothing.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when there is none of this name, and when the database fails.
    pub async fn revoke_join_token(&self, id: &str, actor: &Actor, now_ms: i64) -> Result<()> {
        let mut tx = self.write().await?;
        let gone =
            sqlx::query("DELETE FROM join_tokens WHERE id = $1").bind(id).execute(&mut *tx).await?;
        if gone.rows_affected() == 0 {
            return Err(QueueError::NotFound(format!(
                "no join token '{id}': shoal join-token list lists them"
            )));
        }
        audit::record(&mut tx, now_ms, actor, "join_token.revoke", id, "").await?;
        tx.commit().await
    }

    /// What a token of this hash gives, if it is good at `now_ms`. It is not used by that.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn join_grant(&self, hash: &str, now_ms: i64) -> Result<Option<JoinGrant>> {
        let row = sqlx::query(
            "SELECT * FROM join_tokens WHERE hash = $1 AND expires_at > $2 AND uses_left > 0",
        )
        .bind(hash)
        .bind(now_ms)
        .fetch_optional(&mut *self.read().await?)
        .await?;
        Ok(row.as_ref().map(token).transpose()?.map(|token| token.grant))
    }

    /// Uses a token once for `member`, with its audit row. Of several who use the last one at the same moment, one does.
    ///
    /// # Errors
    /// [`QueueError::Conflict`] when it is used up, over or unknown, or another key has the machine's name; and when
    /// the database fails.
    pub async fn use_join_token(
        &self,
        hash: &str,
        member: &MemberSeen,
        origin: &str,
        now_ms: i64,
    ) -> Result<()> {
        let mut tx = self.write().await?;
        let used = sqlx::query(
            "UPDATE join_tokens SET uses_left = uses_left - 1 \
             WHERE hash = $1 AND expires_at > $2 AND uses_left > 0 RETURNING id, uses_left",
        )
        .bind(hash)
        .bind(now_ms)
        .fetch_optional(&mut *tx)
        .await?;
        let used = used.ok_or_else(|| {
            QueueError::Conflict(
                "the join token is unknown, used up or over: make one with shoal join-token create"
                    .into(),
            )
        })?;
        let other = sqlx::query(
            "SELECT 1 AS taken FROM members WHERE machine = $1 AND node <> $2 AND revoked_at IS NULL \
             UNION SELECT 1 FROM machines WHERE name = $1 AND node IS NOT NULL AND node <> $2",
        )
        .bind(member.machine.as_str())
        .bind(member.node.to_string())
        .fetch_optional(&mut *tx)
        .await?;
        if other.is_some() {
            return Err(QueueError::Conflict(format!(
                "there is a machine '{0}' with another key: join under another --name, or revoke that one first: \
                 shoal pki revoke {0}",
                member.machine
            )));
        }
        // The machine as an agent stands beside the machines once its region process tells of it.
        put_member(&mut tx, member, now_ms).await?;
        let actor =
            Actor { name: member.machine.to_string(), origin: origin.into(), request: None };
        let (id, left): (String, i64) = (get(&used, "id")?, get(&used, "uses_left")?);
        let detail = format!("{} of role {}, {left} uses left", member.node, member.role);
        audit::record(&mut tx, now_ms, &actor, "join_token.use", &id, &detail).await?;
        tx.commit().await
    }
}
