//! `shoal token`: who may use the API without a certificate.

use std::{collections::BTreeSet, time::Duration};

use clap::Subcommand;
use shoal_client::types::{CreatedToken, Token, TokenRequest};
use shoal_proto::{AppName, MachineName, state::TokenRole};

use crate::{connect::Connection, exit::usage, show};

#[derive(Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token. Its secret is printed this once, and kept nowhere.
    Create(CreateArgs),
    /// List tokens, oldest first.
    List(ListArgs),
    /// Revoke a token: it counts no more, at once.
    Revoke(RevokeArgs),
}

#[derive(clap::Args)]
pub(crate) struct CreateArgs {
    /// Its name, which the audit log tells.
    name: MachineName,
    /// What its holder may do: viewer (look), deployer (build, publish, deploy, go back) or admin.
    #[arg(long)]
    role: TokenRole,
    /// Bind it to this app; repeat for each. Without, it is for all apps and what is of no app.
    #[arg(long = "app", value_name = "APP")]
    apps: Vec<AppName>,
    /// For how long it counts, such as 90days or 12h; without, until it is revoked.
    #[arg(long, value_name = "TIME", value_parser = show::parse_lasting)]
    expires: Option<Duration>,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct ListArgs {
    /// Those that are no longer in force, too.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct RevokeArgs {
    /// Its name.
    name: MachineName,
    #[command(flatten)]
    connection: Connection,
}

impl TokenCommand {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Create(args) => {
                let apps: BTreeSet<_> = args.apps.into_iter().collect();
                let seconds = args.expires.map(|time| u32::try_from(time.as_secs()));
                let expires_in_s = seconds.transpose();
                let expires_in_s =
                    expires_in_s.map_err(|_| usage("--expires: ten years at most"))?;
                let request = TokenRequest {
                    name: args.name,
                    role: args.role,
                    apps: (!apps.is_empty()).then_some(apps),
                    expires_in_s,
                };
                let created = args.connection.client()?.create_token(&request).await?;
                show::print_as(args.connection.json, &created, created_text)
            }
            Self::List(args) => {
                let mut tokens = args.connection.client()?.tokens().await?;
                if !args.all {
                    tokens.retain(|token| state(token) == "in force");
                }
                show::print_as(args.connection.json, &tokens, |tokens| list(tokens))
            }
            Self::Revoke(args) => {
                let token = args.connection.client()?.revoke_token(&args.name).await?;
                show::print_as(args.connection.json, &token, |token| {
                    list(std::slice::from_ref(token))
                })
            }
        }
    }
}

fn created_text(created: &CreatedToken) -> String {
    show::note(&format!("token {} is made; this is shown once:", created.token.name));
    created.secret.clone()
}

/// Whether a token counts, by this machine's clock.
fn state(token: &Token) -> &'static str {
    match (token.revoked_at_ms, token.expires_at_ms) {
        (Some(_), _) => "revoked",
        (None, Some(at)) if at <= show::now_ms() => "expired",
        _ => "in force",
    }
}

fn list(tokens: &[Token]) -> String {
    let mut table =
        show::table(&["TOKEN", "ROLE", "APPS", "STATE", "MADE", "BY", "EXPIRES", "USED"]);
    for token in tokens {
        let apps = token.apps.as_ref().map_or("all".into(), |apps| {
            apps.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
        });
        let expires = match (state(token), token.expires_at_ms) {
            ("in force", Some(at)) => show::until(at),
            _ => "-".into(),
        };
        table.add_row([
            token.name.to_string(),
            token.role.to_string(),
            apps,
            state(token).into(),
            show::ago(token.created_at_ms),
            token.created_by.clone(),
            expires,
            token.last_used_at_ms.map_or("never".into(), show::ago),
        ]);
    }
    show::render(&table, "no tokens: make one with shoal token create NAME --role ROLE")
}
