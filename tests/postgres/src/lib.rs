//! A real PostgreSQL for tests and benchmarks: an empty database for each.
//!
//! [`Database::create`] makes a database on the server whose URL stands in `SHOAL_TEST_POSTGRES` (`.ci/test` starts
//! one for all tests); where that is not set, it starts a [`Server`] of its own from the programs of Debian's package
//! `postgresql`. A test without a server fails and says how to install one; it is never skipped.
//!
//! A server lives in a temporary directory and listens on a socket in it alone, so any number run side by side. It
//! ends with whoever started it, killed or not: its parent is a shell that waits for the end of its input, which
//! the kernel closes. It can be killed and started again with what it has on the disk.

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

/// The URL of a server whose user may create databases.
pub const VARIABLE: &str = "SHOAL_TEST_POSTGRES";

/// How long a server may take to start on a slow, busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Where Debian puts each version's programs.
const PROGRAMS: &str = "/usr/lib/postgresql";

/// Runs the server as long as the input is open, and does what its lines say; as the user `postgres` where it is started by
/// root, whom it refuses. SIGINT ends its sessions at once, and in order.
const RUN: &str = r#"
set -eu
bin=$1 dir=$2
shift 2
as=
if [ "$(id -u)" = 0 ]; then
    chown postgres "$dir"
    as="setpriv --reuid=postgres --regid=postgres --clear-groups"
fi
cd "$dir"
$as "$bin/initdb" -D "$dir/data" -U postgres -A trust -E UTF8 --locale=C --no-sync >"$dir/log" 2>&1
start() {
    $as "$bin/postgres" -D "$dir/data" -k "$dir" -c listen_addresses= -c max_connections=300 "$@" \
        >>"$dir/log" 2>&1 </dev/null &
    server=$!
}
end() {
    kill -INT $server 2>/dev/null || true
    wait $server || true
    rm -rf "$dir"
}
trap 'end; exit' TERM INT
trap '' PIPE
start "$@"
while read -r word; do
    case $word in
        kill)
            kill -KILL $server 2>/dev/null || true
            wait $server 2>/dev/null || true
            ;;
        start) start "$@" ;;
        alive)
            case $(cut -d' ' -f3 /proc/$server/stat 2>/dev/null) in
                '' | Z) word=dead ;;
            esac
            ;;
    esac
    echo "$word" || true
done
end
"#;

/// A server of one's own. Ends when it is dropped, and whenever its process ends.
pub struct Server {
    shell: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    dir: PathBuf,
}

/// The newest version's programs.
fn programs() -> anyhow::Result<PathBuf> {
    let version = |path: &Path| path.file_name()?.to_str()?.parse::<u32>().ok();
    let found = fs::read_dir(PROGRAMS).into_iter().flatten().flatten().map(|entry| entry.path());
    let found = found.filter(|path| path.join("bin/postgres").exists());
    let newest = found.max_by_key(|path| version(path));
    let newest = newest.with_context(|| {
        format!(
            "no PostgreSQL in {PROGRAMS}: install Debian's package with: apt-get install postgresql; or \
             name a server that runs with: {VARIABLE}=postgres://USER@HOST/postgres"
        )
    })?;
    Ok(newest.join("bin"))
}

impl Server {
    /// Starts a server with these settings (such as `fsync=off`), and waits until it answers.
    ///
    /// # Errors
    /// When PostgreSQL is not installed or does not start, with its log.
    pub async fn start(settings: &[&str]) -> anyhow::Result<Self> {
        Self::start_in(&env::temp_dir(), settings).await
    }

    /// Starts one in a new directory of `base`, which the user `postgres` must be able to reach.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn start_in(base: &Path, settings: &[&str]) -> anyhow::Result<Self> {
        let programs = programs()?;
        let dir = tempfile::Builder::new().prefix("shoal-pg-").tempdir_in(base)?.keep();
        let mut command = Command::new("sh");
        command.args(["-c", RUN, "sh"]).arg(programs).arg(&dir);
        for setting in settings {
            command.args(["-c", setting]);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut shell = command.spawn().context("cannot run sh")?;
        let input = shell.stdin.take();
        let output = BufReader::new(shell.stdout.take().context("no output")?);
        let mut server = Self { shell, input, output, dir };
        server
            .ready(|server| {
                if let Some(status) = server.shell.try_wait()? {
                    bail!("PostgreSQL did not start ({status}):\n{}", server.log());
                }
                Ok(())
            })
            .await?;
        Ok(server)
    }

