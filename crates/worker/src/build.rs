//! Runs a build command: cleaned environment, own process group, output to a file, a time limit, and nothing
//! left of it afterwards ([`crate::processes`]).

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{io::AsyncReadExt as _, net::unix::pipe, process::Command};

use crate::{
    processes::{MARK, Signs, end},
    user::BuildUser,
};

/// How long a build has between SIGTERM and SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(2);

/// How long to read what is left in the pipe after everything of the build is dead.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A build command and its surroundings.
pub(crate) struct BuildCommand<'a> {
    pub(crate) command: &'a str,
    /// The checkout.
    pub(crate) dir: &'a Path,
    /// Where `HOME` and `TMPDIR` are; removed with the build.
    pub(crate) build_dir: &'a Path,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) user: Option<BuildUser>,
    /// Whether nothing else is built at the same time: then every orphan is this build's.
    pub(crate) alone: bool,
    pub(crate) timeout: Duration,
    pub(crate) log: &'a Path,
    pub(crate) log_max_bytes: u64,
}

/// Kills the build when it is dropped, whatever happens.
struct Group {
    leader: Pid,
    alone: bool,
    build_dir: PathBuf,
}

impl Drop for Group {
    fn drop(&mut self) {
        end(&Signs { dir: &self.build_dir, leader: Some(self.leader), orphans: self.alone });
    }
}

impl BuildCommand<'_> {
    /// Runs it to its end; dropping the future ends it too.
    ///
    /// # Errors
    /// One line that says how it failed.
    pub(crate) async fn run(&self) -> Result<(), String> {
        let cannot = |error: io::Error| format!("cannot run the build command: {error}");
        let home = self.build_dir.join("home");
        let temporary = self.build_dir.join("tmp");
        for dir in [&home, &temporary] {
            fs::create_dir_all(dir).map_err(cannot)?;
        }
        if let Some(user) = self.user {
            user.give(self.build_dir).map_err(cannot)?;
        }
        let (reader, writer) = io::pipe().map_err(cannot)?;
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(self.command)
            .current_dir(self.dir)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()))
            .env("LANG", "C.UTF-8")
            .env("CI", "true")
            .envs(self.env.iter().map(|(key, value)| (key, value)))
            .env("HOME", &home)
            .env("TMPDIR", &temporary)
            .env(MARK, self.build_dir)
            .stdin(Stdio::null())
            .stdout(writer.try_clone().map_err(cannot)?)
            .stderr(writer)
            .process_group(0)
            .kill_on_drop(true);
        if let Some(user) = self.user {
            command.uid(user.uid).gid(user.gid);
        }
        let log = File::options().create(true).append(true).open(self.log).map_err(cannot)?;
        let reader = pipe::Receiver::from_owned_fd(OwnedFd::from(reader)).map_err(cannot)?;
        let mut child = command.spawn().map_err(cannot)?;
        // The parent's copies of the pipe's writing end would keep it open.
        drop(command);
        let pid = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let group =
            pid.map(|leader| Group { leader, alone: self.alone, build_dir: self.build_dir.into() });
        let mut copying = tokio::spawn(copy_log(reader, log, self.log_max_bytes));

        let ended = tokio::time::timeout(self.timeout, child.wait()).await;
        if ended.is_err() {
            if let Some(pid) = pid {
                let _ = kill_process_group(pid, Signal::TERM);
            }
            let _ = tokio::time::timeout(TERM_GRACE, child.wait()).await;
        }
        drop(group);
        if tokio::time::timeout(DRAIN_TIMEOUT, &mut copying).await.is_err() {
            copying.abort();
        }
        match ended {
            Err(_) => {
                Err(format!("the build took more than {} s and was ended", self.timeout.as_secs()))
            }
            Ok(Err(error)) => Err(cannot(error)),
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(self.failure(status)),
        }
    }

    /// How it failed, with the last line of its output.
    fn failure(&self, status: ExitStatus) -> String {
        let how = match status.code() {
            Some(code) => format!("the build command exited with {code}"),
            None => format!("the build command was ended: {status}"),
        };
        match last_line(self.log) {
            Some(line) => format!("{how}; its last line: {line}"),
            None => how,
        }
    }
}

/// The last line that is not empty, cut to a length fit for a reason.
fn last_line(log: &Path) -> Option<String> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    const TAIL_BYTES: u64 = 4 << 10;
    const LINE_MAX_CHARS: usize = 200;
    let mut file = File::open(log).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES))).ok()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty())?;
    Some(line.chars().take(LINE_MAX_CHARS).collect())
}

/// Copies a build's output into its log up to a limit, and reads on without keeping: a full pipe would stop it.
async fn copy_log(mut reader: pipe::Receiver, mut log: File, limit: u64) {
    let mut buffer = vec![0; 64 << 10];
    let mut left = limit;
    let mut is_cut = false;
    while let Ok(read @ 1..) = reader.read(&mut buffer).await {
        let keep = read.min(usize::try_from(left).unwrap_or(usize::MAX));
        left -= keep as u64;
        let mut written = log.write_all(&buffer[..keep]);
        if keep < read && !is_cut {
            is_cut = true;
            written = written.and_then(|()| writeln!(log, "\n[the log ends here: {limit} bytes]"));
        }
        if let Err(error) = written {
            tracing::warn!(%error, "cannot write the build's log");
            (left, is_cut) = (0, true);
        }
    }
}

