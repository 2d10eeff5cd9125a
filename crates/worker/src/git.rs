//! Mirrors of repositories, kept and fetched incrementally, and clean checkouts of exact commits.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use shoal_proto::CommitSha;
use tokio::process::Command;

/// How much of git's complaint goes into a reason, in bytes from its end.
const COMPLAINT_MAX_BYTES: usize = 300;

/// git, in the surroundings that the worker gives it.
pub(crate) struct Git {
    mirrors: PathBuf,
    config: PathBuf,
    timeout: Duration,
}

impl Git {
    /// Prepares the directory of mirrors.
    pub(crate) fn open(data_dir: &Path, timeout: Duration) -> std::io::Result<Self> {
        let mirrors = data_dir.join("mirrors");
        std::fs::create_dir_all(&mirrors)?;
        // A file, not `-c`: a local repository is read by a git of its own, which sees only the environment.
        // The worker's user keeps its credentials by its own configuration.
        let config = data_dir.join("gitconfig");
        let text = "[include]\n\tpath = ~/.gitconfig\n[safe]\n\tdirectory = *\n[fetch]\n\tfsckObjects = true\n\
                    [transfer]\n\tfsckObjects = true\n[gc]\n\tautoDetach = false\n[advice]\n\tdetachedHead = false\n";
        shoal_process::write_atomic(&config, text.as_bytes())?;
        Ok(Self { mirrors, config, timeout })
    }

    async fn run(&self, dir: &Path, args: &[&str]) -> Result<(), String> {
        let mut command = Command::new("git");
        command
            .arg("-C")
            .arg(dir)
            .args(args)
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_ASKPASS", "true")
            .env("GIT_CONFIG_GLOBAL", &self.config)
            .env("LC_ALL", "C")
            .env_remove("GIT_DIR")
            .env_remove("GIT_WORK_TREE")
            .env_remove("GIT_INDEX_FILE")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = match tokio::time::timeout(self.timeout, command.output()).await {
            Err(_) => return Err(format!("git took more than {} s", self.timeout.as_secs())),
            Ok(Err(error)) => return Err(format!("cannot run git: {error}")),
            Ok(Ok(output)) => output,
        };
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let line =
            text.lines().rfind(|line| line.starts_with("fatal:") || line.starts_with("error:"));
        let line = line.or(text.lines().last()).unwrap_or("git failed").trim();
        Err(line.chars().take(COMPLAINT_MAX_BYTES).collect())
    }

    fn mirror_of(&self, repository: &str) -> PathBuf {
        let name = blake3::hash(repository.as_bytes()).to_hex();
        self.mirrors.join(format!("{}.git", &name[..32]))
    }

    async fn has(&self, mirror: &Path, commit: &CommitSha) -> bool {
        self.run(mirror, &["cat-file", "-e", &format!("{commit}^{{commit}}")]).await.is_ok()
    }

    /// Brings `commit` into the mirror of `repository`, fetching only what is missing.
    ///
    /// # Errors
    /// One line that says what is wrong with the repository or the commit.
    pub(crate) async fn fetch(
        &self,
        repository: &str,
        commit: &CommitSha,
    ) -> Result<PathBuf, String> {
        let mirror = self.mirror_of(repository);
        if !mirror.join("HEAD").exists() {
            std::fs::create_dir_all(&mirror)
                .map_err(|error| format!("cannot make a mirror: {error}"))?;
            let format = if commit.as_str().len() == 64 { "sha256" } else { "sha1" };
            self.run(&mirror, &["init", "-q", "--bare", &format!("--object-format={format}")])
                .await?;
        }
        if self.has(&mirror, commit).await {
            return Ok(mirror);
        }
        // By its name: no more of the history than it needs, and no branch that somebody else broke. A ref keeps it,
        // so that the next fetch tells the server what is here; there are at most 256 of them.
        let keep = format!("+{commit}:refs/shoal/{}", &commit.as_str()[..2]);
        let one = ["fetch", "-q", "--no-tags", "--no-write-fetch-head", "--", repository, &keep];
        if self.run(&mirror, &one).await.is_ok() && self.has(&mirror, commit).await {
            return Ok(mirror);
        }
        // An old server gives only what a branch or a tag names.
        let (heads, tags) = ("+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*");
        let all =
            ["fetch", "-q", "--prune", "--no-write-fetch-head", "--", repository, heads, tags];
        self.run(&mirror, &all)
            .await
            .map_err(|error| format!("repository {repository} cannot be read: {error}"))?;
        if !self.has(&mirror, commit).await {
            return Err(format!(
                "commit {commit} is not in repository {repository}: push it first"
            ));
        }
        Ok(mirror)
    }

