//! The store in etcd: a key an app.

use std::{sync::Arc, time::Duration};

use shoal_proto::AppName;

use crate::{
    Changes, Cursor, Entry, EtcdWatch, GoalStore, GoalsError, Put, Result, WatchTimes,
    api::{
        Blob, Compare, DeleteRequest, DeleteResponse, Header, KeyValue, Long, Op, PutRequest,
        RangeRequest, RangeResponse, TxnRequest, TxnResponse,
    },
    client::Client,
    url::Address,
};

/// How many goals a page has: 500 of them are 2 MiB at most, within etcd's longest message.
const PAGE: u64 = 500;

/// The most goals of one cluster that are read: one an app.
const GOALS_MAX: usize = 10_000;

/// How often a value that is no goal is replaced while others write to the same key.
const REPLACE_TRIES: u32 = 8;

/// The store. Clones share it.
#[derive(Clone)]
pub struct EtcdStore {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    /// What all keys begin with: ends with a slash.
    prefix: String,
    times: WatchTimes,
}

impl EtcdStore {
    /// The goals of a cluster in the etcd at `url`, `etcd://USER:PASSWORD@HOST:PORT,HOST:PORT/PREFIX` or `etcds://...`. This
    /// reads the files that it names, and does not connect yet.
    ///
    /// # Errors
    /// [`GoalsError::Address`] says what is wrong with it, without its password.
    pub fn open(url: &str, cluster: &str) -> Result<Self> {
        Self::open_with(url, cluster, WatchTimes::default())
    }

    /// [`EtcdStore::open`], with other times for its watches.
    ///
    /// # Errors
    /// As [`EtcdStore::open`].
    pub fn open_with(url: &str, cluster: &str, times: WatchTimes) -> Result<Self> {
        let address = Address::parse(url)?;
        let prefix = format!("{}/{cluster}/goals/", address.prefix);
        let client = Client::new(&address)?;
        Ok(Self { inner: Arc::new(Inner { client, prefix, times }) })
    }

    /// Where its keys lie: they begin with this.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.inner.prefix
    }

    pub(crate) fn client(&self) -> &Client {
        &self.inner.client
    }

    /// The first key behind all of its own.
    pub(crate) fn end(&self) -> Blob {
        let mut end = self.inner.prefix.as_bytes().to_vec();
        // The prefix ends with a slash; '0' is the byte behind it.
        end.pop();
        end.push(b'0');
        Blob(end)
    }

    /// Reads a key and its value; what is no goal is said in the log, and left out.
    pub(crate) fn entry(&self, found: &KeyValue) -> Option<Entry> {
        let key = String::from_utf8_lossy(&found.key.0);
        let app = key.strip_prefix(&self.inner.prefix).unwrap_or(&key);
        match Entry::read(app, &found.value.0) {
            Ok(entry) => Some(entry),
            Err(error) => {
                tracing::warn!(%key, error, "a value in etcd is no goal: ignored");
                None
            }
        }
    }

    /// All goals that were written after a revision of etcd; 0: all.
    async fn written_after(&self, revision: u64) -> Result<(Header, Vec<Entry>)> {
        let (mut first, mut entries, mut keys) = (None, Vec::new(), 0);
        let mut key = Blob::from(self.inner.prefix.as_str());
        loop {
            let min_mod_revision = if revision == 0 { 0 } else { revision + 1 };
            let request = RangeRequest {
                key,
                range_end: Some(self.end()),
                limit: Long(PAGE),
                min_mod_revision: Long(min_mod_revision),
            };
            let page: RangeResponse = self.inner.client.call("kv/range", &request).await?;
            // The first page's revision: what is written while the others are read is told again.
            let first = first.get_or_insert(page.header);
            keys += page.kvs.len();
            entries.extend(page.kvs.iter().filter_map(|found| self.entry(found)));
            match page.kvs.last() {
                Some(last) if page.more && keys < GOALS_MAX => {
                    let mut next = last.key.0.clone();
                    next.push(0);
                    key = Blob(next);
                }
                _ if page.more => {
                    let prefix = self.inner.prefix.clone();
                    return Err(GoalsError::TooMany { most: GOALS_MAX, prefix });
                }
                _ => return Ok((first.clone(), entries)),
            }
        }
    }

    /// Writes over this goal, if it is still there, whatever its revision: its reader does not believe its signature. False:
    /// another one is there.
    ///
    /// # Errors
    /// As for [`GoalStore::put`].
    pub async fn put_over(&self, entry: &Entry, stored: &Entry) -> Result<bool> {
        let refused = |message| GoalsError::Refused { message };
        let key = self.key(&entry.app);
        let value = Blob::from(entry.value().map_err(refused)?.as_str());
        let stored = Blob::from(stored.value().map_err(refused)?.as_str());
        let request = TxnRequest {
            compare: vec![Compare { value: Some(stored), ..compare(&key, "VALUE", "EQUAL") }],
            success: vec![put(&key, &value)],
            failure: vec![],
        };
        let answer: TxnResponse = self.inner.client.call("kv/txn", &request).await?;
        Ok(answer.succeeded)
    }

    /// Takes all goals of the cluster away: it is gone.
    ///
    /// # Errors
    /// [`GoalsError`] when etcd does not answer.
    pub async fn clear(&self) -> Result<()> {
        let key = Blob::from(self.inner.prefix.as_str());
        let request = DeleteRequest { key, range_end: self.end() };
        let _: DeleteResponse = self.inner.client.call("kv/deleterange", &request).await?;
        Ok(())
    }

    fn key(&self, app: &AppName) -> Blob {
        Blob::from(format!("{}{app}", self.inner.prefix).as_str())
    }

    /// Writes over what is no goal, if it is still that.
    async fn replace(&self, entry: &Entry, key: &Blob, value: &Blob, seen: Long) -> Result<bool> {
        tracing::warn!(app = %entry.app, prefix = self.inner.prefix, "replacing a value in etcd that is no goal");
        let request = TxnRequest {
            compare: vec![Compare { mod_revision: Some(seen), ..compare(key, "MOD", "EQUAL") }],
            success: vec![put(key, value)],
            failure: vec![],
        };
        let answer: TxnResponse = self.inner.client.call("kv/txn", &request).await?;
        Ok(answer.succeeded)
    }
}

