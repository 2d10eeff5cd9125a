//! The conformance suite on each database, and what only one of them can show.
//!
//! The cases on PostgreSQL use the server of `SHOAL_TEST_POSTGRES`, or start one: `apt-get install postgresql`.
#![allow(clippy::unwrap_used)]

mod suite;

use std::time::{Duration, Instant};

use shoal_queue::{Bell, Claimant, Queue, sqlite_url};
use shoal_test_postgres::Database;
use sqlx::Connection as _;

macro_rules! on_each_database {
    ($($name:ident),+ $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
                async fn $name() {
                    let dir = tempfile::tempdir().unwrap();
                    let url = shoal_queue::sqlite_url(&dir.path().join("test.sqlite"));
                    super::suite::$name(&url).await;
                }
            )+
        }

        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
                async fn $name() {
                    let database = super::Database::create().await.unwrap();
                    super::suite::$name(database.url()).await;
                    database.remove().await.unwrap();
                }
            )+
        }

        /// A case that nobody runs is no test.
        #[test]
        fn every_case_runs() {
            let here = [$(stringify!($name)),+];
            let all: Vec<_> = [
                include_str!("suite/access.rs"),
                include_str!("suite/events.rs"),
                include_str!("suite/copies.rs"),
                include_str!("suite/jobs.rs"),
                include_str!("suite/outbox.rs"),
                include_str!("suite/queue.rs"),
                include_str!("suite/records.rs"),
                include_str!("suite/together.rs"),
                include_str!("suite/trust.rs"),
            ]
            .iter()
            .flat_map(|text| text.split("pub(crate) async fn ").skip(1))
            .map(|rest| rest.split('(').next().unwrap())
            .collect();
            let mut sorted = here.to_vec();
            let mut cases = all;
            sorted.sort_unstable();
            cases.sort_unstable();
            assert_eq!(sorted, cases);
        }
    };
}

on_each_database!(
    tokens_count_until_they_end,
    a_request_is_done_once,
    two_who_do_one_request_make_one_thing,
    pages_neither_skip_nor_repeat,
    audit_rows_are_found_by_what_they_say,
    jobs_are_taken_in_order_and_once,
    sixteen_claimants_never_share_a_job,
    only_the_present_lease_moves_a_job,
    an_end_told_twice_is_one_end,
    a_failure_is_tried_again_in_its_old_place_until_the_last_attempt,
    a_waiting_job_is_cancelled_at_once,
    a_running_job_is_cancelled_by_its_worker,
    a_cancelled_job_whose_worker_is_lost_is_cancelled,
    a_lost_job_goes_back_to_its_old_place_and_fails_after_its_last_attempt,
    a_heartbeat_in_time_beats_the_reaper,
    a_success_brings_its_artifact_and_copies,
    jobs_of_unknown_apps_are_refused,
    copies_are_owned_tried_again_and_taken_over,
    publishing_is_idempotent,
    an_artifact_is_found_by_name_and_id,
    revisions_rise_and_goals_are_told_by_cursor,
    goals_wait_in_the_outbox_until_they_are_told,
    what_a_store_lacks_goes_into_the_outbox,
    the_highest_epoch_is_the_databases_or_a_machines,
    only_whole_artifacts_of_the_app_are_deployed,
    a_refused_goal_leaves_nothing_behind,
    concurrent_goals_get_different_revisions,
    a_new_goal_supersedes_and_bad_ends_are_told,
    going_back_finds_what_ran_before,
    urgent_jobs_first_and_the_oldest_of_each_priority,
    a_commit_is_built_once_at_a_time_and_joining_raises_its_priority,
    who_asks_at_once_gets_one_job,
    backoff_begins_with_the_third_attempt_and_keeps_the_place,
    a_paused_queue_gives_nothing_and_says_why,
    a_drained_worker_takes_nothing_and_keeps_what_it_has,
    a_restarted_workers_job_is_given_on_at_once,
    a_late_process_does_not_get_its_name_back,
    workers_are_forgotten_unless_drained,
    depth_counts_what_waits_and_runs,
    an_older_report_replaces_nothing,
    changed_machines_are_told_once_in_order,
    machines_that_are_gone_are_forgotten,
    progress_is_summed_by_region,
    a_big_batch_is_kept_whole,
    regions_follow_the_configuration,
    every_change_is_audited,
    fifty_workers_of_two_coordinators_run_nothing_twice,
    the_oldest_first_however_many_claim,
    heartbeats_that_come_together_are_each_answered,
    calls_that_are_given_up_harm_nobody,
    one_end_of_an_attempt_wins,
    coordinators_may_start_at_once,
    one_name_published_at_once_is_one_artifact,
    batches_and_forgetting_do_not_block_each_other,
    a_copy_is_taken_once_and_taken_over,
    goals_are_told_in_the_order_of_their_commits,
    each_change_is_an_event_in_the_order_of_its_commit,
    waves_and_pauses_are_told_once,
    an_undone_change_is_no_event,
    where_a_log_is_is_written_down_once,
    events_of_many_at_once_are_numbered_without_a_gap,
    events_are_kept_for_a_time_and_while_a_webhook_waits,
    a_webhook_is_told_what_it_wants_from_then_on,
    a_delivery_is_tried_until_it_is_taken_or_given_up,
    a_push_is_taken_once_and_marks_its_job,
    the_main_branch_is_deployed_forward_and_never_over_a_rollback,
    history_shows_builds_deployments_and_rollbacks,
    old_history_goes_but_not_what_is_there,
    a_damaged_copy_is_not_deployable_until_it_is_copied_again,
    a_damaged_main_bucket_is_told_and_repaired,
    what_was_inspected_longest_ago_is_next,
    what_a_region_missed_comes_in_use_first_then_the_newest,
    the_last_of_each_app_and_what_is_used_stay,
    names_that_share_an_encoding_share_its_end,
    a_deleted_artifact_stays_on_record_and_is_made_again,
    a_removal_is_begun_once_and_taken_over,
    what_is_drained_is_removed_later_unless_it_is_wanted_again,
    objects_seen_before_a_removal_give_no_name,
    names_given_and_removals_begun_at_once_never_meet,
    a_goal_or_a_pin_at_the_moment_of_deletion_wins_or_is_refused,
    bundles_are_numbered_one_after_the_other_and_lead_on,
    a_revoked_machine_is_forgotten_with_all_its_keys,
    present_goals_are_signed_again_and_told_again,
    a_join_token_is_used_as_often_as_it_says_and_not_after_its_time,
    of_many_who_use_a_token_at_once_one_gets_it,
    region_processes_say_how_their_machines_stand,
);

