//! Namespaces of a benchmark's own: mounts, network, process ids. Nothing of what it makes there is seen outside, and
//! however it ends, the kernel takes all of it away.

use std::{
    env,
    io::{self, Read as _},
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    thread,
};

use anyhow::Context as _;

use crate::program;

/// The flags of every benchmark that has agents in namespaces.
#[derive(Debug, clap::Args)]
pub struct Flags {
    /// The program `shoal`; by default the one beside this one.
    #[arg(long, value_name = "PATH")]
    shoal: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Set by the benchmark when it starts itself in its namespaces.
    #[arg(long, hide = true)]
    inside: bool,
}

impl Flags {
    /// The program `shoal`.
    ///
    /// # Errors
    /// When it is not there; it says how to make it.
    pub fn shoal(&self) -> anyhow::Result<PathBuf> {
        program(self.shoal.as_deref(), "shoal")
    }
}

/// Runs this program again in namespaces of its own, with its arguments and `--inside`, and gives its exit code. `more`
/// are further flags of `unshare`.
///
/// # Errors
/// When `unshare` cannot be run.
fn again(more: &[&str]) -> anyhow::Result<ExitCode> {
    let mut child = Command::new("unshare")
        .args(more)
        .args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(env::current_exe()?)
        .arg("--inside")
        .args(env::args_os().skip(1))
        // Closed by the kernel when this process ends, however it does.
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start unshare: install util-linux")?;
    let _held = child.stdin.take();
    let status = child.wait()?;
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// What a benchmark's `main` does that works in namespaces of its own.
pub fn main(
    flags: &Flags,
    more: &[&str],
    check: impl FnOnce() -> anyhow::Result<()>,
    work: impl FnOnce() -> anyhow::Result<ExitCode>,
) -> ExitCode {
    enter(flags.inside, more, check, work)
}

/// Works in namespaces: outside, it checks what must be so before anything is begun (exit 2 if it is not), and starts
/// this program again with `--inside`, `more` being flags of `unshare`; inside, it works.
pub fn enter(
    inside: bool,
    more: &[&str],
    check: impl FnOnce() -> anyhow::Result<()>,
    work: impl FnOnce() -> anyhow::Result<ExitCode>,
) -> ExitCode {
    if inside {
        end_with_parent();
        return ended(work());
    }
    match check() {
        Ok(()) => ended(again(more)),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The exit code of what was done, its error printed.
pub fn ended(done: anyhow::Result<ExitCode>) -> ExitCode {
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Flags for [`main`] with which it needs no root, where the system lets users have namespaces.
#[must_use]
pub fn as_anybody() -> &'static [&'static str] {
    if rustix::process::geteuid().is_root() { &[] } else { &["--user", "--map-root-user"] }
}

/// Ends this process, the first of its namespace, and all others in it, when the one outside ends.
fn end_with_parent() {
    thread::spawn(|| {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(130);
    });
}
