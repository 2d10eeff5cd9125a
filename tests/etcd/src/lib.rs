//! A real etcd for tests: a prefix of one's own on a shared server, or a server of one's own.
//!
//! [`Place::create`] names an empty prefix on the server whose URL stands in `SHOAL_TEST_ETCD` (`.ci/test` starts one for
//! all tests); where that is not set, it starts a [`Server`] of its own with the program of Debian's package
//! `etcd-server`. A test without a server fails and says how to install one; it is never skipped.
//!
//! A [`Server`] can be killed, started again and held still; [`Server::start_cluster`] starts several that are one etcd. It lives in a temporary directory, and ends with whoever
//! started it, killed or not: its parent is a shell that waits for the end of its input, which the kernel closes.

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::atomic::{AtomicU16, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The URL of a server, `etcd://HOST:PORT`.
pub const VARIABLE: &str = "SHOAL_TEST_ETCD";

/// How long a server may take to start on a slow, busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How often another pair of ports is tried.
const PORT_TRIES: u32 = 20;

/// Ports that the kernel gives to nobody by itself, so that a server that is started again finds its own free.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// Runs the server as long as the input is open, and does what its lines say.
const RUN: &str = r#"
set -u
dir=$1
shift
start() {
    etcd --data-dir "$dir/data" "$@" >>"$dir/log" 2>&1 </dev/null &
    server=$!
}
end() {
    kill -CONT $server 2>/dev/null
    kill -KILL $server 2>/dev/null
    wait $server 2>/dev/null
}
trap 'end; exit' TERM INT
start "$@"
while read -r word; do
    case $word in
        kill) end ;;
        start) start "$@" ;;
        hold) kill -STOP $server ;;
        go) kill -CONT $server ;;
        empty) end; rm -rf "$dir/data" ;;
        alive) kill -0 $server 2>/dev/null || word=dead ;;
    esac
    echo "$word"
done
end
"#;

/// A server of one's own. Ends when it is dropped, and whenever its process ends.
pub struct Server {
    shell: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    port: u16,
    scheme: &'static str,
    dir: TempDir,
    http: reqwest::Client,
}

/// Fails where no etcd is installed.
fn installed() -> anyhow::Result<()> {
    let found = Command::new("etcd").arg("--version").stdout(Stdio::null()).status();
    ensure!(
        found.is_ok_and(|status| status.success()),
        "no etcd: install Debian's package with: apt-get install etcd-server; or name a server that runs \
         with: {VARIABLE}=etcd://HOST:PORT"
    );
    Ok(())
}

/// Somebody took a port in between.
fn is_port_taken(error: &anyhow::Error) -> bool {
    format!("{error:#}").contains("address already in use")
}

/// A member's name and ports.
struct Ports {
    name: String,
    client: u16,
    peer: u16,
}

impl Ports {
    fn free(name: &str) -> anyhow::Result<Self> {
        Ok(Self { name: name.into(), client: free_port()?, peer: free_port()? })
    }

    /// As `--initial-cluster` names it.
    fn peer(&self) -> String {
        format!("{}=http://127.0.0.1:{}", self.name, self.peer)
    }
}

fn free_port() -> anyhow::Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let width = PORTS.end - PORTS.start;
    for _ in 0..PORT_TRIES * 10 {
        // Processes of one test run begin far from each other.
        let at = u64::from(std::process::id()) * 7_919
            + u64::from(NEXT.fetch_add(1, Ordering::Relaxed)) * 13;
        let port = PORTS.start + u16::try_from(at % u64::from(width))?;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port in {PORTS:?}")
}