#[tokio::test(flavor = "multi_thread")]
async fn all_is_there_after_it_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let url = sqlite_url(&dir.path().join("test.sqlite"));
    let queue = Queue::open(&url).await.unwrap();
    suite::app(&queue, "web").await;
    let job = suite::submit(&queue, "web", 1).await;
    queue.close().await;
    let queue = Queue::open(&url).await.unwrap();
    assert_eq!(queue.job(job.id).await.unwrap(), job);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_processes_on_one_file_never_meet_a_locked_database() {
    let dir = tempfile::tempdir().unwrap();
    let url = sqlite_url(&dir.path().join("test.sqlite"));
    let (one, two) = (Queue::open(&url).await.unwrap(), Queue::open(&url).await.unwrap());
    suite::app(&one, "web").await;
    let mut tasks = tokio::task::JoinSet::new();
    for at in 0..8 {
        let queue = if at % 2 == 0 { one.clone() } else { two.clone() };
        tasks.spawn(async move {
            for _ in 0..25 {
                suite::submit(&queue, "web", 1).await;
                assert!(suite::claim(&queue, 1).await.is_some());
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    assert_eq!(one.running().await.unwrap().len(), 200);
}

/// Looks until it holds, for as long as a duty may take to pass on.
async fn within_ten_seconds(mut look: impl AsyncFnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !look().await {
        assert!(start.elapsed() < Duration::from_secs(10), "not within 10 s");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    start.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sqlite_the_one_process_is_on_duty() {
    let dir = tempfile::tempdir().unwrap();
    let queue = Queue::open(&sqlite_url(&dir.path().join("test.sqlite"))).await.unwrap();
    let mut duty = queue.duty();
    assert!(duty.hold().await && duty.hold().await);
    duty.release().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn on_postgres_one_process_at_a_time_is_on_duty() {
    let database = Database::create().await.unwrap();
    let (one, two) =
        (Queue::open(database.url()).await.unwrap(), Queue::open(database.url()).await.unwrap());
    let (mut first, mut second) = (one.duty(), two.duty());
    assert!(first.hold().await);
    assert!(!second.hold().await && first.hold().await, "it stays where it is");
    // Given up, it passes on at once.
    first.release().await;
    assert!(second.hold().await && !first.hold().await);
    // Its holder is gone without a word.
    drop(second);
    within_ten_seconds(async || first.hold().await).await;
    // The server ends the holder's session, as when it is restarted: nobody has the duty twice.
    let mut third = two.duty();
    assert!(!third.hold().await);
    let end_sessions = "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks JOIN pg_database d \
                        ON d.oid = database WHERE locktype = 'advisory' AND d.datname = '";
    let name = database.url().rsplit('/').next().unwrap();
    database.run(&format!("{end_sessions}{name}'")).await.unwrap();
    assert!(third.hold().await);
    assert!(!first.hold().await, "it finds out");
    // A holder that stands still loses it, though its connection is open; when it goes on, it finds out.
    within_ten_seconds(async || first.hold().await).await;
    assert!(!third.hold().await && first.hold().await);
    database.remove().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn on_postgres_changes_do_not_wait_for_each_others_numbers() {
    let database = Database::create().await.unwrap();
    let queue = suite::deployable(database.url()).await;
    // What a change would lock that takes its numbers from counters and has not been committed yet.
    let mut slow = sqlx::PgConnection::connect(database.url()).await.unwrap();
    let lock = "BEGIN; SELECT * FROM counters WHERE name IN ('audit', 'job', 'rollout') FOR UPDATE";
    sqlx::raw_sql(lock).execute(&mut slow).await.unwrap();
    let others = suite::change_this_and_that(&queue);
    tokio::time::timeout(Duration::from_secs(20), others).await.expect("they wait for it");
    sqlx::raw_sql("COMMIT").execute(&mut slow).await.unwrap();
    let numbers: Vec<_> = queue.audit(9).await.unwrap().iter().map(|row| row.id).collect();
    assert!(numbers.is_sorted_by(|a, b| a > b) && numbers.len() >= 4, "{numbers:?}");
    slow.close().await.unwrap();
    database.remove().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn on_postgres_bells_are_heard_by_the_others() {
    let database = Database::create().await.unwrap();
    let (one, two) =
        (Queue::open(database.url()).await.unwrap(), Queue::open(database.url()).await.unwrap());
    let (heard, mut hears) = tokio::sync::mpsc::unbounded_channel();
    let mut tasks = tokio::task::JoinSet::new();
    let (rings, listens) = (one.clone(), two.clone());
    let (echo, mut echoes) = tokio::sync::mpsc::unbounded_channel();
    tasks.spawn(async move { rings.carry_bells(|bell| echo.send(bell).unwrap()).await });
    for bell in Bell::ALL {
        assert_eq!(echoes.recv().await, Some(bell));
    }
    tasks.spawn(async move { listens.carry_bells(|bell| heard.send(bell).unwrap()).await });
    // At its start it does not know what it missed.
    for bell in Bell::ALL {
        assert_eq!(hears.recv().await, Some(bell));
    }
    one.ring(Bell::Goals);
    assert_eq!(hears.recv().await, Some(Bell::Goals));
    // Many at once are a few messages, and none is lost.
    for _ in 0..1_000 {
        one.ring(Bell::Jobs);
    }
    one.ring(Bell::Rollouts);
    let mut jobs = 0;
    while let Some(bell) = hears.recv().await {
        match bell {
            Bell::Rollouts => break,
            _ => jobs += 1,
        }
    }
    assert!((1..1_000).contains(&jobs), "{jobs}");
    // Who rang hears the others, and nothing of its own.
    two.ring(Bell::Upkeep);
    assert_eq!(echoes.recv().await, Some(Bell::Upkeep));
    database.remove().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn on_postgres_broken_connections_are_replaced() {
    let database = Database::create().await.unwrap();
    let queue = Queue::open(database.url()).await.unwrap();
    suite::app(&queue, "web").await;
    let (heard, mut hears) = tokio::sync::mpsc::unbounded_channel();
    let listens = queue.clone();
    tokio::spawn(async move { listens.carry_bells(|bell| heard.send(bell).unwrap()).await });
    for _ in Bell::ALL {
        hears.recv().await.unwrap();
    }
    let mut duty = queue.duty();
    assert!(duty.hold().await);
    let mut kept = vec![];
    for _ in 0..8 {
        kept.push(suite::submit(&queue, "web", 1).await);
    }
    suite::claim(&queue, 2).await.unwrap();
    // As a restart of the server does: every session is ended, those at hand included.
    let name = database.url().rsplit('/').next().unwrap();
    let end_all = format!(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'"
    );
    database.run(&end_all).await.unwrap();
    // A call may meet a broken connection, and the next one does not.
    let (ask, by) = (suite::ask("web"), suite::actor());
    within_ten_seconds(async || queue.submit(&ask, &by, 3).await.is_ok()).await;
    let worker = || "w".to_string();
    let worker = Claimant { worker: worker(), host: worker(), incarnation: worker() };
    within_ten_seconds(async || queue.claim(&worker, "again", 4).await.is_ok()).await;
    within_ten_seconds(async || duty.hold().await).await;
    // What may have been missed meanwhile is rung.
    for _ in Bell::ALL {
        hears.recv().await.unwrap();
    }
    for job in kept {
        queue.job(job.id).await.unwrap();
    }
    database.remove().await.unwrap();
}
