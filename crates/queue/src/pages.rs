//! Lists in pages: each page begins behind the last row of the one before, so rows that come meanwhile move nothing.

use std::collections::{BTreeMap, BTreeSet};

use shoal_proto::{AppName, MachineName, RegionName, state::MachineState};
use sqlx::{Any, any::AnyArguments, query::Query};

use crate::{
    apps::{self, AppRow},
    artifacts::{self, Artifact},
    db::{Queue, parsed},
    error::Result,
    jobs::{self, Job},
    machines::{self, Machine},
};

/// How many machines' reports one query reads, far below any database's limit of parameters.
const MACHINES_CHUNK: usize = 1_000;

/// A query with more values than that has a list in it.
const VALUES_KEPT_MAX: usize = 6;

/// Which reports of machines are wanted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reports<'a> {
    /// About these apps; none: about all.
    pub apps: Option<&'a BTreeSet<AppName>>,
    /// Only of failures.
    pub failed: bool,
}

/// A query that is put together: its text, and what is bound to `$1`, `$2`, ...
pub(crate) struct Select {
    sql: String,
    values: Vec<Value>,
}

pub(crate) enum Value {
    Text(String),
    Number(i64),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl Select {
    pub(crate) fn new(sql: &str) -> Self {
        Self { sql: sql.into(), values: Vec::new() }
    }

    pub(crate) fn text(&mut self, sql: &str) -> &mut Self {
        self.sql.push_str(sql);
        self
    }

    pub(crate) fn value(&mut self, value: impl Into<Value>) -> &mut Self {
        self.values.push(value.into());
        let number = self.values.len();
        self.text(&format!("${number}"))
    }

    /// `column IN (...)`; with no names nothing fits.
    pub(crate) fn among<'a>(
        &mut self,
        column: &str,
        names: impl Iterator<Item = &'a str>,
    ) -> &mut Self {
        self.text(column).text(" IN (NULL");
        for name in names {
            self.text(", ").value(name);
        }
        self.text(")")
    }

    pub(crate) fn of_apps(&mut self, column: &str, apps: Option<&BTreeSet<AppName>>) -> &mut Self {
        match apps {
            Some(apps) => self.text(" AND ").among(column, apps.iter().map(AppName::as_str)),
            None => self,
        }
    }

    fn of_failed(&mut self, column: &str, failed: bool) -> &mut Self {
        let states = MachineState::ALL.iter().filter(|state| state.is_failure());
        match failed {
            true => self.text(" AND ").among(column, states.map(|state| state.as_str())),
            false => self,
        }
    }

    pub(crate) fn query(&self) -> Query<'_, Any, AnyArguments> {
        // Few texts but for the lists of names: those are not worth a place among the prepared statements.
        let kept = self.values.len() <= VALUES_KEPT_MAX;
        let query = sqlx::query(sqlx::AssertSqlSafe(self.sql.clone())).persistent(kept);
        self.values.iter().fold(query, |query, value| match value {
            Value::Text(text) => query.bind(text.as_str()),
            Value::Number(number) => query.bind(*number),
        })
    }
}

impl Queue {
    /// The next at most `limit` jobs after the one of that creation time and number, newest first; of these apps or of
    /// all.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn jobs_page(
        &self,
        apps: Option<&BTreeSet<AppName>>,
        after: Option<(i64, i64)>,
        limit: u32,
    ) -> Result<Vec<Job>> {
        let (created, id) = after.unwrap_or((i64::MAX, i64::MAX));
        let mut select = Select::new("SELECT * FROM jobs WHERE (created_at, id) < (");
        select.value(created).text(", ").value(id).text(")").of_apps("app", apps);
        select.text(" ORDER BY created_at DESC, id DESC LIMIT ").value(i64::from(limit));
        select.query().fetch_all(&mut *self.read().await?).await?.iter().map(jobs::job).collect()
    }

    /// The next at most `limit` artifacts after the one of that creation time and name, newest first; of these apps or of
    /// all.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn artifacts_page(
        &self,
        apps: Option<&BTreeSet<AppName>>,
        after: Option<(i64, &str)>,
        limit: u32,
    ) -> Result<Vec<Artifact>> {
        let mut select = Select::new("SELECT * FROM artifacts WHERE ");
        match after {
            Some((created, name)) => {
                select.text("created_at <= ").value(created).text(" AND (created_at < ");
                select.value(created).text(" OR name > ").value(name).text(")");
            }
            None => _ = select.text("1 = 1"),
        }
        select.of_apps("app", apps);
        select.text(" ORDER BY created_at DESC, name LIMIT ").value(i64::from(limit));
        let rows = select.query().fetch_all(&mut *self.read().await?).await?;
        let mut found = rows.iter().map(artifacts::artifact).collect::<Result<Vec<_>>>()?;
        self.add_copies(&mut found).await?;
        Ok(found)
    }

    /// The next at most `limit` apps after the one of that name, by name; these or all.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn apps_page(
        &self,
        apps: Option<&BTreeSet<AppName>>,
        after: &str,
        limit: u32,
    ) -> Result<Vec<AppRow>> {
        let mut select = Select::new("SELECT name, spec FROM apps WHERE name > ");
        select.value(after).of_apps("name", apps);
        select.text(" ORDER BY name LIMIT ").value(i64::from(limit));
        self.look(select.query()).await?.iter().map(apps::app).collect()
    }

    /// The next at most `limit` machines after the one of that name, by name, with their apps: of one region or of all;
    /// where only some reports are wanted, the machines that made one of these, and only these reports.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn machines_page(
        &self,
        region: Option<&RegionName>,
        wanted: Reports<'_>,
        after: &str,
        limit: u32,
    ) -> Result<Vec<Machine>> {
        let mut select = Select::new("SELECT * FROM machines m WHERE m.name > ");
        select.value(after);
        if let Some(region) = region {
            select.text(" AND m.region = ").value(region.as_str());
        }
        if wanted.apps.is_some() || wanted.failed {
            select.text(" AND EXISTS (SELECT 1 FROM machine_apps a WHERE a.machine = m.name");
            select.of_apps("a.app", wanted.apps).of_failed("a.state", wanted.failed).text(")");
        }
        select.text(" ORDER BY m.name LIMIT ").value(i64::from(limit));
        let rows = select.query().fetch_all(&mut *self.read().await?).await?;
        let mut found = rows.iter().map(machines::machine).collect::<Result<Vec<_>>>()?;
        // Not by the database's order, which may be of another language than ours.
        let places: BTreeMap<MachineName, usize> =
            found.iter().enumerate().map(|(at, machine)| (machine.seen.name.clone(), at)).collect();
        let names: Vec<_> = places.keys().collect();
        for chunk in names.chunks(MACHINES_CHUNK) {
            let mut select = Select::new("SELECT * FROM machine_apps WHERE ");
            select
                .among("machine", chunk.iter().map(|name| name.as_str()))
                .of_apps("app", wanted.apps)
                .of_failed("state", wanted.failed);
            select.text(" ORDER BY machine, app");
            for row in &select.query().fetch_all(&mut *self.read().await?).await? {
                let name: MachineName = parsed(row, "machine")?;
                if let Some(at) = places.get(&name) {
                    found[*at].apps.push(machines::report(row)?);
                }
            }
        }
        Ok(found)
    }
}
