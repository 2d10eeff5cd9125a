//! The interface of a goal store.

use std::future::Future;

use crate::{Entry, Result};

/// A place in the history of a store: of this store in this life of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    pub(crate) store: u64,
    pub(crate) revision: u64,
}

impl Cursor {
    /// How many changes the store had seen: etcd's own revision, or the embedded store's count.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }
}

/// What became of a goal that was put into a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    /// It was newer than what was there, and is safe now.
    Written,
    /// The very same goal was there: a repeated call, or another writer.
    Known,
    /// Nothing was written: this was there, which is newer, or another goal of the same revision.
    Stale(Box<Entry>),
}

/// Goals of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// Where the store stood: nothing before it is missing here.
    pub cursor: Cursor,
    /// The newest goal of each app that has changed.
    pub entries: Vec<Entry>,
    /// Whether these are all goals of the store, and not only what has changed.
    pub complete: bool,
}

/// A store of the newest goal of each app.
pub trait GoalStore: Send + Sync {
    /// What follows its changes.
    type Watch: GoalWatch;

    /// Writes a goal if its revision is higher than that of what is there. It is on the disk when this returns, and
    /// may be repeated after an error.
    ///
    /// # Errors
    /// [`crate::GoalsError`] when it is not known to be written.
    fn put(&self, entry: &Entry) -> impl Future<Output = Result<Put>> + Send;

    /// All goals.
    ///
    /// # Errors
    /// [`crate::GoalsError`] when the store does not answer.
    fn list(&self) -> impl Future<Output = Result<Changes>> + Send;

    /// What has changed since a cursor; everything when the store does not know it (any more).
    ///
    /// # Errors
    /// [`crate::GoalsError`] when the store does not answer.
    fn changes(&self, after: Cursor) -> impl Future<Output = Result<Changes>> + Send;

    /// Follows the changes after a cursor; without one, begins with everything.
    fn watch(&self, after: Option<Cursor>) -> Self::Watch;
}

/// Follows the changes of a store.
pub trait GoalWatch: Send {
    /// Waits for changes. Each comes at least once; what came in between may be left out if it is not the newest any
    /// more. After an error it is called again, after a pause, and goes on where it was.
    ///
    /// # Errors
    /// [`crate::GoalsError`] when the store does not answer.
    fn next(&mut self) -> impl Future<Output = Result<Changes>> + Send;
}
