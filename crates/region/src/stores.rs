//! The goal stores beside the coordinators: the world's etcd, and the region's own.
//!
//! Both are followed: what is new and valid is taken as from a coordinator. What this process knows it tells the region's own
//! store, wherever it has it from, so that the region's processes find it there with all else away, one that is new among
//! them. The signed files are the outbox of that: they hold what is to be told.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use shoal_goals::{Entry, EtcdStore, FileWatch, GoalStore as _, GoalWatch as _, GoalsError, Put};
use shoal_proto::AppName;
use tokio::time::Instant;

use crate::{RETRY_MIN, Shared, goals::Accepted, publish, take, wait};

/// How often the region's own store is compared with the files: it may have been restored from a backup.
const COMPARE_INTERVAL: Duration = Duration::from_secs(60);

fn failed(shared: &Shared, name: &str, error: &GoalsError) {
    shared.metrics.store_failures.with_label_values(&[name]).inc();
    tracing::warn!(store = name, %error, "the goal store failed; it is tried again");
}

/// Follows a store. What is taken is on the disk and published before its cursor goes on.
pub(crate) async fn follow(shared: Arc<Shared>, name: &'static str, store: EtcdStore) {
    let mut pause = RETRY_MIN;
    let mut watch = store.watch(None);
    loop {
        match watch.next().await {
            Ok(changes) => {
                if take_all(&shared, name, &changes.entries).await {
                    pause = RETRY_MIN;
                } else {
                    // Everything again, when there may be room.
                    watch = store.watch(None);
                    wait(&mut pause).await;
                }
            }
            Err(error) => {
                failed(&shared, name, &error);
                wait(&mut pause).await;
            }
        }
    }
}

/// Whether all that is valid and new is on the disk.
async fn take_all(shared: &Shared, name: &str, entries: &[Entry]) -> bool {
    let mut all_kept = true;
    for entry in entries {
        // What is known is most of a list: it is neither checked again nor counted.
        if shared.goals.files().has(entry) {
            continue;
        }
        match take(shared, &entry.signed, name) {
            Accepted::Taken => publish(shared, &entry.signed).await,
            Accepted::NotKept(_) => all_kept = false,
            Accepted::Old | Accepted::Refused(_) => {}
        }
    }
    all_kept
}

/// Tells the region's own store what this process knows.
pub(crate) async fn keep(shared: Arc<Shared>, name: &'static str, store: EtcdStore) {
    let mut pause = RETRY_MIN;
    let mut changes = shared.goals.files().watch(None);
    // One an app: the newest that it is not known to have.
    let mut untold = BTreeMap::new();
    let mut compare_at = Instant::now() + COMPARE_INTERVAL;
    loop {
        if untold.is_empty() {
            gather(&mut changes, &mut untold, compare_at).await;
        }
        let told = async {
            if Instant::now() >= compare_at {
                compare(&shared, &store, &mut untold).await?;
                compare_at = Instant::now() + COMPARE_INTERVAL;
            }
            tell(&shared, name, &store, &mut untold).await
        };
        match told.await {
            Ok(()) => pause = RETRY_MIN,
            Err(error) => {
                failed(&shared, name, &error);
                wait(&mut pause).await;
                // What has come meanwhile takes the place of what is older.
                gather(&mut changes, &mut untold, Instant::now()).await;
            }
        }
    }
}

/// Waits for what is new in the files, until a time.
async fn gather(changes: &mut FileWatch, untold: &mut BTreeMap<AppName, Entry>, until: Instant) {
    if let Ok(Ok(changes)) = tokio::time::timeout_at(until, changes.next()).await {
        untold.extend(changes.entries.into_iter().map(|entry| (entry.app.clone(), entry)));
    }
}

async fn tell(
    shared: &Shared,
    name: &str,
    store: &EtcdStore,
    untold: &mut BTreeMap<AppName, Entry>,
) -> Result<(), GoalsError> {
    while let Some((app, entry)) = untold.first_key_value() {
        if let Put::Stale(stored) = store.put(entry).await? {
            take_all(shared, name, std::slice::from_ref(&*stored)).await;
            // It was not to be believed: what is there now is looked at by the next comparison.
            if !shared.goals.files().has(&stored) {
                store.put_over(entry, &stored).await?;
            }
        }
        let app = app.clone();
        untold.remove(&app);
    }
    Ok(())
}

/// Finds what the store lacks.
async fn compare(
    shared: &Shared,
    store: &EtcdStore,
    untold: &mut BTreeMap<AppName, Entry>,
) -> Result<(), GoalsError> {
    let listed = store.list().await?.entries;
    let stored: BTreeMap<_, _> =
        listed.into_iter().map(|entry| (entry.app, entry.revision)).collect();
    for entry in shared.goals.files().list_now().entries {
        if stored.get(&entry.app).is_none_or(|stored| *stored < entry.revision) {
            untold.insert(entry.app.clone(), entry);
        }
    }
    Ok(())
}
