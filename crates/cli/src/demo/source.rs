//! Where the demo's artifact comes from: a repository of its own, one that was named, or a ready file.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail, ensure};
use shoal_client::types::App;
use shoal_proto::{
    AppName, CommitSha,
    goal::{Activation, HealthCheck, RolloutPlan},
};

use super::DemoArgs;
use crate::apps;

/// The files of the demo's own repository; `size` is added.
const SAMPLE: [(&str, &str); 3] = [
    ("server.c", include_str!("sample/server.c")),
    ("fill.c", include_str!("sample/fill.c")),
    ("build.sh", include_str!("sample/build.sh")),
];

/// The least size of the demo's own artifact, in bytes: the program alone is some 16 KB.
pub(super) const SIZE_MIN_BYTES: u64 = 64 << 10;

/// A machine that has not reported its end by then is UNREACHABLE, in seconds.
const DEADLINE_S: u32 = 900;

/// What is built or published.
pub(super) enum Source {
    /// A commit to build; `answers` when the program is the demo's own, which says its version.
    Build { app: App, commit: CommitSha, answers: bool },
    /// A file to publish.
    File { app: App, path: PathBuf },
}

impl Source {
    pub(super) fn app(&self) -> &App {
        match self {
            Self::Build { app, .. } | Self::File { app, .. } => app,
        }
    }

    /// About how long the artifact will be, in bytes, when that can be known.
    pub(super) fn size_bytes(args: &DemoArgs) -> Option<u64> {
        match (&args.artifact, &args.repo) {
            (Some(path), _) => fs::metadata(path).ok().map(|meta| meta.len()),
            (None, Some(_)) => None,
            (None, None) => Some(args.size.as_u64()),
        }
    }

    /// Makes the source that `args` ask for; what it needs of files goes into `dir`.
    pub(super) fn prepare(args: &DemoArgs, dir: &Path) -> anyhow::Result<Self> {
        let mut app = apps::blank(AppName::new("demo")?);
        app.plan = RolloutPlan { deadline_s: DEADLINE_S, ..RolloutPlan::default() };
        if let Some(path) = &args.artifact {
            let path = path
                .canonicalize()
                .with_context(|| format!("cannot read the artifact {}", path.display()))?;
            ensure!(path.is_file(), "{} is not a file", path.display());
            return Ok(Self::File { app, path });
        }
        app.activation = Activation::Run { args: args.run_args.clone() };
        let health = |command: &str| HealthCheck { command: command.into(), timeout_s: 30 };
        if let Some(repository) = &args.repo {
            // A path is the worker's, whose working directory is another one.
            let local = Path::new(repository).canonicalize().ok().filter(|path| path.is_dir());
            app.repository = local.map_or(repository.clone(), |path| path.display().to_string());
            app.build_command = args.build_command.clone().unwrap_or_default();
            app.output = args.output.clone().unwrap_or_default();
            app.health = args.health.as_deref().map(health);
            let commit = match &args.commit {
                Some(commit) => commit.parse()?,
                None => head_of(&app.repository)?,
            };
            return Ok(Self::Build { app, commit, answers: false });
        }
        let repository = dir.join("repository");
        let commit = make_sample(&repository, args.size.as_u64())?;
        app.repository = repository.display().to_string();
        app.build_command = "sh build.sh".into();
        app.output = "out/server".into();
        app.health = Some(health("\"$SHOAL_CURRENT\" --health"));
        Ok(Self::Build { app, commit, answers: true })
    }
}

/// Runs git and returns what it says.
fn git(dir: Option<&Path>, args: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new("git");
    if let Some(dir) = dir {
        command.arg("-C").arg(dir);
    }
    let output = command
        .args(args)
        .env("GIT_TERMINAL_PROMPT", "0")
        .output()
        .context("cannot run git: is it installed?")?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("git {} failed: {}", args.join(" "), error.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
}

/// The commit that a repository's HEAD is at.
fn head_of(repository: &str) -> anyhow::Result<CommitSha> {
    let line = git(None, &["ls-remote", "--", repository, "HEAD"])?;
    let sha = line.split_whitespace().next();
    Ok(sha.with_context(|| format!("{repository} has no HEAD: give --commit SHA"))?.parse()?)
}

/// Makes the demo's own repository: a small HTTP server that knows its commit, `size_bytes` long.
fn make_sample(dir: &Path, size_bytes: u64) -> anyhow::Result<CommitSha> {
    fs::create_dir_all(dir)?;
    for (name, text) in SAMPLE {
        fs::write(dir.join(name), text)?;
    }
    fs::write(dir.join("size"), format!("{size_bytes}\n"))?;
    git(Some(dir), &["-c", "init.defaultBranch=main", "init", "--quiet"])?;
    git(Some(dir), &["add", "."])?;
    let who = ["-c", "user.name=Shoal demo", "-c", "user.email=demo@localhost"];
    let what = [
        "-c",
        "commit.gpgsign=false",
        "commit",
        "--quiet",
        "-m",
        "A program that knows its commit",
    ];
    git(Some(dir), &[&who[..], &what[..]].concat())?;
    Ok(git(Some(dir), &["rev-parse", "HEAD"])?.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_builds_a_program_of_exactly_the_size() {
        let dir = tempfile::tempdir().unwrap();
        let commit = make_sample(dir.path(), 100_001).unwrap();
        assert_eq!(head_of(&dir.path().display().to_string()).unwrap(), commit);
        let built = Command::new("sh")
            .arg("build.sh")
            .current_dir(dir.path())
            .env("SHOAL_COMMIT", commit.as_str())
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let bytes = fs::read(dir.path().join("out/server")).unwrap();
        assert_eq!(bytes.len(), 100_001);
        let version = commit.as_str().as_bytes();
        assert!(bytes.windows(version.len()).any(|window| window == version));
    }
}
