//! The conformance suite on SQLite, and what only a file can show.

mod suite;

use shoal_queue::{Queue, sqlite_url};

macro_rules! on_sqlite {
    ($($name:ident),+ $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
            async fn $name() {
                let dir = tempfile::tempdir().unwrap();
                let url = sqlite_url(&dir.path().join("test.sqlite"));
                suite::$name(&url).await;
            }
        )+

        /// A case that nobody runs is no test.
        #[test]
        fn every_case_runs() {
            let here = [$(stringify!($name)),+];
            let all: Vec<_> = [include_str!("suite/jobs.rs"), include_str!("suite/records.rs")]
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

on_sqlite!(
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
    only_whole_artifacts_of_the_app_are_deployed,
    a_refused_goal_leaves_nothing_behind,
    concurrent_goals_get_different_revisions,
    a_new_goal_supersedes_and_bad_ends_are_told,
    going_back_finds_what_ran_before,
    an_older_report_replaces_nothing,
    changed_machines_are_told_once_in_order,
    machines_that_are_gone_are_forgotten,
    progress_is_summed_by_region,
    a_big_batch_is_kept_whole,
    regions_follow_the_configuration,
    every_change_is_audited,
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