/// The build's output, when it is a regular file of the checkout.
///
/// # Errors
/// One line that names it.
pub(crate) fn output(checkout: &Path, output: &str) -> Result<PathBuf, String> {
    let none = |why: &str| format!("the build left no output at {output}: {why}");
    if output.is_empty() || Path::new(output).is_absolute() {
        return Err(none("write a path relative to the checkout"));
    }
    let root = checkout.canonicalize().map_err(|error| none(&error.to_string()))?;
    let path = root.join(output).canonicalize().map_err(|_| none("there is no such file"))?;
    if !path.starts_with(&root) {
        return Err(none("it leads out of the checkout"));
    }
    if !path.is_file() {
        return Err(none("it is not a regular file"));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processes::adopt_orphans;

    fn kill_marked(dir: &Path) -> usize {
        end(&Signs { dir, leader: None, orphans: false })
    }

    fn run_in(dir: &Path, command: &str, timeout_s: u64) -> Result<(), String> {
        run_as(dir, command, timeout_s, false)
    }

    fn run_as(dir: &Path, command: &str, timeout_s: u64, alone: bool) -> Result<(), String> {
        let build_dir = dir.join("build");
        let checkout = build_dir.join("checkout");
        fs::create_dir_all(&checkout).unwrap();
        let build = BuildCommand {
            command,
            dir: &checkout,
            build_dir: &build_dir,
            env: vec![("SHOAL_APP".into(), "web".into())],
            user: None,
            alone,
            timeout: Duration::from_secs(timeout_s),
            log: &dir.join("log"),
            log_max_bytes: 1_000,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        runtime.block_on(build.run())
    }

    fn log(dir: &Path) -> String {
        fs::read_to_string(dir.join("log")).unwrap()
    }

    #[test]
    fn a_build_sees_only_what_it_is_given() {
        let dir = tempfile::tempdir().unwrap();
        run_in(dir.path(), "env; echo to-stderr >&2", 20).unwrap();
        let log = log(dir.path());
        assert!(log.contains("SHOAL_APP=web") && log.contains("to-stderr"));
        assert!(log.contains(&format!("HOME={}/build/home", dir.path().display())));
        assert!(!log.contains("CARGO"), "the worker's own environment leaks: {log}");
    }

    #[test]
    fn a_failure_tells_the_code_and_the_last_line() {
        let dir = tempfile::tempdir().unwrap();
        let error = run_in(dir.path(), "echo first; echo the reason; exit 7", 20).unwrap_err();
        assert!(error.contains('7') && error.contains("the reason"), "{error}");
    }

    #[test]
    fn nothing_is_left_of_a_build_that_hangs() {
        let dir = tempfile::tempdir().unwrap();
        // One child in the group, one in a session of its own.
        let script = "trap '' TERM; sleep 4000 & setsid sleep 4000 & echo started; sleep 4000";
        let error = run_in(dir.path(), script, 1).unwrap_err();
        assert!(error.contains("1 s"), "{error}");
        assert!(log(dir.path()).contains("started"));
        assert_eq!(kill_marked(&dir.path().join("build")), 0);
    }

    #[test]
    fn what_a_build_leaves_in_the_background_ends_with_it() {
        let dir = tempfile::tempdir().unwrap();
        run_in(dir.path(), "setsid sleep 4000 & sleep 4000 & exit 0", 20).unwrap();
        assert_eq!(kill_marked(&dir.path().join("build")), 0);
    }

    /// Run by the next test in a process of its own: there every orphan is the build's.
    #[test]
    #[ignore = "ends all children of its process"]
    fn alone() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        adopt_orphans();
        // Its session, its environment and its parent are all other ones than the build's.
        let script = format!(
            "env -i setsid sh -c 'sleep 4000 & echo $! >{0}.new; mv {0}.new {0}' & \
             while ! test -e {0}; do :; done",
            pid_file.display()
        );
        run_as(dir.path(), &script, 20, true).unwrap();
        let pid = fs::read_to_string(pid_file).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists(), "{pid} is still there");
    }

    #[test]
    fn a_process_that_hides_its_origin_ends_too() {
        let test = std::env::current_exe().unwrap();
        let output = std::process::Command::new(test)
            .args(["--exact", "build::tests::alone", "--ignored", "--nocapture"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }

    #[test]
    fn a_log_that_fills_its_limit_exactly_says_that_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let text = runtime.block_on(async {
            let (reader, mut writer) = io::pipe().unwrap();
            let reader = pipe::Receiver::from_owned_fd(OwnedFd::from(reader)).unwrap();
            let copying = tokio::spawn(copy_log(reader, File::create(&path).unwrap(), 4));
            writer.write_all(b"full").unwrap();
            while fs::metadata(&path).unwrap().len() < 4 {
                tokio::task::yield_now().await;
            }
            writer.write_all(b"more").unwrap();
            writer.write_all(b"and more").unwrap();
            drop(writer);
            copying.await.unwrap();
            fs::read_to_string(&path).unwrap()
        });
        assert_eq!(text, "full\n[the log ends here: 4 bytes]\n");
    }

    #[test]
    fn a_log_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        run_in(dir.path(), "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done", 60)
            .unwrap();
        let log = log(dir.path());
        assert!(log.len() < 1_200 && log.ends_with("[the log ends here: 1000 bytes]\n"), "{log}");
    }

    #[test]
    fn an_output_is_a_file_of_the_checkout() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("out")).unwrap();
        fs::write(root.join("out/app"), "x").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.join("link")).unwrap();
        std::os::unix::fs::symlink("out/app", root.join("inside")).unwrap();
        assert!(output(root, "out/app").is_ok());
        assert!(output(root, "inside").is_ok());
        for wrong in ["out", "none", "link", "/etc/passwd", "../x", ""] {
            let error = output(root, wrong).unwrap_err();
            assert!(error.contains("no output"), "{wrong}: {error}");
        }
    }
}
