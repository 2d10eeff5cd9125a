//! `shoal`: one program, a subcommand a role.
//!
//! The processes ([`Command::Coordinator`] and its like) live in crates of their own, which take their
//! flags as an `Args` and do the rest in `run`. What is here is the operator's side: the keys of a
//! cluster ([`pki`]), the calls against the coordinator's API (one module a noun), how their answers are
//! shown ([`show`]), and the [`demo`], which starts the real processes and does what an operator would.
//!
//! An error is one line on stderr that says what to do; the exit codes are in [`exit`].

mod apps;
mod artifacts;
mod audit;
mod completions;
mod connect;
mod copies;
mod demo;
mod deploy;
mod events;
mod exit;
mod fleet;
mod history;
mod jobs;
mod join;
mod login;
mod pki;
mod queue;
mod show;
mod token;
mod trust;
mod webhooks;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use shoal_process::LogFormat;

/// Builds a commit, copies the artifact to every region, and swarms it to every machine.
#[derive(Parser)]
#[command(name = "shoal", version, disable_help_subcommand = true, after_help = exit::HELP)]
struct Cli {
    /// How log lines on stderr look.
    #[arg(long, global = true, value_enum, default_value_t)]
    log_format: LogFormat,
    /// Stop when standard input is closed: for a parent that may die.
    #[arg(long, global = true, hide = true)]
    stop_with_stdin: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
#[allow(clippy::large_enum_variant)] // Made once a process.
enum Command {
    /// Make a cluster's keys, and certificates for its machines; revoke and replace them.
    #[command(subcommand)]
    Pki(pki::PkiCommand),
    /// Join this machine to a cluster: get its certificate with a token.
    Join(join::JoinArgs),
    /// Make, list and revoke the tokens by which new machines join.
    #[command(subcommand)]
    JoinToken(join::JoinTokenCommand),
    /// Run a coordinator: API, job queue, replication, rollouts.
    Coordinator(shoal_coordinator::Args),
    /// Run a worker: takes build jobs.
    Worker(shoal_worker::Args),
    /// Run a region process: goals, introductions, leases and reports of one region.
    Region(shoal_region::Args),
    /// Run an agent: on each target machine.
    Agent(AgentArgs),
    /// Store a token, so that the other commands need no certificate.
    Login(login::LoginArgs),
    /// Remove the token that was stored.
    Logout(login::LogoutArgs),
    /// Show who you are to the coordinator.
    Whoami(login::WhoamiArgs),
    /// Make tokens, list and revoke them.
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Show who changed what, newest first.
    Audit(audit::AuditArgs),
    /// Register apps and show them.
    #[command(subcommand)]
    App(apps::AppCommand),
    /// Ask for a build of a commit.
    Build(jobs::BuildArgs),
    /// List build jobs, newest first.
    Jobs(jobs::JobsArgs),
    /// Show one build job, or its log.
    Job(jobs::JobArgs),
    /// Cancel a build job.
    Cancel(jobs::CancelArgs),
    /// List artifacts, newest first.
    Artifacts(artifacts::ArtifactsArgs),
    /// Show one artifact and its copy in each region.
    Artifact(artifacts::ArtifactArgs),
    /// Show how the copies in the regions are, with bytes, rates and times.
    Replication(copies::ReplicationArgs),
    /// Keep an artifact whatever comes.
    Pin(copies::PinArgs),
    /// Take an artifact's pin away.
    Unpin(copies::UnpinArgs),
    /// List pins.
    Pins(copies::PinsArgs),
    /// Delete artifacts that nothing needs from all buckets, or show which would go.
    Gc(copies::GcArgs),
    /// Make a ready file an artifact of an app.
    Publish(artifacts::PublishArgs),
    /// Set what an app's machines shall run.
    Deploy(deploy::DeployArgs),
    /// Set it back to what they ran before.
    Rollback(deploy::RollbackArgs),
    /// Pause an app's rollout, let it go on, or cancel it.
    #[command(subcommand)]
    Rollout(deploy::RolloutCommand),
    /// Show how each app's rollout is.
    Status(deploy::StatusArgs),
    /// Show what was built, copied and deployed, newest first.
    History(history::HistoryArgs),
    /// Show what happens: builds, copies, deployments.
    Events(events::EventsArgs),
    /// Have what happens told to an address of yours.
    #[command(subcommand)]
    Webhook(webhooks::WebhookCommand),
    /// List machines and what they run.
    Machines(fleet::MachinesArgs),
    /// Show the queue of builds, pause it, resume it.
    #[command(subcommand)]
    Queue(queue::QueueCommand),
    /// List workers and what they do.
    Workers(queue::WorkersArgs),
    /// List regions.
    Regions(fleet::RegionsArgs),
    /// Take a region out of service (it holds up no deployment), or a worker (it takes no more jobs).
    Drain(fleet::DrainArgs),
    /// Put a region or a worker back into service.
    Undrain(fleet::UndrainArgs),
    /// Start a whole cluster on this machine and deploy a build to it.
    Demo(demo::DemoArgs),
    /// Print what a shell needs to complete commands and flags.
    Completions(completions::CompletionsArgs),
}

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
struct AgentArgs {
    #[command(subcommand)]
    command: Option<AgentCommand>,
    #[command(flatten)]
    args: shoal_agent::Args,
}

#[derive(Subcommand)]
enum AgentCommand {
    /// Cut a local file into this machine's store, and seed it.
    Import(ImportArgs),
    /// Show the limits of this machine's agent and what passes under them, or change them until it reads its configuration again.
    Limits(LimitsArgs),
}

#[derive(clap::Args)]
struct LimitsArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    agent: shoal_agent::Args,
}

