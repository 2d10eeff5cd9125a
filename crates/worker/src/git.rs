//! Mirrors of repositories, kept and fetched incrementally, and clean checkouts of exact commits.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use shoal_proto::CommitSha;
use tokio::process::Command;

use crate::{job::Failure, processes::MARK};

/// How much of git's complaint goes into a reason, in characters.
const COMPLAINT_MAX_CHARS: usize = 300;

/// How often a repository is tried when the network may be to blame, and how long the first pause is.
const FETCH_TRIES: u32 = 3;
const FETCH_PAUSE: Duration = Duration::from_secs(1);

/// What git says when another try would meet the same.
const PERMANENT: &[&str] = &[
    "does not appear to be a git repository",
    "not a git repository",
    "does not exist",
    "not found",
    "Authentication failed",
    "could not read Username",
    "could not read Password",
    "Permission denied",
    "nable to find remote helper",
    "not allowed",
    "fsck",
];

/// Lines that git prints after the one that says what is wrong.
const ADVICE: &[&str] = &[
    "fatal: Could not read from remote repository",
    "fatal: the remote end hung up",
    "fatal: early EOF",
    "fatal: fetch-pack: invalid index-pack output",
];

/// Takes the name and the password that `repository` may hold out of `text`.
fn without_password(text: &str, repository: &str) -> String {
    let rest = repository.split_once("://").map_or("", |(_, rest)| rest);
    let host = &rest[..rest.find('/').unwrap_or(rest.len())];
    match host.rfind('@') {
        Some(at) => text.replace(&host[..=at], ""),
        None => text.into(),
    }
}

/// The line of git's that says what went wrong.
fn complaint(stderr: &str) -> String {
    let lines = || stderr.lines().map(str::trim).filter(|line| !line.is_empty());
    let is_wrong = |line: &&str| {
        ["fatal:", "error:", "ERROR:", "remote:"].iter().any(|word| line.starts_with(word))
    };
    let is_advice = |line: &str| ADVICE.iter().any(|advice| line.starts_with(advice));
    let line = lines().filter(is_wrong).rfind(|line| !is_advice(line));
    let line = line.or_else(|| lines().next_back()).unwrap_or("git failed");
    line.chars().take(COMPLAINT_MAX_CHARS).collect()
}

