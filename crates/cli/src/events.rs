//! `shoal events`: what happens.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use shoal_client::{Client, ClientError, EventQuery, Streamed, types::Event};
use shoal_proto::AppName;

use crate::{connect::Connection, show};

#[derive(clap::Args)]
pub(crate) struct EventsArgs {
    /// Go on with what happens from now on.
    #[arg(long)]
    follow: bool,
    /// With --follow: begin after the event of this number.
    #[arg(long, value_name = "NUMBER", requires = "follow")]
    after: Option<i64>,
    /// Only events of this app.
    #[arg(long)]
    app: Option<AppName>,
    /// Only events of this type, such as build:completed; repeat for each.
    #[arg(long = "type", value_name = "TYPE")]
    types: Vec<String>,
    /// Without --follow: how many.
    #[arg(long, default_value_t = 20, value_parser = show::at_least_one())]
    limit: u32,
    #[command(flatten)]
    connection: Connection,
}

/// How long to wait before a coordinator is asked again, at most.
const RETRY_MAX: Duration = Duration::from_secs(5);

impl EventsArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        let wanted = EventQuery { app: self.app, types: self.types };
        if self.follow {
            return follow(&client, &wanted, self.after, self.connection.json).await;
        }
        let mut events = client.events(&wanted, self.limit).await?;
        events.reverse();
        show::print_as(self.connection.json, &events, |events| {
            let lines: Vec<_> = events.iter().map(line).collect();
            if lines.is_empty() { "nothing has happened yet".into() } else { lines.join("\n") }
        })
    }
}

/// Prints events as they come, through coordinators that come and go.
async fn follow(
    client: &Client,
    wanted: &EventQuery,
    mut after: Option<i64>,
    json: bool,
) -> anyhow::Result<()> {
    let backoff = || {
        let first = Duration::from_millis(100);
        let backoff = ExponentialBuilder::default().with_min_delay(first).with_max_delay(RETRY_MAX);
        backoff.with_jitter().without_max_times().build()
    };
    // The first stream has to come about: a wrong address or app is said at once.
    let mut stream = client.follow_events(wanted, after).await?;
    let mut waits = backoff();
    loop {
        match stream.next().await {
            Ok(Some(Streamed::Event(event))) => {
                after = Some(event.id);
                waits = backoff();
                print(&event, json)?;
                continue;
            }
            Ok(Some(Streamed::Notice(name, text))) => {
                show::note(&format!("shoal: {name} {text}"));
                continue;
            }
            Ok(None) => {}
            Err(error) => show::again(&error),
        }
        stream = loop {
            tokio::time::sleep(waits.next().unwrap_or(RETRY_MAX)).await;
            match client.follow_events(wanted, after).await {
                Ok(stream) => break stream,
                Err(error) if error.may_pass() => show::again(&error),
                Err(error) => return Err(ClientError::into(error)),
            }
        };
    }
}

fn print(event: &Event, json: bool) -> anyhow::Result<()> {
    // One line each: for programs, too.
    show::stream_as(json, event, line)
}

fn line(event: &Event) -> String {
    let at = Duration::from_millis(u64::try_from(event.at_ms).unwrap_or_default());
    let at = humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + at);
    let mut text = format!("{} {at} {}", event.id, event.kind);
    let mut add = |word: &str, value: Option<String>| {
        if let Some(value) = value {
            text.push_str(&format!(" {word}{value}"));
        }
    };
    add("", event.name.clone().or_else(|| Some(event.app.to_string())));
    add("job=", event.job.map(|job| job.to_string()));
    add("attempt=", event.attempt.map(|attempt| attempt.to_string()));
    add("rollout=", event.rollout.map(|rollout| rollout.to_string()));
    add("", event.status.clone());
    add("region=", event.region.as_ref().map(ToString::to_string));
    add("open=", event.open_permille.map(|open| format!("{open}/1000")));
    add("worker=", event.worker.clone());
    add("by=", event.requested_by.clone());
    add("", event.reason.as_ref().map(|reason| format!("({reason})")));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        let json = r#"{"id":7,"type":"build:completed","at_ms":0,"app":"web","job":3,"attempt":1,
            "name":"web/0123456789ab-3","status":"FAILED","reason":"exit code 2","requested_by":"alice"}"#;
        let event: Event = serde_json::from_str(json).unwrap();
        let want = "7 1970-01-01T00:00:00Z build:completed web/0123456789ab-3 job=3 attempt=1 FAILED by=alice \
                    (exit code 2)";
        assert_eq!(line(&event), want);
    }
}
