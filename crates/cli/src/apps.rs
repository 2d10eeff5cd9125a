//! `shoal app`: what is built, how, and where it goes.

mod follow;

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use clap::Subcommand;
use shoal_client::{ClientError, types::App};
use shoal_proto::{
    AppName,
    goal::{Activation, HealthCheck, RolloutPlan},
};

use crate::{connect::Connection, exit::usage, show};

/// How long a health check may take when nothing else is said.
const HEALTH_TIMEOUT_S: u32 = 60;

#[derive(Subcommand)]
#[allow(clippy::large_enum_variant)] // Made once a process.
pub(crate) enum AppCommand {
    /// Register an app, or change what is given of a registered one.
    Set(SetArgs),
    /// List all apps.
    List {
        #[command(flatten)]
        connection: Connection,
    },
    /// Show one app.
    Show {
        /// The app.
        app: AppName,
        #[command(flatten)]
        connection: Connection,
    },
    /// Let pushes to a repository's main branch start builds, or show which do.
    Push(follow::PushArgs),
    /// Deploy by itself what pushes bring, or show whether that is done.
    AutoDeploy(follow::AutoDeployArgs),
}

#[derive(clap::Args)]
pub(crate) struct SetArgs {
    /// The app's name.
    name: AppName,
    /// TOML file that says all of the app; flags go over it. Keys: repository, build_command, output,
    /// activation, health, selector, build_timeout_s, max_attempts, piece_size_bytes, keep_builds,
    /// plan, priority.
    #[arg(long)]
    file: Option<PathBuf>,
    #[command(flatten)]
    set: AppFlags,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args, Default)]
struct AppFlags {
    /// Where its commits are: a URL or path that `git fetch` takes.
    #[arg(long)]
    repository: Option<String>,
    /// Run with `sh -c` in a clean checkout of the commit.
    #[arg(long, value_name = "CMD")]
    build_command: Option<String>,
    /// The file that the build leaves, relative to the checkout's root.
    #[arg(long, value_name = "PATH")]
    output: Option<String>,
    /// Start the artifact as a program on each machine.
    #[arg(long, conflicts_with_all = ["activate", "no_activation"])]
    run: bool,
    /// An argument of the program; repeat for each.
    #[arg(long = "arg", requires = "run", allow_hyphen_values = true)]
    args: Vec<String>,
    /// Run a command with `sh -c` on each machine to activate the artifact.
    #[arg(long, value_name = "CMD", conflicts_with = "no_activation")]
    activate: Option<String>,
    /// Do nothing with the artifact once it is there.
    #[arg(long)]
    no_activation: bool,
    /// Run with `sh -c` on each machine until it exits 0; empty for no check.
    #[arg(long, value_name = "CMD")]
    health: Option<String>,
    /// How long the check may take until then.
    #[arg(long, value_name = "SECONDS")]
    health_timeout_s: Option<u32>,
    /// Which machines it is for, such as role=web|api,zone!=b; empty for all.
    #[arg(long)]
    selector: Option<String>,
    /// How long a build may take.
    #[arg(long, value_name = "SECONDS")]
    build_timeout_s: Option<u32>,
    /// How often a build is started at most [default: as the coordinator is configured].
    #[arg(long, value_name = "ATTEMPTS")]
    max_attempts: Option<u32>,
    /// How many of its newest artifacts are kept beside those in use [default: as the coordinator is configured].
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    keep_builds: Option<u32>,
    /// The length of a piece: a power of two from 256KiB to 16MiB.
    #[arg(long, value_name = "SIZE", value_parser = show::parse_size)]
    piece_size: Option<bytesize::ByteSize>,
    /// How much of a region each wave may activate, in thousandths: 10,100,1000.
    #[arg(long, value_name = "PERMILLE", value_delimiter = ',')]
    waves_permille: Option<Vec<u16>>,
    /// Halt a rollout when more than this of the machines failed, in thousandths.
    #[arg(long, value_name = "PERMILLE")]
    max_failed_permille: Option<u16>,
    /// Watch each wave this long before the next one opens.
    #[arg(long, value_name = "SECONDS")]
    bake_s: Option<u32>,
    /// A machine that has not reported its end by then is UNREACHABLE.
    #[arg(long, value_name = "SECONDS")]
    deadline_s: Option<u32>,
    /// Higher fetches first where apps compete.
    #[arg(long)]
    priority: Option<u8>,
}

