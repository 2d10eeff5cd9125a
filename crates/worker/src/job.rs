//! One attempt at a job: fetch, check out, build, cut, upload; beside it heartbeats, the log, and a long poll that tells
//! at once when an operator cancels it.

use std::{
    io::SeekFrom,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use backon::{ExponentialBuilder, Retryable as _};
use bytes::Bytes;
use shoal_client::{
    Client,
    types::{ClaimedJob, FinishRequest, LeaseRef, Outcome, WatchRequest},
};
use shoal_origin::Bucket;
use shoal_proto::manifest::PieceSize;
use shoal_store::{Cut, CutOptions, cut};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio_util::sync::CancellationToken;

use crate::{
    build::{BuildCommand, output},
    processes::{Signs, end},
    worker::Worker,
};

/// How often new output goes to the coordinator.
const LOG_INTERVAL: Duration = Duration::from_millis(500);

/// How much of it goes in one call.
const LOG_CHUNK_BYTES: u64 = 256 << 10;

/// How long a finished job is reported before it is given up: then it is lost, and will be built again.
const FINISH_RETRIES: usize = 60;

/// How often an artifact is uploaded again whose objects are gone when its job's end is told.
const UPLOADS_AGAIN_MAX: u32 = 20;

/// How long the coordinator is asked to wait until it answers that nobody cancelled the job, and the pause after a
/// question that failed.
const WATCH_WAIT_S: u32 = 5;
const WATCH_PAUSE: Duration = Duration::from_secs(1);

/// How long the end of a cancelled job's log may hold up its end.
const CANCELLED_LOG_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the end of a job may take to be told when the worker stops; the reaper finds what was not.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Why an attempt ends before its work does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// An operator cancelled the job.
    Cancelled,
    /// The job was given to another worker.
    Lost,
}

/// A directory that is removed with everything in it.
struct BuildDir(PathBuf);

impl BuildDir {
    /// Ends what a build has left running.
    fn end_processes(&self) {
        end(&Signs { dir: &self.0, leader: None, orphans: false });
    }
}

impl Drop for BuildDir {
    fn drop(&mut self) {
        self.end_processes();
        if let Err(error) = std::fs::remove_dir_all(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %self.0.display(), %error, "cannot remove a build's directory");
        }
    }
}

/// Works on `claimed` to its end, and says how it ended.
pub(crate) async fn work(worker: Arc<Worker>, claimed: ClaimedJob, stopping: CancellationToken) {
    let id = claimed.job.id;
    let lease = LeaseRef { attempt: claimed.job.attempt, lease: claimed.lease.clone() };
    tracing::info!(job = id, app = %claimed.app.name, commit = %claimed.job.commit, attempt = lease.attempt, "begun");
    let dir = worker.builds.join(format!("{id}-{}", lease.attempt));
    let _ = std::fs::remove_dir_all(&dir);
    let dir = BuildDir(dir);
    let log = worker.logs.join(format!("{id}-{}.log", lease.attempt));
    let _ = std::fs::remove_file(&log);

    let sent = AtomicU64::new(0);
    let outcome = {
        let tail = tail_log(&worker.client, id, &lease, &log, &sent);
        let work = async {
            tokio::select! {
                outcome = attempt(&worker, &claimed, &dir.0, &log) => Ok(outcome),
                stop = heartbeats(&worker.client, &claimed, &lease) => Err(stop),
                stop = cancelled(&worker.client, id, &lease) => Err(stop),
                () = stopping.cancelled() => Ok(Ended {
                    outcome: Outcome::Failed { reason: "the worker was stopped".into(), retry: true },
                    upload: None,
                }),
            }
        };
        tokio::select! {
            outcome = work => outcome,
            () = tail => Err(Stop::Lost),
        }
    };
    // Nothing of it runs when its end is told; its files, which may be many, are removed after that.
    dir.end_processes();
    // Told for as long as it takes, but a worker that is to stop stops.
    let told = async {
        let (outcome, upload) = match outcome {
            Ok(Ended { outcome, upload }) => (Ok(outcome), upload),
            Err(stop) => (Err(stop), None),
        };
        let rest = send_rest_of_log(&worker.client, id, &lease, &log, &sent);
        if matches!(outcome, Err(Stop::Cancelled)) {
            let _ = tokio::time::timeout(CANCELLED_LOG_TIMEOUT, rest).await;
        } else {
            rest.await;
        }
        tell(&worker, &claimed, &lease, outcome, upload.as_ref()).await;
    };
    let stopped = async {
        stopping.cancelled().await;
        tokio::time::sleep(STOP_TIMEOUT).await;
    };
    tokio::select! {
        () = told => {}
        () = stopped => tracing::warn!(job = id, "stopped before the coordinator took the job's end"),
    }
    drop(dir);
    let _ = std::fs::remove_file(&log);
}