impl LimitsArgs {
    async fn run(self) -> anyhow::Result<()> {
        let limits = shoal_agent::limits(self.agent).await?;
        show::print_as(self.json, &limits, limits_table)
    }
}

fn limits_table(limits: &shoal_agent::LimitsReport) -> String {
    let rate = |bytes: u64| format!("{}/s", bytesize::ByteSize(bytes).display().si());
    let mut table = show::table(&["WAY", "LIMIT", "NOW", "PASSED", "HELD BACK", "FOR"]);
    let rows = [("up", &limits.up), ("down", &limits.down), ("origin", &limits.origin)];
    for (name, way) in rows {
        table.add_row([
            name.to_owned(),
            way.limit_bytes_per_s.map_or_else(|| "none".into(), rate),
            rate(way.rate_bytes_per_s),
            show::size(way.passed_bytes),
            show::size(way.held_back_bytes),
            format!("{:.1} s", way.held_back_ms as f64 / 1e3),
        ]);
    }
    let scavenger = if limits.scavenger { "on" } else { "off" };
    format!("{}\nscavenger: {scavenger}", show::render(&table, ""))
}

#[derive(clap::Args)]
struct ImportArgs {
    /// The file.
    file: PathBuf,
    /// The length of a piece: a power of two from 256KiB to 16MiB; by default by the file's size.
    #[arg(long, value_name = "SIZE", value_parser = show::parse_size)]
    piece_size: Option<bytesize::ByteSize>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    agent: shoal_agent::Args,
}

impl ImportArgs {
    async fn run(self) -> anyhow::Result<()> {
        // A running agent reads the file itself, from its own directory.
        let file = std::path::absolute(&self.file)?;
        let piece_size = self.piece_size.map(|size| size.as_u64());
        let imported = shoal_agent::import(self.agent, &file, piece_size).await?;
        show::print_as(self.json, &imported, |imported| {
            let seeding = if imported.seeding { "seeding" } else { "seeded when the agent starts" };
            let size = show::size(imported.size_bytes);
            format!("{}  {size} in {} pieces, {seeding}", imported.artifact, imported.pieces)
        })
    }
}