    /// Checks `commit` out of a mirror into `dir`, which must not exist.
    ///
    /// # Errors
    /// One line.
    pub(crate) async fn checkout(
        &self,
        mirror: &Path,
        commit: &CommitSha,
        dir: &Path,
    ) -> Result<(), String> {
        let wrong = |error: String| format!("cannot check {commit} out: {error}");
        let (from, to) = (mirror.to_string_lossy(), dir.to_string_lossy());
        // Hard links to the mirror's objects would be the build user's to change.
        let clone = ["clone", "-q", "--shared", "--no-checkout", "--no-tags", "--", &from, &to];
        self.run(mirror, &clone).await.map_err(wrong)?;
        self.run(dir, &["checkout", "-q", "--detach", commit.as_str()]).await.map_err(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn git(dir: &Path, args: &[&str]) -> String {
        let output = std::process::Command::new("git")
            .arg("-C")
            .arg(dir)
            .args(["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "safe.directory=*"])
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().into()
    }

    fn commit(repo: &Path, text: &str) -> CommitSha {
        std::fs::write(repo.join("file"), text).unwrap();
        git(repo, &["add", "-A"]);
        git(repo, &["commit", "-q", "-m", text]);
        git(repo, &["rev-parse", "HEAD"]).parse().unwrap()
    }

    #[tokio::test]
    async fn a_mirror_learns_new_commits_and_commits_that_no_branch_names() {
        let dir = tempfile::tempdir().unwrap();
        let repo = dir.path().join("repo");
        std::fs::create_dir(&repo).unwrap();
        git(&repo, &["init", "-q", "-b", "main"]);
        let source = repo.to_str().unwrap();
        let worker = Git::open(dir.path(), Duration::from_secs(60)).unwrap();
        let first = commit(&repo, "one");
        let mirror = worker.fetch(source, &first).await.unwrap();
        let second = commit(&repo, "two");
        git(&repo, &["reset", "-q", "--hard", first.as_str()]);
        assert_eq!(worker.fetch(source, &second).await.unwrap(), mirror, "one mirror a repository");
        for (commit, text) in [(&first, "one"), (&second, "two")] {
            let out = dir.path().join(text);
            worker.checkout(&mirror, commit, &out).await.unwrap();
            assert_eq!(std::fs::read_to_string(out.join("file")).unwrap(), text);
        }
        // What is there needs no repository any more.
        std::fs::remove_dir_all(&repo).unwrap();
        worker.fetch(source, &first).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let repo = dir.path().join("repo");
        std::fs::create_dir(&repo).unwrap();
        git(&repo, &["init", "-q", "-b", "main"]);
        commit(&repo, "one");
        let worker = Git::open(dir.path(), Duration::from_secs(60)).unwrap();
        let unknown: CommitSha = "0123456789abcdef0123456789abcdef01234567".parse().unwrap();
        let error = worker.fetch(repo.to_str().unwrap(), &unknown).await.unwrap_err();
        assert!(error.contains(unknown.as_str()) && error.contains("push it first"), "{error}");
        let nowhere = dir.path().join("nowhere");
        let error = worker.fetch(nowhere.to_str().unwrap(), &unknown).await.unwrap_err();
        assert!(error.contains("nowhere") && error.contains("cannot be read"), "{error}");
        assert_eq!(error.lines().count(), 1);
    }
}
