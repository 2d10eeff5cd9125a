//! The page in a real browser, by pressing its buttons.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use rustls::{
    SignatureScheme,
    crypto::WebPkiSupportedAlgorithms,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use shoal_client::types::{App, BuildRequest, TokenRequest};
use shoal_proto::{
    goal::RolloutPlan,
    state::{MachineState, RolloutStatus, TokenRole},
};
use shoal_test_postgres::Database;

use crate::harness::{Browser, Cluster, Repo, Shape, script_app, wait_for};

impl Cluster {
    /// Makes a token, for one app or for all.
    async fn token(&self, name: &str, role: TokenRole, app: Option<&str>) -> String {
        let apps = app.map(|app| BTreeSet::from([app.parse().unwrap()]));
        let request = TokenRequest { name: name.parse().unwrap(), role, apps, expires_in_s: None };
        self.client.create_token(&request).await.unwrap().secret
    }

    /// An address of the page.
    fn page(&self, path: &str) -> String {
        format!("https://{}{path}", self.api)
    }
}

async fn log_in(browser: &Browser, cluster: &Cluster, token: &str) {
    browser.go(&cluster.page("/")).await;
    browser.sees("h1", "Log in").await;
    browser.fill("#token", token).await;
    browser.click("form.login button").await;
    browser.sees("h1", "Apps").await;
}

/// Asks for a build in the app's view, and waits until the browser is at its view; returns its number.
async fn press_build(browser: &Browser, cluster: &Cluster, commit: &str) -> i64 {
    browser.go(&cluster.page("/apps/web")).await;
    browser.fill("#commit", commit).await;
    browser.click("#build").await;
    browser.sees("h1", "Build ").await;
    number(browser, "/jobs/").await
}