impl Command {
    /// Whether it runs until it is stopped, and so writes a log.
    fn is_process(&self) -> bool {
        matches!(self, Self::Coordinator(_) | Self::Worker(_) | Self::Region(_) | Self::Agent(_))
    }

    async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Pki(command) => command.run().await,
            Self::Join(args) => args.run().await,
            Self::JoinToken(command) => command.run().await,
            Self::Coordinator(args) => shoal_coordinator::run(args).await,
            Self::Worker(args) => shoal_worker::run(args).await,
            Self::Region(args) => shoal_region::run(args).await,
            Self::Agent(AgentArgs { command: None, args }) => shoal_agent::run(args).await,
            Self::Agent(AgentArgs { command: Some(AgentCommand::Import(args)), .. }) => {
                args.run().await
            }
            Self::Agent(AgentArgs { command: Some(AgentCommand::Limits(args)), .. }) => {
                args.run().await
            }
            Self::Login(args) => args.run().await,
            Self::Logout(args) => args.run(),
            Self::Whoami(args) => args.run().await,
            Self::Token(command) => command.run().await,
            Self::Audit(args) => args.run().await,
            Self::App(command) => command.run().await,
            Self::Build(args) => args.run().await,
            Self::Jobs(args) => args.run().await,
            Self::Job(args) => args.run().await,
            Self::Cancel(args) => args.run().await,
            Self::Artifacts(args) => args.run().await,
            Self::Artifact(args) => args.run().await,
            Self::Replication(args) => args.run().await,
            Self::Pin(args) => args.run().await,
            Self::Unpin(args) => args.run().await,
            Self::Pins(args) => args.run().await,
            Self::Gc(args) => args.run().await,
            Self::Publish(args) => args.run().await,
            Self::Deploy(args) => args.run().await,
            Self::Rollback(args) => args.run().await,
            Self::Status(args) => args.run().await,
            Self::Rollout(command) => command.run().await,
            Self::History(args) => args.run().await,
            Self::Events(args) => args.run().await,
            Self::Webhook(command) => command.run().await,
            Self::Machines(args) => args.run().await,
            Self::Regions(args) => args.run().await,
            Self::Queue(command) => command.run().await,
            Self::Workers(args) => args.run().await,
            Self::Drain(args) => args.run().await,
            Self::Undrain(args) => args.run().await,
            Self::Demo(args) => args.run().await,
            Self::Completions(args) => args.run(),
        }
    }
}

/// Turns the end of standard input into SIGTERM: a parent that is killed cannot say so itself, but its
/// end of the pipe closes.
fn stop_when_stdin_closes() {
    std::thread::spawn(|| {
        // Nothing is expected to be written; whatever comes is read and dropped.
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM);
    });
}

fn main() -> ExitCode {
    shoal_process::keep_freed_memory();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return exit::refuse(&error),
    };
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        return exit::end(Err(anyhow::anyhow!("another TLS provider is installed already")));
    }
    // An operator's command shows answers; it logs only when asked to.
    if cli.command.is_process() || std::env::var_os("SHOAL_LOG").is_some() {
        shoal_process::init_tracing(cli.log_format);
    }
    // One thread may be at the disk: another one shall be left for connections.
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get).max(2);
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = match runtime.worker_threads(threads).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::end(Err(anyhow::anyhow!("cannot start: {error}"))),
    };
    let result = runtime.block_on(async {
        if cli.stop_with_stdin {
            stop_when_stdin_closes();
        }
        cli.command.run().await
    });
    // A task that still blocks (a read of standard input, say) does not hold up the end.
    runtime.shutdown_background();
    exit::end(result)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn flags_do_not_contradict_each_other() {
        Cli::command().debug_assert();
    }

    #[test]
    fn unknown_flags_and_commands_are_refused() {
        for line in [&["shoal", "staus"][..], &["shoal", "status", "--jsno"], &["shoal"]] {
            let error = Cli::try_parse_from(line).err().map(|error| error.exit_code());
            assert_eq!(error, Some(2), "{line:?}");
        }
    }
}
