//! `shoal audit`.

use std::time::Duration;

use shoal_client::types::{AuditQuery, AuditRow};
use shoal_proto::AppName;

use crate::{connect::Connection, jobs::LIST_LIMIT, show};

#[derive(clap::Args)]
pub(crate) struct AuditArgs {
    /// Only changes about this app.
    #[arg(long)]
    app: Option<AppName>,
    /// Only changes to this, such as web/0123456789ab-7 or eu.
    #[arg(long)]
    subject: Option<String>,
    /// Only changes by this one: a certificate's name, token:NAME or coordinator.
    #[arg(long)]
    who: Option<String>,
    /// Only this, such as app.deploy; with a dot at the end all of a kind: job.
    #[arg(long)]
    what: Option<String>,
    /// Only changes of this last time, such as 2h or 7days.
    #[arg(long, value_name = "TIME", value_parser = show::parse_time)]
    since: Option<Duration>,
    /// How many at most.
    #[arg(long, default_value_t = LIST_LIMIT, value_parser = show::at_least_one())]
    limit: u32,
    #[command(flatten)]
    connection: Connection,
}

impl AuditArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let ago = |time: Duration| {
            let millis = i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
            show::now_ms().saturating_sub(millis).max(0)
        };
        let query = AuditQuery {
            app: self.app,
            subject: self.subject,
            who: self.who,
            what: self.what,
            since_ms: self.since.map(ago),
            ..AuditQuery::default()
        };
        let rows = self.connection.client()?.audit(&query, self.limit).await?;
        show::print_as(self.connection.json, &rows, |rows| list(rows))
    }
}

fn list(rows: &[AuditRow]) -> String {
    let mut table = show::table(&["WHEN", "WHO", "FROM", "WHAT", "SUBJECT", "DETAIL"]);
    for row in rows {
        table.add_row([
            show::ago(row.at_ms),
            row.who.clone(),
            if row.origin.is_empty() { "-".into() } else { row.origin.clone() },
            row.what.clone(),
            row.subject.clone(),
            // A line; all of it is in the JSON.
            row.detail.chars().map(|c| if c.is_control() { ' ' } else { c }).take(100).collect(),
        ]);
    }
    show::render(&table, "no changes")
}