/// How an attempt's work ended.
struct Ended {
    outcome: Outcome,
    /// With a success: what was uploaded, in case that it is wanted again.
    upload: Option<Upload>,
}

/// What is uploaded, and where it goes.
struct Upload {
    parts: PathBuf,
    cut: Cut,
    bucket: String,
}

impl Upload {
    /// Uploads what the main bucket lacks of it.
    async fn run(&self, worker: &Worker) -> Result<(), Failure> {
        let failed = |error: &dyn std::fmt::Display| Failure {
            reason: format!("cannot upload to the main bucket: {error}"),
            retry: true,
        };
        let bucket = Bucket::open(&self.bucket).map_err(|error| failed(&error))?;
        let Cut { index, index_bytes, encoding, .. } = &self.cut;
        let stats = bucket.upload(&self.parts, index, index_bytes, encoding, |_| {}).await;
        worker.metrics.uploaded_bytes.inc_by(stats.map_err(|error| failed(&error))?.bytes);
        Ok(())
    }
}

/// Tells how an attempt ended, unless it is another worker's by now. When the main bucket has not all of it any more
/// (something deleted the same content at this moment), `upload` brings it again, and the job is held for as long as that takes.
async fn tell(
    worker: &Worker,
    claimed: &ClaimedJob,
    lease: &LeaseRef,
    outcome: Result<Outcome, Stop>,
    upload: Option<&Upload>,
) {
    let id = claimed.job.id;
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(Stop::Cancelled) => Outcome::Cancelled,
        Err(Stop::Lost) => {
            tracing::warn!(job = id, "the job was given to another worker");
            worker.metrics.ended("lost");
            return;
        }
    };
    let name = match &outcome {
        Outcome::Succeeded { .. } => "succeeded",
        Outcome::Failed { reason, .. } => {
            tracing::info!(job = id, %reason, "failed");
            "failed"
        }
        Outcome::Cancelled => "cancelled",
    };
    worker.metrics.ended(name);
    let request = FinishRequest { lease: lease.clone(), outcome };
    let tell = || worker.client.finish(id, &request);
    let patient = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(500))
        .with_max_delay(Duration::from_secs(10))
        .with_max_times(FINISH_RETRIES)
        .with_jitter();
    for left in (0..=UPLOADS_AGAIN_MAX).rev() {
        match tell.retry(patient).when(shoal_client::ClientError::is_transient).await {
            Ok(job) => {
                tracing::info!(job = id, status = %job.status, "ended");
                return;
            }
            Err(error) if error.code() == Some("not_whole") && left > 0 => {
                tracing::warn!(job = id, %error, "uploading again");
                let Some(upload) = upload else { return };
                tokio::select! {
                    uploaded = upload.run(worker) => match uploaded {
                        Ok(()) => continue,
                        Err(Failure { reason, .. }) => tracing::warn!(job = id, reason, "not uploaded"),
                    },
                    _ = heartbeats(&worker.client, claimed, lease) => {}
                }
            }
            Err(error) => {
                tracing::warn!(job = id, %error, "the coordinator did not take the job's end");
            }
        }
        return;
    }
}

/// Fetches, builds, cuts and uploads.
async fn attempt(worker: &Worker, claimed: &ClaimedJob, dir: &Path, log: &Path) -> Ended {
    match steps(worker, claimed, dir, log).await {
        Ok(upload) => {
            let (artifact, encoding) = (upload.cut.index.manifest.artifact, upload.cut.encoding);
            let outcome = Outcome::Succeeded { artifact, encoding };
            Ended { outcome, upload: Some(upload) }
        }
        Err(Failure { reason, retry }) => {
            Ended { outcome: Outcome::Failed { reason, retry }, upload: None }
        }
    }
}

/// Why there is no artifact.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// One line for people.
    pub(crate) reason: String,
    /// Whether another attempt may do better.
    pub(crate) retry: bool,
}

/// A failure that another attempt would meet again.
fn for_good(reason: String) -> Failure {
    Failure { reason, retry: false }
}

