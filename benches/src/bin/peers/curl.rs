//! One server for all: nginx over HTTPS, and curl. What everybody has, and no swarm.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use shoal_benches::{machine::Machine, process, processes::Processes};

use crate::run::{Contender, EVERY, Ground};

/// How long nginx may take to listen.
const READY: Duration = Duration::from_secs(20);

/// How long it may take to end.
const GONE: Duration = Duration::from_secs(10);

/// The cheapest of TLS 1.3's on a machine with AES instructions, and what Shoal takes.
const CIPHER: &str = "TLS_AES_128_GCM_SHA256";

pub(crate) struct Nginx {
    server: Processes,
    master: u32,
    dir: PathBuf,
    url: String,
    leechers: Vec<Machine>,
    running: Vec<Child>,
    ended: usize,
}

impl Drop for Nginx {
    fn drop(&mut self) {
        for child in &mut self.running {
            // One that has ended is gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
        // One that is killed leaves its workers, and the port with them.
        self.server.terminate(GONE);
    }
}

impl Nginx {
    /// Starts the server.
    pub(crate) fn start(ground: &Ground<'_>) -> anyhow::Result<Self> {
        let dir = ground.dir.to_path_buf();
        let seed = ground.seed()?;
        certificate(&dir, &seed.address)?;
        let config = dir.join("nginx.conf");
        fs::write(&config, config_text(&dir, &ground.source()?, &seed.at(0)))?;
        let mut command = ground.command(seed);
        command.arg("-p").arg(&dir).arg("-c").arg(&config).arg("-e").arg(dir.join("error.log"));
        let mut server = Processes::default();
        server.spawn(&seed.name, &ground.log(seed), &mut command)?;
        let at = seed.at(0);
        server.wait("nginx to listen", EVERY, READY, || {
            Ok(std::net::TcpStream::connect(&at).is_ok())
        })?;
        let master = server.pid(&seed.name).context("no nginx")?;
        let url = format!("https://{at}/{}", ground.file_name()?);
        let leechers = ground.leechers().to_vec();
        for leecher in &leechers {
            ground.own_dir(leecher)?;
        }
        Ok(Self { server, master, dir, url, leechers, running: Vec::new(), ended: 0 })
    }

    fn file(&self, leecher: &Machine) -> PathBuf {
        self.dir.join(&leecher.name).join("file")
    }
}

fn certificate(dir: &Path, address: &str) -> anyhow::Result<()> {
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-nodes", "-newkey", "ec", "-days", "2"]);
    command.args(["-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=seed"]);
    command.args(["-addext", &format!("subjectAltName=IP:{address}")]);
    command.arg("-keyout").arg(dir.join("key.pem")).arg("-out").arg(dir.join("cert.pem"));
    let output = command.output().context("cannot run openssl")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "openssl makes no certificate: {}", said.trim());
    Ok(())
}

fn config_text(dir: &Path, root: &Path, listen: &str) -> String {
    let (dir, root) = (dir.display(), root.display());
    format!(
        "user root;
daemon off;
worker_processes auto;
pid {dir}/nginx.pid;
events {{}}
http {{
    log_format sent '$body_bytes_sent';
    access_log {dir}/sent.log sent;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    sendfile on;
    tcp_nopush on;
    server {{
        listen {listen} ssl reuseport;
        ssl_certificate {dir}/cert.pem;
        ssl_certificate_key {dir}/key.pem;
        ssl_protocols TLSv1.3;
        ssl_conf_command Ciphersuites {CIPHER};
        root {root};
    }}
}}
"
    )
}

impl Contender for Nginx {
    fn go(&mut self) -> anyhow::Result<()> {
        for leecher in &self.leechers {
            let mut command = leecher.command(Path::new("curl"));
            command.args(["--silent", "--show-error", "--fail", "--noproxy", "*"]);
            command.args(["--tls13-ciphers", CIPHER, "--cacert"]).arg(self.dir.join("cert.pem"));
            command.arg("--output").arg(self.file(leecher)).arg(&self.url).stdin(Stdio::null());
            self.running.push(command.spawn().context("cannot start curl")?);
        }
        Ok(())
    }

    fn done(&mut self) -> anyhow::Result<bool> {
        self.server.check()?;
        let mut running = Vec::new();
        for mut child in self.running.drain(..) {
            match child.try_wait()? {
                None => running.push(child),
                Some(status) => {
                    ensure!(status.success(), "curl failed: {status}");
                    self.ended += 1;
                }
            }
        }
        self.running = running;
        Ok(self.ended == self.leechers.len())
    }

    fn uploaded_bytes(&mut self) -> anyhow::Result<u64> {
        let log = fs::read_to_string(self.dir.join("sent.log"))?;
        log.lines().map(|line| Ok(line.parse::<u64>()?)).sum()
    }

    fn seed_pids(&self) -> Vec<u32> {
        let workers = process::children(self.master).unwrap_or_default();
        [vec![self.master], workers].concat()
    }

    fn leecher_pids(&self) -> Vec<u32> {
        self.running.iter().map(Child::id).collect()
    }

    fn files(&self) -> Vec<PathBuf> {
        self.leechers.iter().map(|leecher| self.file(leecher)).collect()
    }
}
