//! The demo on engines that run already: PostgreSQL, etcd and S3 together.

use std::{path::PathBuf, process::Command};

use serde_json::Value;
use shoal_test_postgres::Database;
use shoal_test_s3::{BUCKET, Server, WRITER};

use crate::harness::{SHOAL, walk};

/// A demo that is left running; ended with its test.
struct Kept {
    dir: PathBuf,
    environment: Vec<(String, String)>,
}

impl Kept {
    fn shoal(&self, args: &[&str]) -> (bool, String, String) {
        let mut command = Command::new(SHOAL);
        command.args(args).envs(self.environment.clone()).env("SHOAL_LOG", "warn");
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if self.dir.join("demo.json").exists() {
            self.shoal(&["demo", "--stop", self.dir.to_str().unwrap()]);
        }
    }
}

fn objects(server: &Server) -> Vec<PathBuf> {
    walk(&server.dir().join(BUCKET), &|_| true)
}

async fn goals_in(etcd: &shoal_test_etcd::Server) -> u64 {
    // "demo-" and what comes after it: each demo has a name of its own under the default prefix.
    let all = serde_json::json!({ "key": "AA==", "range_end": "AA==", "count_only": true });
    let found = etcd.call("kv/range", &all).await.unwrap();
    found["count"].as_str().map_or(0, |count| count.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_main_job_runs_on_postgresql_etcd_and_s3_together() {
    let database = Database::create().await.unwrap();
    let etcd = shoal_test_etcd::Server::start().await.unwrap();
    let s3 = Server::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let demo = Kept { dir: dir.path().join("demo"), environment: s3.environment(WRITER) };
    let place = demo.dir.to_str().unwrap();
    let bucket = format!("s3://{BUCKET}/demo");
    let (etcd_url, shape) =
        (etcd.url(), ["--size", "20MiB", "--agents", "2", "--region-processes", "1"]);
    let engines =
        ["--database", database.url(), "--goals", &etcd_url, "--bucket", &bucket, "--json"];
    let kept = ["demo", "--keep", "--data-dir", place];
    let (ok, told, said) = demo.shoal(&[&kept[..], &shape, &engines].concat());
    assert!(ok, "{said}");
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["ok"], true, "{told}");
    for region in ["region-1", "region-2"] {
        assert_eq!(told["replication"][region]["status"], "COMPLETE", "{told}");
        assert_eq!(told["regions"][region]["active"], 1, "{told}");
    }
    // Each of them was what was used: the database knows the job, etcd the goal, the bucket the objects.
    database
        .run_in("SELECT 1 / (SELECT COUNT(*) FROM jobs WHERE status = 'SUCCEEDED')")
        .await
        .unwrap();
    assert!(!demo.dir.join("coordinator/data/shoal.sqlite").exists());
    assert_eq!(goals_in(&etcd).await, 1);
    assert!(!demo.dir.join("buckets").exists());
    // A part and an index in the main bucket and in each region's, all under a name that no other demo has.
    let there = objects(&s3);
    assert_eq!(there.len(), 6, "{there:?}");
    let (own, _) = said.split_once("; the end deletes them").unwrap();
    let own = own.rsplit_once("s3://").unwrap().1;
    assert!(own.starts_with(&format!("{BUCKET}/demo/demo-")), "{own}");

    // Its end leaves nothing in them that somebody would stumble over.
    let (ok, _, said) = demo.shoal(&["demo", "--stop", place]);
    assert!(ok, "{said}");
    assert_eq!(goals_in(&etcd).await, 0);
    assert_eq!(objects(&s3), Vec::<PathBuf>::new());
    // A database that was used is refused, before anything of its is changed.
    let (ok, _, said) = demo.shoal(&[&["demo"][..], &shape, &engines].concat());
    assert!(!ok && said.contains("--database is in use"), "{said}");
    assert_eq!(objects(&s3), Vec::<PathBuf>::new());
    database.remove().await.unwrap();
}
