//! `shoal webhook`: who is told what happens.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::Subcommand;
use shoal_client::types::{Webhook, WebhookDelivery, WebhookRequest};
use shoal_proto::AppName;

use crate::{connect::Connection, show};

#[derive(Subcommand)]
pub(crate) enum WebhookCommand {
    /// Have events posted to a URL, signed as Standard Webhooks says.
    Add(AddArgs),
    /// List all webhooks.
    List(ListArgs),
    /// Remove a webhook, and what it was still to be told.
    Remove(OneArgs),
    /// Send a test message now, once.
    Test(OneArgs),
    /// Show what became of the messages to a webhook, newest first.
    Deliveries(DeliveriesArgs),
}

#[derive(clap::Args)]
pub(crate) struct AddArgs {
    /// Where messages are posted: https://.
    url: String,
    /// Only events of this app.
    #[arg(long)]
    app: Option<AppName>,
    /// Only events of this type, such as build:completed; repeat for each.
    #[arg(long = "event", value_name = "TYPE")]
    events: Vec<String>,
    /// File with the secret that signs messages; without it a new one is made and shown once.
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct OneArgs {
    /// The webhook's number.
    id: i64,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct DeliveriesArgs {
    /// The webhook's number.
    id: i64,
    /// How many.
    #[arg(long, default_value_t = 20, value_parser = show::at_least_one())]
    limit: u32,
    #[command(flatten)]
    connection: Connection,
}

/// Reads a secret; the newline that an editor adds is none of it.
pub(crate) fn read_secret(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the secret {}", path.display()))?;
    let text = text.trim_end_matches(['\r', '\n']);
    ensure!(!text.is_empty(), "the secret {} is empty", path.display());
    Ok(text.into())
}

impl WebhookCommand {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Add(args) => args.run().await,
            Self::List(args) => {
                let webhooks = args.connection.client()?.webhooks().await?;
                show::print_as(args.connection.json, &webhooks, |webhooks| list(webhooks))
            }
            Self::Remove(args) => {
                args.connection.client()?.remove_webhook(args.id).await?;
                let none = serde_json::json!({});
                show::print_as(args.connection.json, &none, |_| {
                    format!("webhook {} is removed", args.id)
                })
            }
            Self::Test(args) => {
                let delivery = args.connection.client()?.test_webhook(args.id).await?;
                show::print_as(args.connection.json, &delivery, |delivery| {
                    deliveries(std::slice::from_ref(delivery))
                })?;
                let why = delivery.reason.unwrap_or_default();
                ensure!(
                    delivery.status == "DELIVERED",
                    "webhook {} did not take it: {why}",
                    args.id
                );
                Ok(())
            }
            Self::Deliveries(args) => {
                let client = args.connection.client()?;
                let all = client.webhook_deliveries(args.id, args.limit).await?;
                show::print_as(args.connection.json, &all, |all| deliveries(all))
            }
        }
    }
}

impl AddArgs {
    async fn run(self) -> anyhow::Result<()> {
        let secret = self.secret_file.as_deref().map(read_secret).transpose()?;
        let request = WebhookRequest { url: self.url, app: self.app, events: self.events, secret };
        let webhook = self.connection.client()?.add_webhook(&request).await?;
        show::print_as(self.connection.json, &webhook, |webhook| {
            let table = list(std::slice::from_ref(webhook));
            match &webhook.secret {
                Some(secret) => format!("{table}\nsecret, shown this once: {secret}"),
                None => table,
            }
        })
    }
}

fn list(webhooks: &[Webhook]) -> String {
    let mut table = show::table(&["ID", "URL", "APP", "EVENTS", "ADDED", "BY"]);
    for webhook in webhooks {
        let events = webhook.events.join(", ");
        table.add_row([
            webhook.id.to_string(),
            webhook.url.clone(),
            webhook.app.as_ref().map_or_else(|| "all".into(), ToString::to_string),
            if events.is_empty() { "all".into() } else { events },
            show::ago(webhook.created_at_ms),
            webhook.created_by.clone(),
        ]);
    }
    show::render(&table, "no webhooks: add one with shoal webhook add URL")
}

fn deliveries(all: &[WebhookDelivery]) -> String {
    let titles = ["MESSAGE", "TYPE", "STATUS", "TRIES", "ANSWER", "TOOK", "LAST", "NEXT", "REASON"];
    let mut table = show::table(&titles);
    let dash = || "-".to_string();
    for one in all {
        table.add_row([
            one.id.clone(),
            one.kind.clone(),
            one.status.clone(),
            one.tries.to_string(),
            one.answer.map_or_else(dash, |answer| answer.to_string()),
            one.latency_ms.map_or_else(dash, |ms| format!("{ms} ms")),
            one.last_try_at_ms.map_or_else(dash, show::ago),
            one.next_try_at_ms.map_or_else(dash, show::until),
            one.reason.clone().unwrap_or_default(),
        ]);
    }
    show::render(&table, "nothing was to be told yet")
}