impl Server {
    /// Starts an empty server, and waits until it answers.
    ///
    /// # Errors
    /// When etcd is not installed or does not start, with its log.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with("http", &[], |_| Ok(())).await
    }

    /// Starts one that speaks HTTPS with these flags; what they name is put into its directory by `prepare`, and `DIR` in
    /// them is that directory. A `client.pem` with its `client.key` there is shown to it by [`Server::call`].
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn start_tls(
        flags: &[&str],
        prepare: impl Fn(&std::path::Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        Self::start_with("https", flags, prepare).await
    }

    /// Starts an empty cluster of so many members, and waits until each answers: that is when they have a leader.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn start_cluster(members: usize) -> anyhow::Result<Vec<Self>> {
        installed()?;
        let mut last = None;
        for _ in 0..PORT_TRIES {
            let places = (0..members).map(|at| Ports::free(&format!("m{at}")));
            let places = places.collect::<anyhow::Result<Vec<_>>>()?;
            let all = places.iter().map(Ports::peer).collect::<Vec<_>>().join(",");
            // None is ready before most of them run.
            let servers =
                places.iter().map(|ports| Self::spawn("http", ports, &all, &[], |_| Ok(())));
            let mut servers = servers.collect::<anyhow::Result<Vec<_>>>()?;
            let mut result = Ok(());
            for server in &mut servers {
                result = result.and(server.ready().await);
            }
            match result {
                Ok(()) => return Ok(servers),
                Err(error) if is_port_taken(&error) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.context("no port was tried")?)
    }

    async fn start_with(
        scheme: &'static str,
        flags: &[&str],
        prepare: impl Fn(&std::path::Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        installed()?;
        let mut last = None;
        for _ in 0..PORT_TRIES {
            match Self::try_start(scheme, flags, &prepare).await {
                Ok(server) => return Ok(server),
                Err(error) if is_port_taken(&error) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.context("no port was tried")?)
    }

    async fn try_start(
        scheme: &'static str,
        flags: &[&str],
        prepare: impl Fn(&std::path::Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let ports = Ports::free("test")?;
        let mut server = Self::spawn(scheme, &ports, &ports.peer(), flags, prepare)?;
        server.ready().await?;
        Ok(server)
    }

    /// Starts the process of one member of the cluster of `all`.
    fn spawn(
        scheme: &'static str,
        ports: &Ports,
        all: &str,
        flags: &[&str],
        prepare: impl Fn(&std::path::Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("shoal-etcd-").tempdir()?;
        prepare(dir.path())?;
        let port = ports.client;
        let client = format!("{scheme}://127.0.0.1:{port}");
        let peer = format!("http://127.0.0.1:{}", ports.peer);
        let mut command = Command::new("sh");
        command.args(["-c", RUN, "sh"]).arg(dir.path());
        command.args(["--name", &ports.name, "--logger", "zap"]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", all]);
        let path = dir.path().display().to_string();
        command.args(flags.iter().map(|flag| flag.replace("DIR", &path)));
        let mut shell = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run sh")?;
        let input = shell.stdin.take();
        let output = BufReader::new(shell.stdout.take().context("no output")?);
        let identity = fs::read(dir.path().join("client.pem"))
            .and_then(|cert| Ok([cert, fs::read(dir.path().join("client.key"))?].concat()));
        let http = plain_client(scheme == "https", identity.ok())?;
        Ok(Self { shell, input, output, port, scheme, dir, http })
    }

    /// Waits until it answers.
    async fn ready(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        let url = format!("{}://127.0.0.1:{}/health", self.scheme, self.port);
        loop {
            let request = self.http.get(&url).timeout(Duration::from_secs(5));
            if request.send().await.is_ok_and(|answer| answer.status().is_success()) {
                return Ok(());
            }
            if start.elapsed() > START_TIMEOUT {
                bail!("etcd does not answer:\n{}", self.log());
            }
            if self.order("alive")? == "dead" {
                bail!("etcd did not start:\n{}", self.log());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn order(&mut self, word: &str) -> anyhow::Result<String> {
        writeln!(self.input.as_mut().context("no input")?, "{word}")?;
        let mut done = String::new();
        self.output.read_line(&mut done)?;
        Ok(done.trim().to_string())
    }

    /// Its URL, `etcd://127.0.0.1:PORT`; `etcds://` with TLS.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.scheme == "https" { "etcds" } else { "etcd" };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// Its directory; the key and certificates that `prepare` made are there.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.dir.path().into()
    }

    /// Kills it (SIGKILL); returns when it is gone.
    ///
    /// # Errors
    /// When its shell is gone.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.order("kill").map(drop)
    }

    /// Kills it and removes its data; as new with [`Server::start_again`].
    ///
    /// # Errors
    /// When its shell is gone.
    pub fn empty(&mut self) -> anyhow::Result<()> {
        self.order("empty").map(drop)
    }

    /// Starts it again, at the same address, with what it has on the disk.
    ///
    /// # Errors
    /// When it does not start, with its log.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        self.run_again()?;
        self.ready().await
    }

    /// Starts it again and does not wait: a member answers when most of its cluster run.
    ///
    /// # Errors
    /// When its shell is gone.
    pub fn run_again(&mut self) -> anyhow::Result<()> {
        self.order("start").map(drop)
    }

    /// Holds it still: its connections stay open, and it answers nothing.
    ///
    /// # Errors
    /// When its shell is gone.
    pub fn hold(&mut self) -> anyhow::Result<()> {
        self.order("hold").map(drop)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When its shell is gone.
    pub fn go(&mut self) -> anyhow::Result<()> {
        self.order("go").map(drop)
    }

    /// Calls its JSON gateway.
    ///
    /// # Errors
    /// When it does not answer, or says no.
    pub async fn call(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        call(&self.http, &format!("{}://127.0.0.1:{}", self.scheme, self.port), path, body).await
    }

    /// Its present revision.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn revision(&self) -> anyhow::Result<u64> {
        let answer = self.call("kv/range", &json!({ "key": BASE64.encode("x") })).await?;
        let revision = answer["header"]["revision"].as_str().context("no revision")?;
        Ok(revision.parse()?)
    }

    /// Forgets all that was before the present revision.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn compact(&self) -> anyhow::Result<()> {
        let revision = self.revision().await?.to_string();
        self.call("kv/compaction", &json!({ "revision": revision, "physical": true })).await?;
        Ok(())
    }

    /// Puts a value under a key, whatever is there.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn put(&self, key: &str, value: &[u8]) -> anyhow::Result<()> {
        let body = json!({ "key": BASE64.encode(key), "value": BASE64.encode(value) });
        self.call("kv/put", &body).await.map(drop)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The shell's input ends, and so does the server.
        drop(self.input.take());
        let _ = self.shell.wait();
    }
}

/// An empty prefix of one's own.
pub struct Place {
    url: String,
    server_url: String,
    server: Option<Server>,
}

impl Place {
    /// Names one, on the server of [`VARIABLE`] or on a server of its own.
    ///
    /// # Errors
    /// When there is no server, and how to install one.
    pub async fn create() -> anyhow::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (server, server_url) = match env::var(VARIABLE) {
            Ok(url) => (None, url),
            Err(_) => {
                let server = Server::start().await?;
                let url = server.url();
                (Some(server), url)
            }
        };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let url = format!("{server_url}/shoal_test_{}_{number}", std::process::id());
        let place = Self { url, server_url, server };
        // What a killed test with the same number left.
        place.clear().await?;
        Ok(place)
    }

    /// Its URL, with the prefix.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Removes all its keys, and its server where it has one of its own.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn remove(self) -> anyhow::Result<()> {
        self.clear().await?;
        drop(self.server);
        Ok(())
    }

    async fn clear(&self) -> anyhow::Result<()> {
        let prefix = self.url.strip_prefix(&self.server_url).context("no prefix")?;
        let (first, end) = (format!("{prefix}/"), format!("{prefix}0"));
        let body = json!({ "key": BASE64.encode(first), "range_end": BASE64.encode(end) });
        let host = self.server_url.strip_prefix("etcd://").context("it is etcd://HOST:PORT")?;
        call(&plain_client(false, None)?, &format!("http://{host}"), "kv/deleterange", &body)
            .await?;
        Ok(())
    }
}

/// A client that believes any certificate: whoever uses the server checks it in earnest.
fn plain_client(tls: bool, identity: Option<Vec<u8>>) -> anyhow::Result<reqwest::Client> {
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    // One is enough for the process; who was first does not matter.
    let _ = provider.install_default();
    let mut builder = reqwest::Client::builder().no_proxy().tls_danger_accept_invalid_certs(tls);
    if let Some(pem) = identity {
        builder = builder.identity(reqwest::Identity::from_pem(&pem)?);
    }
    Ok(builder.build()?)
}

async fn call(
    http: &reqwest::Client,
    base: &str,
    path: &str,
    body: &Value,
) -> anyhow::Result<Value> {
    let answer = http.post(format!("{base}/v3/{path}")).json(body).send().await?;
    let status = answer.status();
    let text = answer.text().await?;
    ensure!(status.is_success(), "{path}: {status} {text}");
    Ok(serde_json::from_str(&text)?)
}