impl AppFlags {
    /// Lays what was given over `app`.
    fn apply(self, app: &mut App) -> anyhow::Result<()> {
        fn set<T>(place: &mut T, given: Option<T>) {
            if let Some(value) = given {
                *place = value;
            }
        }
        set(&mut app.repository, self.repository);
        set(&mut app.build_command, self.build_command);
        set(&mut app.output, self.output);
        set(&mut app.selector, self.selector);
        set(&mut app.build_timeout_s, self.build_timeout_s);
        set(&mut app.max_attempts, self.max_attempts.map(Some));
        set(&mut app.keep_builds, self.keep_builds.map(Some));
        set(&mut app.priority, self.priority);
        set(&mut app.plan.waves_permille, self.waves_permille);
        set(&mut app.plan.max_failed_permille, self.max_failed_permille);
        set(&mut app.plan.bake_s, self.bake_s);
        set(&mut app.plan.deadline_s, self.deadline_s);
        set(&mut app.piece_size_bytes, self.piece_size.map(|size| Some(size.as_u64())));
        if self.run {
            app.activation = Activation::Run { args: self.args };
        } else if let Some(command) = self.activate {
            app.activation = Activation::Command { command };
        } else if self.no_activation {
            app.activation = Activation::None;
        }
        match self.health {
            Some(command) if command.is_empty() => app.health = None,
            Some(command) => {
                let timeout_s = app.health.as_ref().map_or(HEALTH_TIMEOUT_S, |old| old.timeout_s);
                app.health = Some(HealthCheck { command, timeout_s });
            }
            None => {}
        }
        if let Some(timeout_s) = self.health_timeout_s {
            let health = app.health.as_mut();
            health.ok_or_else(|| usage("--health-timeout-s needs --health"))?.timeout_s = timeout_s;
        }
        app.selector
            .parse::<shoal_proto::goal::Selector>()
            .map_err(|error| usage(format!("selector: {error}")))?;
        Ok(())
    }
}

/// An app about which nothing but its name is said.
pub(crate) fn blank(name: AppName) -> App {
    App {
        name,
        repository: String::new(),
        build_command: String::new(),
        output: String::new(),
        activation: Activation::None,
        health: None,
        selector: String::new(),
        build_timeout_s: 1_200,
        max_attempts: None,
        keep_builds: None,
        piece_size_bytes: None,
        plan: RolloutPlan::default(),
        priority: 0,
    }
}

/// Reads an app's file: what it leaves out has its default, in the plan too.
fn read_file(name: &AppName, text: &str) -> anyhow::Result<App> {
    let mut table: toml::Table = toml::from_str(text)?;
    if let Some(named) = table.get("name") {
        ensure!(
            named.as_str() == Some(name.as_str()),
            "it is about app {named}, not about '{name}'"
        );
    }
    table.insert("name".into(), name.as_str().into());
    let mut plan = toml::Table::try_from(RolloutPlan::default())?;
    if let Some(given) = table.remove("plan") {
        let given = given.as_table().context("plan is a table")?.clone();
        for (key, value) in given {
            ensure!(plan.insert(key.clone(), value).is_some(), "unknown key plan.{key}");
        }
    }
    table.insert("plan".into(), plan.into());
    // The error's own text is several lines with the place; its message is one.
    table.try_into().map_err(|error: toml::de::Error| anyhow::anyhow!("{}", error.message()))
}

impl AppCommand {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Set(args) => args.run().await,
            Self::Push(args) => args.run().await,
            Self::AutoDeploy(args) => args.run().await,
            Self::List { connection } => {
                let apps = connection.client()?.apps().await?;
                show::print_as(connection.json, &apps, |apps| list(apps))
            }
            Self::Show { app, connection } => {
                let app = connection.client()?.app(&app).await?;
                show::print_as(connection.json, &app, detail)
            }
        }
    }
}

impl SetArgs {
    async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        let mut app = match &self.file {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                read_file(&self.name, &text)
                    .with_context(|| format!("wrong app in {}", path.display()))?
            }
            None => match client.app(&self.name).await {
                Ok(app) => app,
                Err(ClientError::Refused { status: 404, .. }) => blank(self.name),
                Err(error) => return Err(error.into()),
            },
        };
        self.set.apply(&mut app)?;
        let app = client.set_app(&app).await?;
        show::print_as(self.connection.json, &app, detail)
    }
}

