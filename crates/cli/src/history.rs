//! `shoal history`: what was built, copied and deployed.

use std::time::Duration;

use shoal_client::types::HistoryEntry;
use shoal_proto::AppName;

use crate::{connect::Connection, show};

#[derive(clap::Args)]
pub(crate) struct HistoryArgs {
    /// Only of this app.
    #[arg(long)]
    app: Option<AppName>,
    /// How many rows.
    #[arg(long, default_value_t = 20, value_parser = show::at_least_one())]
    limit: u32,
    #[command(flatten)]
    connection: Connection,
}

impl HistoryArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        let entries = client.history(self.app.as_ref(), self.limit).await?;
        show::print_as(self.connection.json, &entries, |entries| list(entries))
    }
}

fn took(seconds: Option<f64>) -> String {
    match seconds {
        // Most builds of a test take less than a second.
        Some(seconds) if seconds < 10.0 => format!(" {seconds:.1}s"),
        Some(seconds) => format!(" {}", show::duration(Duration::from_secs_f64(seconds))),
        None => String::new(),
    }
}

fn list(entries: &[HistoryEntry]) -> String {
    let titles = ["APP", "COMMIT", "BUILD", "BY", "COPIES", "ROLLOUT", "MACHINES", "BY", "WHEN"];
    let mut table = show::table(&titles);
    let dash = || "-".to_string();
    for entry in entries {
        let (build, rollout) = (entry.build.as_ref(), entry.rollout.as_ref());
        let job = build.map_or_else(dash, |build| {
            let again =
                if build.attempts > 1 { format!(" x{}", build.attempts) } else { String::new() };
            format!("{} {}{again}{}", build.job, build.status, took(build.seconds))
        });
        let copies = entry.replication.as_ref();
        let copies = copies.map_or_else(dash, |all| format!("{}{}", all.status, took(all.seconds)));
        let deployed = rollout.map_or_else(dash, |rollout| {
            let back = if rollout.rollback { " back" } else { "" };
            format!("{} {}{back}{}", rollout.revision, rollout.status, took(rollout.seconds))
        });
        let machines = rollout.map_or_else(dash, |rollout| {
            let failed = match rollout.machines_failed {
                0 => String::new(),
                failed => format!(", {failed} failed"),
            };
            format!("{}/{}{failed}", rollout.machines_ok, rollout.machines)
        });
        let at_ms = rollout.map(|rollout| rollout.created_at_ms);
        let at_ms = at_ms.or(build.map(|build| build.created_at_ms)).unwrap_or_default();
        table.add_row([
            entry.app.to_string(),
            entry
                .commit
                .as_ref()
                .map_or_else(|| entry.name.clone(), |commit| commit.short().into()),
            job,
            build.map_or_else(dash, |build| build.requested_by.clone()),
            copies,
            deployed,
            machines,
            rollout.map_or_else(dash, |rollout| rollout.requested_by.clone()),
            show::ago(at_ms),
        ]);
    }
    show::render(&table, "nothing was built or deployed yet")
}
