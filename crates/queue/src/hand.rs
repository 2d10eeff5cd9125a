//! Connections at hand for calls that are one statement.
//!
//! A pool tries a connection each time that it comes back, which is a round trip, and these calls are no more than one
//! themselves. So some connections stay out: a call that went well leaves its own for the next one. Any other end
//! (an error, a caller who hung up) gives it back to the pool, which finds out what is left of it.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use sqlx::{
    Any, AnyPool,
    any::{AnyArguments, AnyRow},
    pool::PoolConnection,
    query::Query,
};
use tokio::sync::Semaphore;

use crate::{db::connection, dialect::Dialect, error::Result};

/// A connection, and since when it rests.
type Resting = (PoolConnection<Any>, Instant);

/// Connections at hand.
pub(crate) struct Hand {
    /// As many calls at once; the others wait in line.
    places: Semaphore,
    resting: Mutex<Vec<Resting>>,
}

impl Hand {
    /// Room for so many; the pool has to have more.
    pub(crate) fn new(places: u32) -> Self {
        Self { places: Semaphore::new(places as usize), resting: Mutex::default() }
    }

    fn resting(&self) -> MutexGuard<'_, Vec<Resting>> {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a statement that is a transaction by itself. When this returns it is committed: the rows come before
    /// the commit does, so the answer is read to its end.
    pub(crate) async fn run(
        &self,
        pool: &AnyPool,
        dialect: Dialect,
        query: Query<'_, Any, AnyArguments>,
    ) -> Result<Vec<AnyRow>> {
        // Never closed: an error is none.
        let _place = self.places.acquire().await.ok();
        // The one that rested for the shortest time: what is not needed grows old, and is tried again.
        let resting = self.resting().pop();
        let mut connection = match resting {
            Some((connection, since)) if since.elapsed() < dialect.try_after() => connection,
            other => {
                drop(other);
                connection(pool).await?
            }
        };
        let rows = query.fetch_all(&mut *connection).await?;
        self.resting().push((connection, Instant::now()));
        Ok(rows)
    }

    /// Gives all back to the pool, which is about to close.
    pub(crate) fn empty(&self) {
        self.resting().clear();
    }
}