fn activation(app: &App) -> String {
    match &app.activation {
        Activation::None => "nothing".into(),
        Activation::Run { args } if args.is_empty() => "run it".into(),
        Activation::Run { args } => format!("run it with {}", args.join(" ")),
        Activation::Command { command } => format!("run: {command}"),
    }
}

fn all_or(text: &str) -> &str {
    if text.is_empty() { "all machines" } else { text }
}

fn list(apps: &[App]) -> String {
    let mut table = show::table(&["APP", "REPOSITORY", "ACTIVATION", "SELECTOR"]);
    for app in apps {
        let repository = if app.repository.is_empty() { "-" } else { &app.repository };
        table.add_row([app.name.as_str(), repository, &activation(app), all_or(&app.selector)]);
    }
    show::render(&table, "no apps yet: register one with shoal app set")
}

fn detail(app: &App) -> String {
    let mut table = show::table(&["APP", app.name.as_str()]);
    let mut row = |key: &str, value: String| {
        if !value.is_empty() {
            table.add_row([key, &value]);
        }
    };
    row("repository", app.repository.clone());
    row("build command", app.build_command.clone());
    row("output", app.output.clone());
    row("build timeout", format!("{} s", app.build_timeout_s));
    row("attempts", app.max_attempts.map_or_else(String::new, |most| format!("at most {most}")));
    row("activation", activation(app));
    let health = app.health.as_ref();
    row("health", health.map_or("-".into(), |h| format!("{} ({} s)", h.command, h.timeout_s)));
    row("selector", all_or(&app.selector).into());
    row("piece size", app.piece_size_bytes.map_or("by size".into(), show::size));
    let waves = app.plan.waves_permille.iter().map(ToString::to_string).collect::<Vec<_>>();
    let waves =
        if waves.is_empty() { "all at once".into() } else { waves.join(", ") + " permille" };
    row("waves", waves);
    row("failures", format!("at most {} permille", app.plan.max_failed_permille));
    row("bake", format!("{} s", app.plan.bake_s));
    row("deadline", format!("{} s", app.plan.deadline_s));
    row("priority", app.priority.to_string());
    show::render(&table, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> AppName {
        AppName::new("web").unwrap()
    }

    #[test]
    fn flags_change_only_what_they_name() {
        let mut app = blank(name());
        let first = AppFlags {
            repository: Some("/src/web".into()),
            run: true,
            args: vec!["--port=0".into()],
            health: Some("true".into()),
            ..AppFlags::default()
        };
        first.apply(&mut app).unwrap();
        let second = AppFlags {
            selector: Some("role=web".into()),
            health_timeout_s: Some(5),
            ..AppFlags::default()
        };
        second.apply(&mut app).unwrap();
        assert_eq!(app.repository, "/src/web");
        assert_eq!(app.activation, Activation::Run { args: vec!["--port=0".into()] });
        assert_eq!(app.health, Some(HealthCheck { command: "true".into(), timeout_s: 5 }));
        let clear = AppFlags { health: Some(String::new()), ..AppFlags::default() };
        clear.apply(&mut app).unwrap();
        assert_eq!(app.health, None);
        let wrong = AppFlags { selector: Some("role".into()), ..AppFlags::default() };
        assert!(wrong.apply(&mut app).is_err());
    }

    #[test]
    fn a_file_says_it_all_and_mistakes_are_named() {
        let text =
            "repository = '/src'\nactivation = { run = { args = ['-v'] } }\n[plan]\nbake_s = 9\n";
        let app = read_file(&name(), text).unwrap();
        assert_eq!(app.activation, Activation::Run { args: vec!["-v".into()] });
        assert_eq!(app.plan, RolloutPlan { bake_s: 9, ..RolloutPlan::default() });
        assert_eq!(app.build_timeout_s, 1_200);
        for (text, word) in
            [("repo = '/src'", "repo"), ("[plan]\nbake = 9", "plan.bake"), ("name = 'api'", "api")]
        {
            let error = read_file(&name(), text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