async fn steps(
    worker: &Worker,
    claimed: &ClaimedJob,
    dir: &Path,
    log: &Path,
) -> Result<Upload, Failure> {
    let (app, job) = (&claimed.app, &claimed.job);
    let local = |error: std::io::Error| Failure {
        reason: format!("the worker's disk: {error}"),
        retry: true,
    };
    std::fs::create_dir_all(dir).map_err(local)?;
    std::fs::File::create(log).map_err(local)?;
    let mirror = worker.git.fetch(&app.repository, &job.commit).await?;
    let checkout = dir.join("checkout");
    worker.git.checkout(&mirror, &job.commit, &checkout).await.map_err(for_good)?;

    let mut env: Vec<_> = worker.config.build_env.clone().into_iter().collect();
    env.extend([
        ("SHOAL_APP".into(), app.name.to_string()),
        ("SHOAL_COMMIT".into(), job.commit.to_string()),
        ("SHOAL_JOB".into(), job.id.to_string()),
    ]);
    BuildCommand {
        command: &app.build_command,
        dir: &checkout,
        build_dir: dir,
        env,
        user: worker.user,
        alone: worker.config.slots == 1,
        timeout: Duration::from_secs(u64::from(app.build_timeout_s)),
        log,
        log_max_bytes: worker.config.log_max_mib << 20,
    }
    .run()
    .await
    .map_err(for_good)?;
    let file = output(&checkout, &app.output).map_err(for_good)?;

    let parts = dir.join("parts");
    std::fs::create_dir_all(&parts).map_err(local)?;
    let options = CutOptions {
        piece_size: app.piece_size_bytes.and_then(PieceSize::from_bytes),
        level: worker.config.zstd_level,
        ..CutOptions::default()
    };
    let cut_parts = parts.clone();
    let cut = tokio::task::spawn_blocking(move || cut(&file, &cut_parts, &options, |_| {}))
        .await
        .map_err(|error| for_good(error.to_string()))?
        .map_err(|error| Failure {
            reason: format!("cannot cut the output: {error}"),
            retry: true,
        })?;
    let upload = Upload { parts, cut, bucket: claimed.bucket.clone() };
    upload.run(worker).await?;
    Ok(upload)
}

/// Says that the worker still builds, until it is told to stop. A coordinator that is away is no reason to.
async fn heartbeats(client: &Client, claimed: &ClaimedJob, lease: &LeaseRef) -> Stop {
    let every = Duration::from_secs_f64(claimed.heartbeat_s.max(0.05));
    loop {
        tokio::time::sleep(every).await;
        match client.heartbeat(claimed.job.id, lease).await {
            Ok(reply) if reply.cancel => return Stop::Cancelled,
            Ok(_) => {}
            Err(error) if error.code() == Some("lease_lost") => return Stop::Lost,
            Err(error) => tracing::warn!(job = claimed.job.id, %error, "heartbeat not taken"),
        }
    }
}

/// Waits until an operator cancels the job. A coordinator that is away, or too old to tell, is no reason to stop: it
/// says so in its answer to a heartbeat, too.
async fn cancelled(client: &Client, job: i64, lease: &LeaseRef) -> Stop {
    let request = WatchRequest { lease: lease.clone(), wait_s: WATCH_WAIT_S };
    loop {
        match client.watch_job(job, &request).await {
            Ok(reply) if reply.cancel => return Stop::Cancelled,
            Ok(_) => {}
            Err(error) if error.code() == Some("lease_lost") => return Stop::Lost,
            Err(error) => {
                tracing::debug!(job, %error, "cannot wait for a cancel");
                tokio::time::sleep(WATCH_PAUSE.mul_f64(rand::random_range(0.5..1.5))).await;
            }
        }
    }
}

/// Sends the log as it grows; ends only when the coordinator says that the lease is lost.
async fn tail_log(client: &Client, job: i64, lease: &LeaseRef, log: &Path, sent: &AtomicU64) {
    loop {
        tokio::time::sleep(LOG_INTERVAL).await;
        match send_log(client, job, lease, log, sent).await {
            Ok(()) => {}
            Err(error) if error.code() == Some("lease_lost") => return,
            Err(error) => tracing::debug!(job, %error, "log not taken"),
        }
    }
}

async fn send_rest_of_log(
    client: &Client,
    job: i64,
    lease: &LeaseRef,
    log: &Path,
    sent: &AtomicU64,
) {
    if let Err(error) = send_log(client, job, lease, log, sent).await {
        tracing::debug!(job, %error, "the end of the log was not taken");
    }
}

/// Sends what the log has beyond the first `sent` bytes. What was on its way when the last call was given up goes once
/// more, and is not added twice.
async fn send_log(
    client: &Client,
    job: i64,
    lease: &LeaseRef,
    log: &Path,
    sent: &AtomicU64,
) -> Result<(), shoal_client::ClientError> {
    let Ok(mut file) = tokio::fs::File::open(log).await else { return Ok(()) };
    loop {
        let mut bytes = Vec::new();
        let offset = sent.load(Ordering::Relaxed);
        let read = async {
            file.seek(SeekFrom::Start(offset)).await?;
            (&mut file).take(LOG_CHUNK_BYTES).read_to_end(&mut bytes).await
        };
        match read.await {
            Ok(0) | Err(_) => return Ok(()),
            Ok(read) => {
                client.append_log(job, lease, offset, Bytes::from(bytes)).await?;
                sent.fetch_add(read as u64, Ordering::Relaxed);
            }
        }
    }
}
