//! A process of the real binary.

use std::{
    ffi::OsStr,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use super::{SHOAL, wait_for};

/// A started process; killed when dropped.
pub struct Process {
    pub name: String,
    pub dir: PathBuf,
    child: Child,
}

impl Process {
    /// Starts `shoal ROLE --config DIR/config.toml`; its log goes to `DIR/log`.
    pub fn start(role: &str, name: &str, dir: &Path) -> Self {
        Self::start_behind(&[], role, name, dir)
    }

    /// The same behind another program, which must become it in the end: `unshare`, or a shell that says `exec "$@"`.
    pub fn start_behind(before: &[&str], role: &str, name: &str, dir: &Path) -> Self {
        Self::start_in(Path::new(SHOAL), &[], before, role, name, dir)
    }

    /// The same of another program with these variables; of the credentials of whoever runs the tests it has none.
    pub fn start_in(
        program: &Path,
        environment: &[(String, String)],
        before: &[&str],
        role: &str,
        name: &str,
        dir: &Path,
    ) -> Self {
        let _ = fs::remove_file(dir.join("data/addresses.json"));
        let log = fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
        // Killed by the kernel when the thread that starts it ends: a test's own, which waits for the test.
        let words = before.iter().chain(&["setpriv", "--pdeathsig", "KILL", "--"]);
        let words: Vec<_> = words.map(OsStr::new).chain([program.as_os_str()]).collect();
        let mut command = Command::new(words[0]);
        let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        for name in names.filter(|name| name.starts_with("AWS_") || name.starts_with("GOOGLE_")) {
            command.env_remove(name);
        }
        let child = command
            .args(&words[1..])
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .arg(role)
            .arg("--config")
            .arg(dir.join("config.toml"))
            .env("SHOAL_LOG", "info,shoal_agent=debug,shoal_region=debug,libp2p=warn,quinn=warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap();
        Self { name: name.into(), dir: dir.into(), child }
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Waits until it says where it listens.
    pub async fn address(&mut self, key: &str) -> SocketAddr {
        let path = self.data_dir().join("addresses.json");
        let name = self.name.clone();
        wait_for(&format!("{name} to be ready"), async || {
            if let Ok(Some(status)) = self.child.try_wait() {
                panic!("{name} ended with {status}:\n{}", self.log());
            }
            let bytes = fs::read(&path).map_err(|error| error.to_string())?;
            let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            let text = value[key].as_str().ok_or(format!("no address {key}"))?;
            text.parse().map_err(|_| format!("{text} is no address"))
        })
        .await
    }

    /// A figure of its metrics page, by its name and labels; 0 when the page does not have it (yet).
    pub async fn metric(&mut self, name: &str) -> u64 {
        let addr = self.address("metrics").await;
        let mut stream = TcpStream::connect(addr).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().unwrap())
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and its exit status.
    pub async fn stop(&mut self) -> std::process::ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let name = self.name.clone();
        wait_for(&format!("{name} to stop"), async || {
            self.child.try_wait().unwrap().ok_or("still runs")
        })
        .await
    }

    /// The exit status, when it has ended by itself.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
