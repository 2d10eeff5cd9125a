//! The conformance suite on a directory and on S3, which is a real server on a real socket.
#![allow(clippy::unwrap_used)]

mod suite;

macro_rules! on_each_bucket {
    ($($name:ident),+ $(,)?) => {
        mod directory {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::suite::$name(super::suite::Place::directory(super::suite::TWO_PARTS_BYTES)).await;
                }
            )+
        }

        mod s3 {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::suite::$name(super::suite::Place::s3(super::suite::TWO_PARTS_BYTES)).await;
                }
            )+
        }

        /// A case that nobody runs is no test.
        #[test]
        fn every_case_runs() {
            let mut here = [$(stringify!($name)),+];
            let mut all: Vec<_> = include_str!("suite/mod.rs")
                .split("pub(crate) async fn ")
                .skip(1)
                .map(|rest| rest.split('(').next().unwrap())
                .collect();
            here.sort_unstable();
            all.sort_unstable();
            assert_eq!(here.as_slice(), all);
        }
    };
}

on_each_bucket!(
    uploaded_copied_and_read_back,
    what_is_not_there_is_not_there,
    the_index_comes_last_and_once,
    two_writers_of_a_part_are_one,
    what_is_written_stays,
    an_upload_that_was_cut_off_goes_on,
    what_an_upload_finds_there_is_proved,
    a_copy_that_was_cut_off_goes_on,
    damage_is_found_and_not_passed_on,
    an_artifact_of_no_bytes_is_an_index,
    what_a_bucket_lost_is_found_and_mended,
    what_is_removed_is_gone_and_comes_again,
    copies_side_by_side_are_each_right,
);
