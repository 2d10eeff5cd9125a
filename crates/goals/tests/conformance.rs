//! The conformance suite on each goal store, and what only one of them can show.
//!
//! The cases on etcd use the server of `SHOAL_TEST_ETCD`, or start one: `apt-get install etcd-server`.
#![allow(clippy::unwrap_used)]

mod etcd;
mod suite;

use std::{fs, io, path::Path};

use shoal_goals::{EtcdStore, FileStore, GoalStore as _, Put};
use shoal_test_etcd::Place;

use suite::entry;

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::write(path, bytes)
}

macro_rules! on_each_store {
    ($($name:ident),+ $(,)?) => {
        mod embedded {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
                async fn $name() {
                    let dir = tempfile::tempdir().unwrap();
                    let open = async || {
                        super::FileStore::open(dir.path().into(), super::write, |_| Ok(())).unwrap()
                    };
                    super::suite::$name(open).await;
                }
            )+
        }

        mod on_etcd {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
                async fn $name() {
                    let place = super::Place::create().await.unwrap();
                    let open = async || super::EtcdStore::open(place.url(), "test").unwrap();
                    super::suite::$name(open).await;
                    place.remove().await.unwrap();
                }
            )+
        }

        /// A case that nobody runs is no test.
        #[test]
        fn every_case_runs() {
            let mut here = vec![$(stringify!($name)),+];
            let mut all: Vec<_> = include_str!("suite/mod.rs")
                .split("pub(crate) async fn ")
                .skip(1)
                .map(|rest| rest.split(['(', '<']).next().unwrap())
                .filter(|name| !["put", "told", "until"].contains(name))
                .collect();
            here.sort_unstable();
            all.sort_unstable();
            assert_eq!(here, all);
        }
    };
}

on_each_store!(
    a_goal_is_written_if_it_is_newer,
    changes_are_told_by_cursor,
    a_watch_begins_with_everything_and_goes_on,
    an_empty_store_tells_so_and_then_its_first_goal,
    racing_writers_never_go_back,
    more_than_a_page_of_apps_is_listed,
    all_is_there_after_it_is_opened_again,
);

#[tokio::test]
async fn files_that_are_no_goals_are_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let open = |bad: &'static str| {
        FileStore::open(dir.path().into(), write, move |entry| {
            if entry.app.as_str() == bad { Err("a wrong signature".into()) } else { Ok(()) }
        })
        .unwrap()
    };
    let store = open("none");
    store.put(&entry("good", 1, 1)).await.unwrap();
    store.put(&entry("bad", 1, 1)).await.unwrap();
    fs::write(dir.path().join("torn.goal"), b"half").unwrap();
    let listed = open("bad").list().await.unwrap();
    assert_eq!(suite::revisions(&listed.entries).into_keys().collect::<Vec<_>>(), ["good"]);
    for name in ["bad.goal.invalid", "torn.goal.invalid"] {
        assert!(dir.path().join(name).exists(), "{name}");
    }
}

#[tokio::test]
async fn a_goal_that_could_not_be_written_is_not_known() {
    fn fails(_: &Path, _: &[u8]) -> io::Result<()> {
        Err(io::Error::other("the disk is full"))
    }
    let dir = tempfile::tempdir().unwrap();
    let store = FileStore::open(dir.path().into(), fails, |_| Ok(())).unwrap();
    let error = store.put(&entry("web", 1, 1)).await.unwrap_err().to_string();
    assert!(error.contains("the disk is full") && error.contains("web.goal"), "{error}");
    assert_eq!(store.list_now().entries, []);
    let store = FileStore::open(dir.path().into(), write, |_| Ok(())).unwrap();
    assert_eq!(store.put_now(&entry("web", 1, 1)).unwrap(), Put::Written);
}