/// The number in the address where the browser is.
async fn number(browser: &Browser, before: &str) -> i64 {
    wait_for(&format!("an address with {before}"), async || {
        let url = browser.url().await;
        url.split_once(before).and_then(|(_, number)| number.parse().ok()).ok_or(url)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployer_builds_deploys_and_goes_back_by_pressing_buttons() {
    let cluster = Cluster::start(Shape {
        regions: 2,
        agents: 4,
        workers: 1,
        coordinator_extra: "copy_retry_s = 0.2\n".into(),
        ..Shape::default()
    })
    .await;
    let repo = Repo::new(cluster.root().join("repo"));
    // One failure is no reason to stop.
    let plan = RolloutPlan { max_failed_permille: 1_000, ..script_app("web", &repo.path).plan };
    cluster.set_app(&App { plan, ..script_app("web", &repo.path) }).await;
    let token = cluster.token("dana", TokenRole::Deployer, Some("web")).await;
    let browser = Browser::start(&cluster.root().join("browser")).await;
    browser.go(&cluster.page("/apps/web")).await;
    browser.picture("login").await;
    browser.fill("#token", "shoal_nothing").await;
    browser.click("form.login button").await;
    browser.sees("[role=alert]", "this token is none that counts").await;
    log_in(&browser, &cluster, &token).await;
    browser.sees("header", "token:dana · deployer · bound to web").await;

    // A build whose log is seen while it runs; what it says is text.
    let go = cluster.root().join("go");
    let script = format!(
        "echo 'first line <script>document.title = \"pwned\"</script>'\nwhile ! test -e {}; do sleep 0.05; done\n\
         echo 'last line'\n",
        go.display()
    );
    let version = |name: &str| {
        format!(
            "mkdir -p out\nprintf '#!/bin/sh\\necho {name} > \"$SHOAL_RUN_DIR/version\"\\nexec sleep 100000\\n' > out/app\n"
        )
    };
    let first = repo.commit(&(script + &version("one")));
    // The bucket of a region is away: a file is where its directory should be.
    let bucket = cluster.bucket(1);
    let aside = cluster.root().join("aside");
    fs::rename(&bucket, &aside).unwrap();
    fs::write(&bucket, "").unwrap();
    let job = press_build(&browser, &cluster, first.as_str()).await;
    browser.sees("#log", "first line <script>document.title").await;
    browser.sees("#state", "RUNNING").await;
    assert!(!browser.text("#log").await.contains("last line"));
    browser.picture("build-runs").await;
    fs::write(&go, "").unwrap();
    browser.sees("#log", "last line").await;
    browser.sees("#state", "SUCCEEDED").await;
    assert_eq!(browser.count("#log script").await, 0);
    assert!(!browser.run("return document.title", &[]).await.as_str().unwrap().contains("pwned"));

    // Not yet deployable: greyed out, with the reason; by itself it becomes so.
    browser.go(&cluster.page("/apps/web")).await;
    let row = browser.sees(".artifacts tr.dim", "not yet copied to: r2").await;
    assert!(row.contains(&format!("web/{}-{job}", first.short())), "{row}");
    assert_eq!(browser.count(".artifacts tr.dim button:disabled").await, 1);
    browser.picture("not-deployable").await;
    browser.go(&cluster.page("/copies")).await;
    browser.sees(".artifacts tr.dim", "not yet copied to: r2").await;
    browser.picture("copies").await;
    browser.go(&cluster.page("/apps/web")).await;
    fs::remove_file(&bucket).unwrap();
    fs::rename(&aside, &bucket).unwrap();
    browser.click(".artifacts button.deploy").await;
    let one = number(&browser, "/rollouts/").await;
    browser.sees(".summary", "SUCCEEDED").await;
    let regions = browser.text(".regions").await;
    assert!(regions.contains("r1") && regions.contains("r2"), "{regions}");
    assert_eq!(regions.matches("ACTIVE 2").count(), 2, "{regions}");
    assert_eq!(cluster.client.rollout(one).await.unwrap().requested_by, "token:dana");

    // A second one, that one machine cannot run.
    let fails = "case $SHOAL_RUN_DIR in *m4/*) echo broken; exit 1;; esac\\n";
    let second = version("two").replace("#!/bin/sh\\n", &format!("#!/bin/sh\\n{fails}"));
    let job = press_build(&browser, &cluster, repo.commit(&second).as_str()).await;
    browser.sees("#state", "SUCCEEDED").await;
    let artifact = cluster.client.job(job).await.unwrap().name;
    browser.go(&cluster.page("/apps/web")).await;
    browser.click(&format!("[aria-label='Deploy {artifact}']")).await;
    let two = number(&browser, "/rollouts/").await;
    assert_ne!(one, two);
    browser.picture("rollout-runs").await;
    let failed = browser.sees(".failures", "m4").await;
    let state = cluster.client.machines(None, None).await.unwrap();
    let state = state.iter().find(|machine| machine.name.as_str() == "m4").unwrap();
    let report = &state.apps[0].report;
    assert!(report.state.is_failure(), "{report:?}");
    assert!(failed.contains(report.reason.as_deref().unwrap()), "{failed}: {report:?}");
    browser.sees(".summary", "SUCCEEDED").await;
    browser.picture("rollout-failed-machine").await;

    // Back to the first.
    browser.click("button.rollback").await;
    wait_for("the next rollout", async || match number(&browser, "/rollouts/").await {
        id if id > two => Ok(()),
        id => Err(id),
    })
    .await;
    let three = number(&browser, "/rollouts/").await;
    browser.sees(".summary", "Back to").await;
    browser.sees(".summary", "SUCCEEDED").await;
    let rollout = cluster.rollout_succeeds(three).await;
    assert!(rollout.rollback && rollout.artifact_name.contains(first.short()), "{rollout:?}");
    for machine in ["m1", "m4"] {
        cluster.machine_is(machine, "web", MachineState::Active).await;
    }

    browser.go(&cluster.page("/history?app=web")).await;
    let history = browser.sees("tbody tr:first-child", "SUCCEEDED back").await;
    for part in [first.short(), "4 of 4", "build:", "rollout:", "by token:dana"] {
        assert!(history.contains(part), "{part} in {history}");
    }
    browser.sees("tbody", "3 of 4, 1 failed").await;
    browser.picture("history").await;

    // A build that fails says why, in its view and in the list.
    press_build(&browser, &cluster, repo.commit("echo before the end\nexit 7\n").as_str()).await;
    browser.sees("#state", "FAILED").await;
    browser.sees("#live .reason", "7").await;
    browser.sees("#log", "before the end").await;
    browser.go(&cluster.page("/apps/web")).await;
    browser.sees("main", "exit").await;
    browser.picture("app").await;
    browser.go(&cluster.page("/")).await;
    browser.picture("apps").await;
    // The policy forbade nothing that the page wants, and no script failed.
    let console: Vec<_> =
        browser.console().await.into_iter().filter(|line| !line.contains(" 401 ")).collect();
    assert!(console.is_empty(), "{console:?}");

    // A button that is held down while the view changes does what it says when it is let go of.
    browser.go(&cluster.page("/apps/web")).await;
    let before = browser.fetches().await;
    browser.hold("button.rollback").await;
    let web = "web".parse().unwrap();
    let more = BuildRequest::new(web, repo.commit("exit 9\n"));
    cluster.client.build(&more).await.unwrap();
    wait_for("the view to look anew, twice", async || match browser.fetches().await {
        now if now >= before + 2 => Ok(()),
        now => Err(now),
    })
    .await;
    browser.let_go().await;
    browser.sees("h1", "Rollout ").await;
    assert!(number(&browser, "/rollouts/").await > three);

    browser.click(".who button").await;
    browser.sees("h1", "Log in").await;
    browser.go(&cluster.page("/apps/web")).await;
    browser.sees("h1", "Log in").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_holds_at_every_coordinator_and_each_says_where_a_log_is() {
    let database = Database::create().await.unwrap();
    let shape = Shape {
        agents: 0,
        workers: 1,
        coordinators: 2,
        coordinator_extra: format!("database = \"{}\"\n", database.url()),
        ..Shape::default()
    };
    let cluster = Cluster::start(shape).await;
    let repo = Repo::new(cluster.root().join("repo"));
    cluster.set_app(&script_app("web", &repo.path)).await;
    let token = cluster.token("dana", TokenRole::Deployer, Some("web")).await;
    let browser = Browser::start(&cluster.root().join("browser")).await;
    log_in(&browser, &cluster, &token).await;
    let commit = repo.commit("echo what it says\nexit 3\n");
    let job = press_build(&browser, &cluster, commit.as_str()).await;
    browser.sees("#state", "FAILED").await;
    let job = cluster.client.job(job).await.unwrap();
    let places = &job.attempts[0].log_at;
    assert_eq!(places.len(), 1, "the worker spoke with one of them: {places:?}");

    // The browser goes to the other one with the cookie that it has: a cookie knows no port.
    let mut said = BTreeMap::new();
    for api in [cluster.api, cluster.other_apis[0]] {
        browser.go(&format!("https://{api}/jobs/{}", job.id)).await;
        browser.sees("header", "token:dana · deployer").await;
        browser.sees("#state", "FAILED").await;
        let log = browser.text("#log").await;
        said.insert(log.contains("what it says"), browser.text("#elsewhere").await);
        if !log.contains("what it says") {
            browser.picture("log-elsewhere").await;
        }
    }
    assert_eq!(said[&true], "", "it has all of it");
    let other = &said[&false];
    assert!(
        other.contains("It lies with another coordinator") && other.contains(&places[0]),
        "{other}"
    );
    // Buttons work there, too, and what the session may is the same.
    let there = cluster.other_apis[0];
    browser.go(&format!("https://{there}/apps/web")).await;
    browser.fill("#commit", repo.commit("exit 4\n").as_str()).await;
    browser.click("#build").await;
    browser.sees("#state", "FAILED").await;
    assert!(browser.url().await.contains(&there.to_string()));
    // It ends at both with its token.
    cluster.client.revoke_token(&"dana".parse().unwrap()).await.unwrap();
    for api in [there, cluster.api] {
        browser.go(&format!("https://{api}/apps/web")).await;
        assert!(!browser.text("body").await.contains("token:dana"));
    }
    drop(cluster);
    database.remove().await.unwrap();
}

/// What a client gets that checks no Ed25519, as browsers do, and believes one certificate alone.
async fn as_browser(url: &str, trusted: &CertificateDer<'static>) -> Result<u16, String> {
    const ECDSA: SignatureScheme = SignatureScheme::ECDSA_NISTP256_SHA256;
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    let all = provider.signature_verification_algorithms.mapping;
    let (_, algorithms) = all.iter().find(|(scheme, _)| *scheme == ECDSA).unwrap();
    let mapping: &'static [_] = vec![(ECDSA, *algorithms)].leak();
    provider.signature_verification_algorithms =
        WebPkiSupportedAlgorithms { all: algorithms, mapping };
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let tls = rustls::ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let http =
        reqwest::Client::builder().no_proxy().tls_backend_preconfigured(tls).build().unwrap();
    let answer = http.get(url).send().await.map_err(|error| format!("{error:?}"))?;
    Ok(answer.status().as_u16())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_shown_after_a_sighup() {
    let files = tempfile::tempdir().unwrap();
    let (pem, key) = (files.path().join("page.pem"), files.path().join("page.key"));
    let renew = || {
        let (chain, secret) = shoal_pki::self_signed(&["127.0.0.1".into()], 30).unwrap();
        fs::write(&pem, &chain).unwrap();
        fs::write(&key, secret).unwrap();
        CertificateDer::from_pem_slice(chain.as_bytes()).unwrap()
    };
    let first = renew();
    let coordinator_extra =
        format!("page_certificate = \"{}\"\npage_key = \"{}\"\n", pem.display(), key.display());
    let cluster = Cluster::start(Shape { agents: 0, coordinator_extra, ..Shape::default() }).await;
    let page = cluster.page("/login");
    assert_eq!(as_browser(&page, &first).await, Ok(200));
    let reload = || {
        let pid = rustix::process::Pid::from_raw(cluster.coordinator.pid() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    };
    // What is wrong is said, and changes nothing.
    fs::write(&pem, "nothing").unwrap();
    reload();
    wait_for("the coordinator to say what is wrong", async || {
        let log = cluster.coordinator.log();
        if log.contains("the certificate for browsers is wrong") { Ok(()) } else { Err(log) }
    })
    .await;
    assert_eq!(as_browser(&page, &first).await, Ok(200));
    let second = renew();
    reload();
    wait_for("the new one", async || as_browser(&page, &second).await).await;
    assert!(as_browser(&page, &first).await.is_err());
    // Members were shown their own all the while.
    cluster.client.regions().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_viewer_sees_no_buttons_and_nothing_works_without_them() {
    let cluster = Cluster::start(Shape::default()).await;
    let web = crate::harness::plain_app("web");
    cluster.set_app(&web).await;
    cluster.set_app(&crate::harness::plain_app("other")).await;
    let one = cluster.publish("web", &cluster.random_file("one", 1 << 20, 1)).await;
    let two = cluster.publish("web", &cluster.random_file("two", 1 << 20, 2)).await;
    let rollout = cluster.deploy("web", &one.name).await;
    cluster.rollout_succeeds(rollout.id).await;

    let browser = Browser::start(&cluster.root().join("browser")).await;
    let bound = cluster.token("only-web", TokenRole::Viewer, Some("web")).await;
    log_in(&browser, &cluster, &bound).await;
    let apps = browser.text("main").await;
    assert!(apps.contains("web") && !apps.contains("other"), "{apps}");
    browser.go(&cluster.page("/apps/other")).await;
    browser.sees("[role=alert]", "bound to web").await;
    browser.go(&cluster.page("/apps/web")).await;
    browser.sees(".artifacts", &two.name).await;
    assert_eq!(browser.count("main button").await, 0);

    // A form that the page did not show, with all that the session has.
    let script = "const form = new URLSearchParams({ word: document.querySelector('[name=word]').value, key: 'k', \
        do: 'deploy', artifact: arguments[0] }); \
        return fetch(location.href, { method: 'POST', body: form }).then(async (a) => a.status + await a.text())";
    let said = browser.run(script, &[&two.name]).await;
    let said = said.as_str().unwrap();
    assert!(said.starts_with("403") && said.contains("this takes the role deployer"), "{said}");
    let now = cluster.client.rollout(rollout.id).await.unwrap();
    assert_eq!(now.status, RolloutStatus::Succeeded, "nothing took its place");

    // The session ends with its token, in the view that is open.
    cluster.client.revoke_token(&"only-web".parse().unwrap()).await.unwrap();
    browser.go(&cluster.page("/apps/web")).await;
    browser.sees("[role=alert]", "revoked").await;

    let dir = browser.dir().to_path_buf();
    assert!(Browser::processes(&dir) > 1, "the browser is of several processes");
    drop(browser);
    wait_for("the browser's processes to be gone", async || match Browser::processes(&dir) {
        0 => Ok(()),
        left => Err(left),
    })
    .await;
}
