//! `shoal queue`, `shoal workers`.

use std::time::Duration;

use clap::Subcommand;
use shoal_client::types::{HaltRequest, QueueStatus, Worker};

use crate::{connect::Connection, show};

#[derive(Subcommand)]
pub(crate) enum QueueCommand {
    /// Show what waits, and whether the queue is paused.
    Status(StatusArgs),
    /// Let no worker take a job until it is resumed. Jobs that run go on.
    Pause(PauseArgs),
    /// Let workers take jobs again.
    Resume(StatusArgs),
}

#[derive(clap::Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct PauseArgs {
    /// Why, for those who look.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct WorkersArgs {
    #[command(flatten)]
    connection: Connection,
}

impl QueueCommand {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let (json, queue) = match self {
            Self::Status(args) => (args.connection.json, args.connection.client()?.queue().await?),
            Self::Resume(args) => {
                (args.connection.json, args.connection.client()?.resume_queue().await?)
            }
            Self::Pause(args) => {
                let request = HaltRequest { reason: args.reason };
                (args.connection.json, args.connection.client()?.pause_queue(&request).await?)
            }
        };
        show::print_as(json, &queue, status)
    }
}

impl WorkersArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let workers = self.connection.client()?.workers().await?;
        show::print_as(self.connection.json, &workers, |workers| list_workers(workers))
    }
}

fn status(queue: &QueueStatus) -> String {
    let state = match &queue.paused {
        Some(pause) => format!("paused {}", show::halted(pause)),
        None => "open".into(),
    };
    let mut table = show::table(&["QUEUE", &state]);
    for (priority, waiting) in &queue.waiting {
        let oldest = show::duration(Duration::from_secs_f64(waiting.oldest_wait_s.max(0.0)));
        let text = format!("{}, the oldest for {oldest}", waiting.jobs);
        table.add_row([format!("waiting, {priority}"), text]);
    }
    if queue.waiting.is_empty() {
        table.add_row(["waiting", "0"]);
    }
    table.add_row(["waiting for their next attempt", &queue.deferred.to_string()]);
    table.add_row(["running", &queue.running.to_string()]);
    let workers: Vec<_> =
        queue.workers.iter().map(|(state, count)| format!("{count} {state}")).collect();
    table
        .add_row(["workers", &if workers.is_empty() { "none".into() } else { workers.join(", ") }]);
    show::render(&table, "")
}

pub(crate) fn list_workers(workers: &[Worker]) -> String {
    let mut table = show::table(&["WORKER", "STATE", "HOST", "SEEN", "JOBS", "DRAINED"]);
    for worker in workers {
        let jobs: Vec<_> = worker.jobs.iter().map(ToString::to_string).collect();
        table.add_row([
            worker.name.clone(),
            worker.state.to_string(),
            worker.host.clone(),
            show::ago(worker.last_seen_at_ms),
            if jobs.is_empty() { "-".into() } else { jobs.join(", ") },
            worker.drain.as_ref().map(show::halted).unwrap_or_default(),
        ]);
    }
    show::render(&table, "no worker has asked for jobs yet")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use shoal_client::types::{Halt, Waiting};
    use shoal_proto::state::{Priority, WorkerState};

    use super::*;

    #[test]
    fn a_queue_says_why_nothing_moves() {
        let mut queue = QueueStatus {
            paused: None,
            waiting: BTreeMap::new(),
            deferred: 2,
            running: 1,
            workers: BTreeMap::from([(WorkerState::Idle, 3), (WorkerState::Busy, 1)]),
        };
        let text = status(&queue);
        assert!(text.contains("open") && text.contains("3 IDLE, 1 BUSY"), "{text}");
        queue.paused =
            Some(Halt { reason: Some("disk full".into()), by: "alice".into(), at_ms: 0 });
        queue.waiting.insert(Priority::Urgent, Waiting { jobs: 7, oldest_wait_s: 65.5 });
        let text = status(&queue);
        assert!(text.contains("paused") && text.contains("by alice: disk full"), "{text}");
        assert!(text.contains("waiting, urgent") && text.contains("7, the oldest for 1m 5s"));
    }
}