/// Removes what a git that was killed locked for ever. Objects have no locks, and are many.
fn remove_locks(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if entry.file_name() != "objects" {
                remove_locks(&path)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "lock") {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// A git and what it has started, such as an ssh that waits for its server: killed when it is given up.
struct Group(Option<Pid>);

impl Group {
    /// It has ended by itself: its number may be another's by now.
    fn has_ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// git, in the surroundings that the worker gives it.
pub(crate) struct Git {
    mirrors: PathBuf,
    config: PathBuf,
    /// What marks its processes, so that a worker that starts again finds them.
    mark: PathBuf,
    timeout: Duration,
    /// One build at a time fetches into a mirror: two would meet each other's locks.
    turns: Mutex<BTreeMap<PathBuf, Arc<tokio::sync::Mutex<()>>>>,
}

impl Git {
    /// Prepares the directory of mirrors. No git of an earlier worker may still run.
    pub(crate) fn open(data_dir: &Path, timeout: Duration) -> std::io::Result<Self> {
        let mirrors = data_dir.join("mirrors");
        fs::create_dir_all(&mirrors)?;
        remove_locks(&mirrors)?;
        // A file, not `-c`: a local repository is read by a git of its own, which sees only the environment.
        // The worker's user keeps its credentials by its own configuration.
        let config = data_dir.join("gitconfig");
        // Old histories have a few harmless flaws that hosts have always let through; what can mislead a checkout
        // (bad names, `.git` in a tree, broken links) stays an error.
        let text = "[include]\n\tpath = ~/.gitconfig\n[safe]\n\tdirectory = *\n[fetch]\n\tfsckObjects = true\n\
                    [fetch \"fsck\"]\n\tzeroPaddedFilemode = ignore\n\tbadTimezone = ignore\n\
                    \tmissingSpaceBeforeDate = ignore\n\tmissingSpaceBeforeEmail = ignore\n\
                    [transfer]\n\tfsckObjects = true\n[gc]\n\tautoDetach = false\n[advice]\n\tdetachedHead = false\n";
        shoal_process::write_atomic(&config, text.as_bytes())?;
        let mark = data_dir.join("builds");
        Ok(Self { mirrors, config, mark, timeout, turns: Mutex::default() })
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
            .env(MARK, &self.mark)
            .env_remove("GIT_DIR")
            .env_remove("GIT_WORK_TREE")
            .env_remove("GIT_INDEX_FILE")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let cannot = |error: io::Error| format!("cannot run git: {error}");
        let child = command.spawn().map_err(cannot)?;
        let group = Group(child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)));
        let output = match tokio::time::timeout(self.timeout, child.wait_with_output()).await {
            Err(_) => return Err(format!("git took more than {} s", self.timeout.as_secs())),
            Ok(output) => output.map_err(cannot)?,
        };
        group.has_ended();
        if output.status.success() {
            return Ok(());
        }
        Err(complaint(&String::from_utf8_lossy(&output.stderr)))
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
    /// One line that says what is wrong with the repository or the commit, and whether it may pass.
    pub(crate) async fn fetch(
        &self,
        repository: &str,
        commit: &CommitSha,
    ) -> Result<PathBuf, Failure> {
        let mirror = self.mirror_of(repository);
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            turns.entry(mirror.clone()).or_default().clone()
        };
        let _turn = turn.lock().await;
        let made = self.make(&mirror, commit).await;
        made.map_err(|error| Failure {
            reason: format!("cannot make a mirror: {error}"),
            retry: true,
        })?;
        let shown = without_password(repository, repository);
        let (mut pause, mut tries) = (FETCH_PAUSE, 1);
        while !self.has(&mirror, commit).await {
            match self.fetch_once(&mirror, repository, commit).await {
                Ok(()) if self.has(&mirror, commit).await => break,
                Ok(()) => {
                    let reason =
                        format!("commit {commit} is not in repository {shown}: push it first");
                    return Err(Failure { reason, retry: false });
                }
                Err(error) => {
                    let retry = !PERMANENT.iter().any(|word| error.contains(word));
                    if !retry || tries == FETCH_TRIES {
                        let error = without_password(&error, repository);
                        let reason = format!("repository {shown} cannot be read: {error}");
                        return Err(Failure { reason, retry });
                    }
                }
            }
            tokio::time::sleep(pause).await;
            (pause, tries) = (pause * 2, tries + 1);
        }
        Ok(mirror)
    }

    async fn make(&self, mirror: &Path, commit: &CommitSha) -> Result<(), String> {
        if mirror.join("HEAD").exists() {
            return Ok(());
        }
        fs::create_dir_all(mirror).map_err(|error| error.to_string())?;
        let format = if commit.as_str().len() == 64 { "sha256" } else { "sha1" };
        self.run(mirror, &["init", "-q", "--bare", &format!("--object-format={format}")]).await
    }

    async fn fetch_once(
        &self,
        mirror: &Path,
        repository: &str,
        commit: &CommitSha,
    ) -> Result<(), String> {
        // By its name: no more of the history than it needs, and no branch that somebody else broke. A ref keeps it,
        // so that the next fetch tells the server what is here; there are at most 256 of them.
        let keep = format!("+{commit}:refs/shoal/{}", &commit.as_str()[..2]);
        let one = ["fetch", "-q", "--no-tags", "--no-write-fetch-head", "--", repository, &keep];
        if self.run(mirror, &one).await.is_ok() && self.has(mirror, commit).await {
            return Ok(());
        }
        // An old server gives only what a branch or a tag names.
        let (heads, tags) = ("+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*");
        let all =
            ["fetch", "-q", "--prune", "--no-write-fetch-head", "--", repository, heads, tags];
        self.run(mirror, &all).await
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
        fs::write(repo.join("file"), text).unwrap();
        git(repo, &["add", "-A"]);
        git(repo, &["commit", "-q", "-m", text]);
        git(repo, &["rev-parse", "HEAD"]).parse().unwrap()
    }

    #[tokio::test]
    async fn a_mirror_learns_new_commits_and_commits_that_no_branch_names() {
        let dir = tempfile::tempdir().unwrap();
        let repo = dir.path().join("repo");
        fs::create_dir(&repo).unwrap();
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
            assert_eq!(fs::read_to_string(out.join("file")).unwrap(), text);
        }
        // What is there needs no repository any more.
        fs::remove_dir_all(&repo).unwrap();
        worker.fetch(source, &first).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let repo = dir.path().join("repo");
        fs::create_dir(&repo).unwrap();
        git(&repo, &["init", "-q", "-b", "main"]);
        commit(&repo, "one");
        let worker = Git::open(dir.path(), Duration::from_secs(60)).unwrap();
        let unknown: CommitSha = "0123456789abcdef0123456789abcdef01234567".parse().unwrap();
        let failure = worker.fetch(repo.to_str().unwrap(), &unknown).await.unwrap_err();
        assert!(!failure.retry);
        let error = failure.reason;
        assert!(error.contains(unknown.as_str()) && error.contains("push it first"), "{error}");
        let nowhere = dir.path().join("nowhere");
        let failure = worker.fetch(nowhere.to_str().unwrap(), &unknown).await.unwrap_err();
        assert!(!failure.retry);
        let error = failure.reason;
        assert!(error.contains("does not appear to be a git repository"), "{error}");
        assert!(error.contains("nowhere") && error.contains("cannot be read"), "{error}");
        assert_eq!(error.lines().count(), 1);
    }

    #[tokio::test]
    async fn builds_of_one_repository_take_turns_and_locks_of_the_dead_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let repo = dir.path().join("repo");
        fs::create_dir(&repo).unwrap();
        git(&repo, &["init", "-q", "-b", "main"]);
        let commits: Vec<CommitSha> = (0..8).map(|n| commit(&repo, &n.to_string())).collect();
        let source = repo.to_str().unwrap();
        let mirror = Git::open(dir.path(), Duration::from_secs(60)).unwrap().mirror_of(source);
        fs::create_dir_all(mirror.join("refs/shoal")).unwrap();
        let lock = format!("refs/shoal/{}.lock", &commits[0].as_str()[..2]);
        for lock in ["HEAD.lock", "config.lock", &lock] {
            fs::write(mirror.join(lock), "").unwrap();
        }
        let worker = Arc::new(Git::open(dir.path(), Duration::from_secs(60)).unwrap());
        let mut fetches = tokio::task::JoinSet::new();
        for commit in commits.clone() {
            let (worker, source) = (worker.clone(), source.to_string());
            fetches.spawn(async move { worker.fetch(&source, &commit).await });
        }
        while let Some(fetched) = fetches.join_next().await {
            assert_eq!(fetched.unwrap().unwrap(), mirror);
        }
        for commit in &commits {
            assert!(worker.has(&mirror, commit).await);
        }
    }

    #[test]
    fn a_reason_names_the_fault_and_no_password() {
        let shown = |repository| without_password(repository, repository);
        assert_eq!(shown("https://me:secret@host/a@b.git"), "https://host/a@b.git");
        assert_eq!(shown("git@host:a.git"), "git@host:a.git");
        assert_eq!(shown("/srv/a@b"), "/srv/a@b");
        let refused = "ERROR: Repository not found.\nfatal: Could not read from remote repository.\n\n\
                       Please make sure you have the correct access rights\nand the repository exists.\n";
        assert_eq!(complaint(refused), "ERROR: Repository not found.");
        assert_eq!(
            complaint("warning: x\nfatal: Could not resolve host: h\n"),
            "fatal: Could not resolve host: h"
        );
        assert_eq!(complaint(""), "git failed");
    }

    #[tokio::test]
    async fn what_git_has_started_ends_when_it_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let worker = Git::open(dir.path(), Duration::from_secs(60)).unwrap();
        let pid_file = dir.path().join("pid");
        // As a git does that waits for its ssh.
        let alias = format!(
            "alias.stay=!sleep 98764 & echo $! >{0}.new; mv {0}.new {0}; wait",
            pid_file.display()
        );
        let args = ["-c", &alias, "stay"];
        let pid = tokio::select! {
            ended = worker.run(dir.path(), &args) => panic!("{ended:?}"),
            pid = async {
                loop {
                    match fs::read_to_string(&pid_file) {
                        Ok(pid) => break pid,
                        Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                    }
                }
            } => pid,
        };
        let stat = PathBuf::from(format!("/proc/{}/stat", pid.trim()));
        // Killed, and buried by whoever inherited it.
        let gone = async {
            while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), gone).await.unwrap();
    }

    #[tokio::test]
    async fn a_password_is_not_told_and_a_network_that_fails_may_be_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let worker = Git::open(dir.path(), Duration::from_secs(60)).unwrap();
        let unknown: CommitSha = "0123456789abcdef0123456789abcdef01234567".parse().unwrap();
        // Nothing listens on a port that was just given back.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let source = format!("git://me:secret@127.0.0.1:{port}/x");
        let failure = worker.fetch(&source, &unknown).await.unwrap_err();
        assert!(failure.retry, "{}", failure.reason);
        assert!(!failure.reason.contains("secret"), "{}", failure.reason);
    }
}