fn compare(key: &Blob, target: &'static str, result: &'static str) -> Compare {
    Compare { key: key.clone(), target, result, version: None, value: None, mod_revision: None }
}

fn put(key: &Blob, value: &Blob) -> Op {
    Op::Put(PutRequest { key: key.clone(), value: value.clone() })
}

/// Writes the value if there is none, or a lesser one than `rank`; else reads what is there.
fn put_if_newer(key: &Blob, value: &Blob, rank: &str) -> TxnRequest {
    let read = RangeRequest {
        key: key.clone(),
        range_end: None,
        limit: Long(1),
        min_mod_revision: Long(0),
    };
    // A comparison with the value of a key that is not there is always false: hence two steps.
    let is_less = Compare { value: Some(rank.into()), ..compare(key, "VALUE", "LESS") };
    let or_newer = TxnRequest {
        compare: vec![is_less],
        success: vec![put(key, value)],
        failure: vec![Op::Range(read)],
    };
    TxnRequest {
        compare: vec![Compare { version: Some(Long(0)), ..compare(key, "VERSION", "EQUAL") }],
        success: vec![put(key, value)],
        failure: vec![Op::Txn(or_newer)],
    }
}

impl GoalStore for EtcdStore {
    type Watch = EtcdWatch;

    async fn put(&self, entry: &Entry) -> Result<Put> {
        let refused = |message| GoalsError::Refused { message };
        let key = self.key(&entry.app);
        let value = Blob::from(entry.value().map_err(refused)?.as_str());
        let request = put_if_newer(&key, &value, &entry.rank());
        for _ in 0..REPLACE_TRIES {
            let answer: TxnResponse = self.inner.client.call("kv/txn", &request).await?;
            let inner = answer.responses.into_iter().next().and_then(|found| found.response_txn);
            if answer.succeeded || inner.as_ref().is_some_and(|inner| inner.succeeded) {
                return Ok(Put::Written);
            }
            let stored = inner
                .and_then(|inner| inner.responses.into_iter().next()?.response_range)
                .and_then(|range| range.kvs.into_iter().next())
                .ok_or_else(|| GoalsError::Unexpected {
                    endpoint: self.inner.client.endpoint().into(),
                    text: "a transaction that neither wrote nor read".into(),
                })?;
            match Entry::read(entry.app.as_str(), &stored.value.0) {
                Ok(stored) if stored == *entry => return Ok(Put::Known),
                Ok(stored) => return Ok(Put::Stale(Box::new(stored))),
                Err(_) => {
                    if self.replace(entry, &key, &value, stored.mod_revision).await? {
                        return Ok(Put::Written);
                    }
                }
            }
        }
        Err(refused(format!("others write what is no goal to {}{}", self.inner.prefix, entry.app)))
    }

    async fn list(&self) -> Result<Changes> {
        let (header, entries) = self.written_after(0).await?;
        Ok(Changes { cursor: cursor(&header), entries, complete: true })
    }

    async fn changes(&self, after: Cursor) -> Result<Changes> {
        let (header, entries) = self.written_after(after.revision).await?;
        let cursor = cursor(&header);
        // Another etcd, or one that was restored from a backup: what was known of it is void.
        if cursor.store != after.store || cursor.revision < after.revision {
            return self.list().await;
        }
        Ok(Changes { cursor, entries, complete: false })
    }

    fn watch(&self, after: Option<Cursor>) -> EtcdWatch {
        EtcdWatch::new(self.clone(), after, self.inner.times)
    }
}

pub(crate) fn cursor(header: &Header) -> Cursor {
    Cursor { store: header.cluster_id.0, revision: header.revision.0 }
}

impl Default for WatchTimes {
    fn default() -> Self {
        Self { poll: Duration::from_secs(5), relist: Duration::from_secs(60) }
    }
}
