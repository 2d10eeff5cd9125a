//! A coordinator in this process, its clients, and small artifacts.

use std::{
    fmt::Debug,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use shoal_client::{
    Client, ClientError,
    types::{
        App, Artifact, BuildRequest, ClaimRequest, ClaimedJob, DeployRequest, FinishRequest, Job,
        LeaseRef, MachineSeen, MachineStateSeen, Outcome, PublishRequest, RegionReports, Rollout,
    },
};
use shoal_coordinator::{Args, Config, Coordinator};
use shoal_origin::Bucket;
use shoal_pieces::{merge, piece_hash, seal_index};
use shoal_pki::{
    CertificateAuthority, Credentials, GoalSigner, Identity, IssueRequest, Role, Trust,
};
use shoal_proto::{
    ArtifactId, EncodingId, PieceIndex, Revision, codec,
    goal::{Activation, Labels, RolloutPlan},
    manifest::{Codec, EncodingIndex, Manifest, Part, PieceSize, StoredPiece},
    region::{FetchProgress, MachineReport},
    state::MachineState,
    trust::{TRUST_MAX_BYTES, TrustBundle},
};
use tokio_util::sync::CancellationToken;

/// How long anything may take on a slow, busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Looks at a condition until it holds; the failure says what was seen last.
pub(crate) async fn wait_for<T, S: Debug>(
    what: &str,
    mut look: impl AsyncFnMut() -> Result<T, S>,
) -> T {
    let start = Instant::now();
    loop {
        match look().await {
            Ok(found) => return found,
            Err(seen) if start.elapsed() > PATIENCE => panic!("waited for {what}; last: {seen:?}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// A coordinator with regions `eu` and `us` and its cluster's keys.
pub(crate) struct Cluster {
    pub(crate) dir: tempfile::TempDir,
    ca: CertificateAuthority,
    pub(crate) trust: Trust,
    running: Option<(Coordinator, CancellationToken)>,
}

/// Long polls that never look again by themselves: only a bell ends one before [`POLL_S`].
pub(crate) const ONLY_BELLS: &str = "look_again_s = 60\nlong_poll_s = 20\nloss_window_s = 60";

/// More lines of a configuration that names no CA key.
pub(crate) const NO_CA_KEY: &str = "# no CA key";

/// How long such a poll waits when no bell rings, in seconds.
pub(crate) const POLL_S: u32 = 20;

/// Runs something that waits on a long poll, and checks that the poll's end did not end it.
pub(crate) async fn woken<T>(what: impl Future<Output = T>) -> T {
    let start = Instant::now();
    let result = what.await;
    assert!(start.elapsed() < Duration::from_secs(15), "only the end of the poll ended it");
    result
}

/// Short times: nobody waits for half a minute here.
const TIMES: &str = "
heartbeat_s = 0.2
reaper_interval_s = 0.05
replication_interval_s = 0.2
copy_retry_s = 0.05
rollout_interval_s = 0.1
no_machine_grace_s = 0.5
";

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::start_with("").await
    }

    /// Starts one with more lines of configuration.
    pub(crate) async fn start_with(more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = CertificateAuthority::create("test").unwrap();
        let signer = GoalSigner::create(1).unwrap();
        let bundle = TrustBundle {
            cluster: "test".into(),
            number: 1,
            ca_certificates: vec![ca.cert_der().to_vec()],
            goal_keys: vec![signer.public()],
            revoked: vec![],
        };
        let signed = codec::encode(&signer.sign_trust(&bundle).unwrap(), TRUST_MAX_BYTES).unwrap();
        fs::write(dir.path().join("goal.key"), signer.to_pem().unwrap()).unwrap();
        fs::write(dir.path().join("ca.key"), ca.key_pem().unwrap()).unwrap();
        let trust = Trust::from_signed(&signed).unwrap();
        let mut cluster = Self { dir, ca, trust, running: None };
        let identity = cluster.issue(Role::Coordinator, "c1", None);
        let identity_dir = cluster.path("identity");
        fs::create_dir(&identity_dir).unwrap();
        fs::write(identity_dir.join("identity.pem"), identity.0).unwrap();
        fs::write(identity_dir.join("identity.key"), identity.1).unwrap();
        fs::write(identity_dir.join("trust.bin"), signed).unwrap();
        cluster.configure(more);
        cluster.run().await;
        cluster
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn configure(&self, more: &str) {
        let root = self.dir.path().display();
        // What is said here goes above what is short for all.
        let key = |line: &str| line.split('=').next().unwrap_or_default().trim().to_string();
        let is_said = |line: &&str| more.lines().any(|said| key(said) == key(line));
        let times: Vec<_> = TIMES.lines().filter(|line| !is_said(line)).collect();
        let times = times.join("\n");
        let ca_key =
            if more == NO_CA_KEY { String::new() } else { format!("ca_key = '{root}/ca.key'") };
        let text = format!(
            "identity = '{root}/identity'\ndata_dir = '{root}/data'\nlisten = '127.0.0.1:0'\n\
             metrics_listen = '127.0.0.1:0'\ngoal_key = '{root}/goal.key'\nbucket = '{root}/main'\n\
             {ca_key}\n{times}\n{more}\n[[regions]]\nname = 'eu'\nbucket = '{root}/eu'\n\
             [[regions]]\nname = 'us'\nbucket = '{root}/us'\n"
        );
        fs::write(self.path("config.toml"), text).unwrap();
    }

    pub(crate) fn config(&self) -> Config {
        shoal_process::load_config(Some(&self.path("config.toml")), &Args::default()).unwrap()
    }

    /// Starts the coordinator on what is there.
    pub(crate) async fn run(&mut self) {
        let token = CancellationToken::new();
        let coordinator = shoal_coordinator::start(self.config(), token.clone()).await.unwrap();
        self.running = Some((coordinator, token));
    }

    /// Stops it in order.
    pub(crate) async fn stop(&mut self) {
        let (coordinator, token) = self.running.take().unwrap();
        token.cancel();
        coordinator.ended().await.unwrap();
    }

    fn coordinator(&self) -> &Coordinator {
        &self.running.as_ref().unwrap().0
    }

    pub(crate) fn url(&self) -> String {
        format!("https://{}", self.coordinator().addresses().api)
    }

    /// The metrics page.
    pub(crate) async fn metrics(&self) -> String {
        let addr = self.coordinator().addresses().metrics.unwrap();
        let http = reqwest::Client::builder()
            .no_proxy()
            .tls_backend_preconfigured(self.tls(Role::Operator))
            .build()
            .unwrap();
        http.get(format!("http://{addr}/metrics")).send().await.unwrap().text().await.unwrap()
    }

    fn issue(&self, role: Role, name: &str, region: Option<&str>) -> (String, String) {
        let request = IssueRequest {
            machine: name.parse().unwrap(),
            region: region.map(|region| region.parse().unwrap()),
            role,
            hosts: vec!["127.0.0.1".into()],
            days: 1,
        };
        let issued = self.ca.issue(&request).unwrap();
        (issued.cert_pem, issued.key_pem)
    }

    pub(crate) fn identity(&self, role: Role, name: &str, region: Option<&str>) -> Identity {
        let (cert, key) = self.issue(role, name, region);
        Identity::from_pem(&cert, &key).unwrap()
    }

    fn tls(&self, role: Role) -> impl 'static + Clone + use<> {
        let region = (role == Role::Region).then_some("eu");
        let identity = self.identity(role, "raw", region);
        shoal_pki::client_config(&Credentials::new(identity, self.trust.clone()), &[b"http/1.1"])
            .unwrap()
    }

    pub(crate) fn ca_pem(&self) -> String {
        self.ca.cert_pem()
    }

    /// HTTP of somebody who shows no certificate.
    pub(crate) fn without_certificate(&self) -> reqwest::Client {
        self.guest().build().unwrap()
    }

    /// The same for who looks at each answer, those that send on too.
    pub(crate) fn without_certificate_or_redirects(&self) -> reqwest::Client {
        self.guest().redirect(reqwest::redirect::Policy::none()).build().unwrap()
    }

    fn guest(&self) -> reqwest::ClientBuilder {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.ca.cert_der().to_vec().into()).unwrap();
        let provider = rustls::crypto::aws_lc_rs::default_provider().into();
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        reqwest::Client::builder().no_proxy().tls_backend_preconfigured(tls)
    }

    pub(crate) fn client(&self, role: Role, name: &str, region: Option<&str>) -> Client {
        let identity = self.identity(role, name, region);
        Client::new(&[self.url()], &identity, &self.trust).unwrap()
    }

    pub(crate) fn operator(&self) -> Client {
        self.client(Role::Operator, "alice", None)
    }

    pub(crate) fn worker(&self, name: &str) -> Client {
        self.client(Role::Worker, name, None)
    }

    pub(crate) fn region(&self, region: &str) -> Client {
        self.client(Role::Region, &format!("{region}-p1"), Some(region))
    }

    /// HTTP of a caller that shows no certificate.
    pub(crate) fn stranger(&self) -> reqwest::Client {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.ca.cert_der().to_vec().into()).unwrap();
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let builder = reqwest::Client::builder().no_proxy();
        builder.tls_backend_preconfigured(tls).build().unwrap()
    }

    /// HTTP without the client's types, for what the client would never send.
    pub(crate) fn raw(&self, role: Role) -> reqwest::Client {
        let builder = reqwest::Client::builder().no_proxy();
        builder.tls_backend_preconfigured(self.tls(role)).build().unwrap()
    }
}

pub(crate) fn app(name: &str, selector: &str) -> App {
    App {
        name: name.parse().unwrap(),
        repository: "/repo".into(),
        build_command: "make".into(),
        output: "out/program".into(),
        activation: Activation::None,
        health: None,
        selector: selector.into(),
        build_timeout_s: 60,
        max_attempts: None,
        keep_builds: None,
        piece_size_bytes: None,
        plan: RolloutPlan::default(),
        priority: 0,
    }
}

/// An artifact, cut: `pieces` pieces of 256 KiB in one part.
pub(crate) struct Cut {
    pub(crate) artifact: ArtifactId,
    pub(crate) encoding: EncodingId,
    pub(crate) part: Bytes,
    pub(crate) index: Bytes,
}

pub(crate) fn cut(seed: u8, pieces: usize) -> Cut {
    let size = PieceSize::MIN;
    let len = size.bytes() as usize;
    let content: Vec<u8> = (0..pieces * len).map(|at| (at / 251) as u8 ^ seed).collect();
    let hash = |(at, raw)| piece_hash(content.len() as u64, size, PieceIndex(at), raw);
    let hashes: Vec<_> = (0..).zip(content.chunks(len)).map(hash).collect();
    let artifact = merge(&hashes, size, content.len() as u64);
    let stored = StoredPiece { codec: Codec::Raw, len: len as u32 };
    let index = EncodingIndex {
        manifest: Manifest {
            artifact,
            size_bytes: content.len() as u64,
            piece_size: size,
            piece_hashes: hashes,
        },
        pieces: vec![stored; pieces],
        parts: vec![Part { len: content.len() as u64, hash: *blake3::hash(&content).as_bytes() }],
    };
    let (bytes, encoding) = seal_index(&index).unwrap();
    Cut { artifact, encoding, part: content.into(), index: bytes.into() }
}

/// Puts an artifact into a bucket as a worker does.
pub(crate) async fn store(bucket: &Path, cut: &Cut) {
    let bucket = Bucket::open(bucket.to_str().unwrap()).unwrap();
    let part = cut.part.clone();
    let stream = futures::stream::iter([Ok::<_, std::io::Error>(part)]);
    bucket.put_part(&cut.artifact, &cut.encoding, 0, None, stream).await.unwrap();
    bucket.put_index(&cut.artifact, &cut.encoding, cut.index.clone()).await.unwrap();
}

pub(crate) const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// Asks for a build of a commit that nobody asked for before.
pub(crate) async fn build(operator: &Client, app: &str) -> Job {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let commit = format!("0123456789ab{:028x}", NEXT.fetch_add(1, Ordering::Relaxed));
    let request = BuildRequest::new(app.parse().unwrap(), commit.parse().unwrap());
    operator.build(&request).await.unwrap()
}

pub(crate) async fn claim(worker: &Client, wait_s: u32) -> Option<(ClaimedJob, LeaseRef)> {
    claim_as(worker, "one", wait_s).await
}

/// A claim by this process of a worker.
pub(crate) async fn claim_as(
    worker: &Client,
    incarnation: &str,
    wait_s: u32,
) -> Option<(ClaimedJob, LeaseRef)> {
    let request = ClaimRequest { incarnation: incarnation.into(), host: "here".into(), wait_s };
    let claimed = worker.claim(&request).await.unwrap()?;
    let lease = LeaseRef { attempt: claimed.job.attempt, lease: claimed.lease.clone() };
    Some((claimed, lease))
}

pub(crate) fn succeeded(lease: &LeaseRef, cut: &Cut) -> FinishRequest {
    let outcome = Outcome::Succeeded { artifact: cut.artifact, encoding: cut.encoding };
    FinishRequest { lease: lease.clone(), outcome }
}

pub(crate) async fn upload(operator: &Client, cut: &Cut) {
    operator.upload(&cut.artifact, &cut.encoding, "part-00000", cut.part.clone()).await.unwrap();
    operator.upload(&cut.artifact, &cut.encoding, "index", cut.index.clone()).await.unwrap();
}

pub(crate) async fn publish(operator: &Client, app: &str, cut: &Cut) -> Artifact {
    upload(operator, cut).await;
    let app = app.parse().unwrap();
    let request = PublishRequest { app, artifact: cut.artifact, encoding: cut.encoding };
    operator.publish(&request).await.unwrap()
}

pub(crate) async fn deployable(operator: &Client, name: &str) -> Artifact {
    wait_for("the artifact to be deployable", async || {
        let artifact = operator.artifact(name).await.unwrap();
        if artifact.deployable { Ok(artifact) } else { Err(artifact) }
    })
    .await
}

pub(crate) async fn deploy(
    operator: &Client,
    app: &str,
    artifact: &str,
) -> Result<Rollout, ClientError> {
    let request = DeployRequest { app: app.parse().unwrap(), artifact: artifact.into() };
    operator.deploy(&request).await
}

pub(crate) fn machine(name: &str, role: &str) -> MachineSeen {
    MachineSeen {
        name: name.parse().unwrap(),
        zone: "a".into(),
        labels: Labels::from([("role".into(), role.into()), ("machine".into(), name.into())]),
        version: "0.1.0".into(),
        address: "127.0.0.1:9".into(),
        node: None,
        age_ms: 0,
    }
}

pub(crate) fn state(
    machine: &str,
    app: &str,
    revision: Revision,
    state: MachineState,
) -> MachineStateSeen {
    MachineStateSeen {
        machine: machine.parse().unwrap(),
        report: MachineReport {
            app: app.parse().unwrap(),
            revision,
            artifact: ArtifactId::EMPTY,
            state,
            reason: None,
            progress: FetchProgress { pieces: 1, pieces_total: 1, ..FetchProgress::default() },
            sequence: 1,
            age_ms: 0,
        },
    }
}

pub(crate) async fn report(
    region: &Client,
    machines: Vec<MachineSeen>,
    reports: Vec<MachineStateSeen>,
) {
    region.report(&RegionReports { machines, reports, waves: Vec::new() }).await.unwrap();
}

/// The fixed word and the text of a refusal.
pub(crate) fn refusal<T: Debug>(result: Result<T, ClientError>) -> (u16, String, String) {
    match result.unwrap_err() {
        ClientError::Refused { status, code, message } => {
            assert!(!message.contains('\n') && !message.is_empty(), "not one line: {message}");
            (status, code, message)
        }
        other => panic!("not a refusal in the API's shape: {other}"),
    }
}