    /// Waits until it answers; `check` looks at it before each try.
    async fn ready(
        &mut self,
        mut check: impl FnMut(&mut Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let start = Instant::now();
        loop {
            check(self)?;
            match PgConnection::connect(&self.url("postgres")).await {
                Ok(connection) => return Ok(connection.close().await?),
                Err(error) if start.elapsed() > START_TIMEOUT => {
                    bail!("PostgreSQL does not answer: {error}\n{}", self.log());
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    fn order(&mut self, word: &str) -> anyhow::Result<String> {
        writeln!(self.input.as_mut().context("no input")?, "{word}")?;
        let mut done = String::new();
        self.output.read_line(&mut done)?;
        Ok(done.trim().to_string())
    }

    /// Kills it (SIGKILL), in the middle of whatever it does; returns when its first process is gone, and the others see
    /// that and end.
    ///
    /// # Errors
    /// When its shell is gone.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.order("kill").map(drop)
    }

    /// Starts it again, at the same address, with what it has on the disk; returns when it has recovered and answers.
    ///
    /// # Errors
    /// When it does not start, with its log.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        self.order("start")?;
        self.ready(|server| {
            // It refuses to start as long as one of the old processes uses the data.
            if server.order("alive")? == "dead" {
                server.order("start")?;
            }
            Ok(())
        })
        .await
    }

    /// The URL of a database of this server.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        let socket = self.dir.display().to_string().replace('/', "%2F");
        format!("postgres://postgres@{socket}/{database}")
    }

    fn log(&self) -> String {
        let mut text = String::new();
        if let Ok(mut file) = fs::File::open(self.dir.join("log")) {
            let _ = file.read_to_string(&mut text);
        }
        text
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The shell's input ends, and so does the server.
        drop(self.input.take());
        let _ = self.shell.wait();
    }
}

/// Runs one of PostgreSQL's programs.
fn run_program(name: &str, args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(programs()?.join(name)).args(args).output()?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// An empty database of one's own.
pub struct Database {
    url: String,
    server_url: String,
    name: String,
    server: Option<Server>,
}

impl Database {
    /// Creates one, on the server of [`VARIABLE`] or on a server of its own.
    ///
    /// # Errors
    /// When there is no server, and how to install one.
    pub async fn create() -> anyhow::Result<Self> {
        if let Ok(url) = env::var(VARIABLE) {
            return Self::create_on(&url).await;
        }
        // Nobody's data: what a crash of the machine would lose is the test.
        let server = Server::start(&["fsync=off", "synchronous_commit=off"]).await?;
        let mut database = Self::create_on(&server.url("postgres")).await?;
        database.server = Some(server);
        Ok(database)
    }

    /// Creates one on the server of this URL.
    ///
    /// # Errors
    /// When the server does not answer, or its user may not create databases.
    pub async fn create_on(server_url: &str) -> anyhow::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("shoal_test_{}_{number}", std::process::id());
        let (address, query) = match server_url.split_once('?') {
            Some((address, query)) => (address, format!("?{query}")),
            None => (server_url, String::new()),
        };
        let (host, _) = address.rsplit_once('/').context("a URL ends with /DATABASE")?;
        let url = format!("{host}/{name}{query}");
        let mut connection = PgConnection::connect(server_url)
            .await
            .context("the PostgreSQL server does not answer")?;
        // What a killed test with the same number left.
        let drop_old = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
        sqlx::raw_sql(AssertSqlSafe(drop_old)).execute(&mut connection).await?;
        let create = format!("CREATE DATABASE {name}");
        sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut connection).await?;
        connection.close().await?;
        Ok(Self { url, server_url: server_url.into(), name, server: None })
    }

    /// Its URL.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The URL of its server's first database.
    #[must_use]
    pub fn server_url(&self) -> &str {
        &self.server_url
    }

    /// Runs a statement on the server, beside whoever uses the database.
    ///
    /// # Errors
    /// When the server does not answer or refuses it.
    pub async fn run(&self, sql: &str) -> anyhow::Result<()> {
        let mut connection = PgConnection::connect(&self.server_url).await?;
        sqlx::raw_sql(AssertSqlSafe(sql.to_string())).execute(&mut connection).await?;
        Ok(connection.close().await?)
    }

    /// Runs a statement in the database.
    ///
    /// # Errors
    /// When the server does not answer or refuses it.
    pub async fn run_in(&self, sql: &str) -> anyhow::Result<()> {
        let mut connection = PgConnection::connect(&self.url).await?;
        sqlx::raw_sql(AssertSqlSafe(sql.to_string())).execute(&mut connection).await?;
        Ok(connection.close().await?)
    }

    /// A setting, as it is for who connects to it.
    ///
    /// # Errors
    /// When the server does not answer, or has no such setting.
    pub async fn setting(&self, name: &str) -> anyhow::Result<String> {
        let mut connection = PgConnection::connect(&self.url).await?;
        let query = sqlx::query_scalar("SELECT current_setting($1)").bind(name);
        let value = query.fetch_one(&mut connection).await?;
        connection.close().await?;
        Ok(value)
    }

    /// Backs it up into a file, beside whoever uses it.
    ///
    /// # Errors
    /// What `pg_dump` says.
    pub fn dump(&self, file: &Path) -> anyhow::Result<()> {
        let file = file.to_str().context("a path that is text")?;
        run_program("pg_dump", &["--format=custom", "--file", file, "--dbname", &self.url])
    }

    /// Takes it away, whoever is connected, and puts what a backup holds in its place.
    ///
    /// # Errors
    /// When the server refuses, or what `pg_restore` says.
    pub async fn restore(&self, file: &Path) -> anyhow::Result<()> {
        ensure!(self.name.starts_with("shoal_test_"), "not made by a test");
        self.run(&format!("DROP DATABASE {} WITH (FORCE)", self.name)).await?;
        self.run(&format!("CREATE DATABASE {}", self.name)).await?;
        let file = file.to_str().context("a path that is text")?;
        let options = ["--no-owner", "--exit-on-error", "--dbname", &self.url];
        run_program("pg_restore", &[&options[..], &[file]].concat())
    }

    /// Removes it, whoever is connected. One that is only dropped stays on a shared server until that ends.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn remove(self) -> anyhow::Result<()> {
        ensure!(self.name.starts_with("shoal_test_"), "not made by a test");
        self.run(&format!("DROP DATABASE {} WITH (FORCE)", self.name)).await
    }
}
