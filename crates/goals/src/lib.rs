//! Goal stores: where the newest signed goal of each app lies, and who wants to know of it is told.
//!
//! A store takes a goal only if it is newer than what it has ([`GoalStore::put`]), so any number of writers may race
//! and be late: revisions never go back. It is read as a whole ([`GoalStore::list`]), by what has changed since a
//! [`Cursor`] ([`GoalStore::changes`]), or followed ([`GoalStore::watch`]): a watch begins with everything, goes on from
//! its cursor after whatever breaks it, and begins anew when the store no longer knows the way from there.
//!
//! Two stores have this interface, and run the same tests:
//!
//! - [`FileStore`], embedded: a signed file an app. Each region process has one and needs nothing else to start.
//! - [`EtcdStore`]: one key an app in etcd, `PREFIX/CLUSTER/goals/APP`, spoken to by etcd's own JSON gateway, so that no
//!   compiler of protocol buffers is needed to build this. `stored < new` is one transaction of etcd: the value begins with
//!   the revision in fixed digits, and etcd compares values as bytes.
//!
//! A store proves nothing: goals carry their signature, and whoever reads one checks it. Nobody relies on a watch
//! either: an [`EtcdWatch`] asks every few seconds for what has changed, and now and then for everything.

mod api;
mod client;
mod entry;
mod error;
mod etcd;
mod files;
mod store;
mod url;
mod watch;

pub use entry::Entry;
pub use error::{GoalsError, Result};
pub use etcd::EtcdStore;
pub use files::{FileStore, FileWatch, WriteFile};
pub use store::{Changes, Cursor, GoalStore, GoalWatch, Put};
pub use watch::{EtcdWatch, WatchTimes};
