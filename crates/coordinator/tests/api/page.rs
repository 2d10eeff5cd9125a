//! The page, as a browser's requests see it: who may look and press, what is shown of it, and what is text only.

use reqwest::{Response, StatusCode};
use shoal_client::types::App;
use shoal_proto::state::{MachineState, TokenRole};

use crate::harness::*;

/// A browser without scripts: it keeps a cookie, and reads forms.
struct Browser {
    http: reqwest::Client,
    url: String,
    cookie: String,
    /// What it says of itself with each request.
    site: &'static str,
}

fn encoded(fields: &[(&str, &str)]) -> String {
    let text = |text: &str| text.bytes().map(|b| format!("%{b:02X}")).collect::<String>();
    let pairs = fields.iter().map(|(name, value)| format!("{}={}", text(name), text(value)));
    pairs.collect::<Vec<_>>().join("&")
}

/// The value of a form's hidden field.
fn hidden(page: &str, name: &str) -> String {
    let begin = format!("name=\"{name}\" value=\"");
    let rest =
        &page[page.find(&begin).unwrap_or_else(|| panic!("no {name} in {page}")) + begin.len()..];
    rest[..rest.find('"').unwrap()].to_string()
}

impl Browser {
    fn of(cluster: &Cluster) -> Self {
        let http = cluster.without_certificate_or_redirects();
        Self { http, url: cluster.url(), cookie: String::new(), site: "same-origin" }
    }

    async fn with(cluster: &Cluster, token: &str) -> Self {
        let mut browser = Self::of(cluster);
        let answer = browser.post("/login", &[("token", token), ("to", "/")]).await;
        assert_eq!((answer.status(), place(&answer)), (StatusCode::SEE_OTHER, "/"));
        let cookie = answer.headers()["set-cookie"].to_str().unwrap();
        browser.cookie = cookie.split(';').next().unwrap().to_string();
        assert!(!cookie.contains(token), "{cookie}");
        browser
    }

    async fn get(&self, path: &str) -> Response {
        let request = self.http.get(format!("{}{path}", self.url));
        request
            .header("cookie", &self.cookie)
            .header("sec-fetch-site", self.site)
            .send()
            .await
            .unwrap()
    }

    /// A view that must be there.
    async fn page(&self, path: &str) -> String {
        let answer = self.get(path).await;
        assert_eq!(answer.status(), 200, "{path}");
        answer.text().await.unwrap()
    }

    async fn post(&self, path: &str, fields: &[(&str, &str)]) -> Response {
        let request = self.http.post(format!("{}{path}", self.url));
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        let request = request.header("cookie", &self.cookie).header("sec-fetch-site", self.site);
        request.body(encoded(fields)).send().await.unwrap()
    }

    /// Presses a button of a view as it was loaded.
    async fn press(&self, path: &str, page: &str, fields: &[(&str, &str)]) -> Response {
        let (word, key) = (hidden(page, "word"), hidden(page, "key"));
        let ours = [("word", word.as_str()), ("key", key.as_str())];
        self.post(path, &[&ours, fields].concat()).await
    }
}

/// Where an answer sends the browser.
fn place(answer: &Response) -> &str {
    answer.headers().get("location").map_or("", |value| value.to_str().unwrap())
}

/// An answer's status and text.
async fn read(answer: Response) -> (u16, String) {
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test]
async fn a_login_is_a_token_and_ends_with_it() {
    let cluster = Cluster::start().await;
    let browser = Browser::of(&cluster);
    let answer = browser.get("/apps/web?x=1").await;
    assert_eq!(answer.status(), 303);
    assert!(place(&answer).starts_with("/login?to=%2F%61%70%70%73"), "{}", place(&answer));
    let page = browser.page("/login?to=/apps/web").await;
    assert_eq!(hidden(&page, "to"), "/apps/web");
    assert_eq!(hidden(&browser.page("/login?to=//evil.example").await, "to"), "/");
    let wrong = format!("shoal_{}", "0".repeat(64));
    let (status, text) =
        read(browser.post("/login", &[("token", &wrong), ("to", "/")]).await).await;
    assert!(status == 401 && text.contains("unknown, expired or revoked"), "{text}");
    assert!(!text.contains(&wrong));

    let token = cluster.token("ann", TokenRole::Viewer, None).await;
    let browser = Browser::with(&cluster, &token).await;
    let page = browser.page("/").await;
    assert!(page.contains("<b>token:ann</b> · viewer") && page.contains("cluster test"), "{page}");
    assert!(!page.contains(&token));
    // Without scripts it loads itself anew.
    let refresh = "<noscript><meta http-equiv=\"refresh\"";
    assert!(page.contains(refresh) && !browser.page("/login").await.contains(refresh), "{page}");

    // Whoever comes from a link elsewhere shows no cookie at first.
    let from_elsewhere = Browser { site: "cross-site", ..Browser::of(&cluster) };
    let page = from_elsewhere.page("/apps/web").await;
    assert!(page.contains("content=\"0;url=/apps/web\""), "{page}");

    cluster.operator().revoke_token(&"ann".parse().unwrap()).await.unwrap();
    let answer = browser.get("/").await;
    assert!(answer.headers()["set-cookie"].to_str().unwrap().contains("Max-Age=0"));
    let (status, text) = read(answer).await;
    assert!(status == 401 && text.contains("revoked") && text.contains("Log in"), "{text}");

    let token = cluster.token("bob", TokenRole::Viewer, None).await;
    let browser = Browser::with(&cluster, &token).await;
    let page = browser.page("/").await;
    let answer = browser.press("/logout", &page, &[]).await;
    assert_eq!((answer.status().as_u16(), place(&answer)), (303, "/login"));
    assert!(answer.headers()["set-cookie"].to_str().unwrap().contains("Max-Age=0"));
}

#[tokio::test]
async fn browsers_are_told_to_be_strict() {
    let cluster = Cluster::start().await;
    let token = cluster.token("ann", TokenRole::Viewer, None).await;
    let browser = Browser::with(&cluster, &token).await;
    for path in
        ["/", "/login", "/static/page.js", "/static/page.css", "/static/icon.svg", "/apps/none"]
    {
        let answer = browser.get(path).await;
        let policy = answer.headers()["content-security-policy"].to_str().unwrap().to_string();
        for part in [
            "default-src 'none'",
            "script-src 'self';",
            "style-src 'self';",
            "frame-ancestors 'none'",
            "base-uri 'none'",
        ] {
            assert!(policy.contains(part), "{policy}");
        }
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(answer.headers()["x-content-type-options"], "nosniff");
        let is_static = path.starts_with("/static");
        assert_eq!(answer.headers()["cache-control"] == "no-store", !is_static, "{path}");
        let (_, text) = read(answer).await;
        if !is_static {
            // What the policy forbids is not there either.
            let inline = [" style=", "<style", " onclick=", "javascript:"];
            assert!(!inline.iter().any(|bad| text.contains(bad)), "{text}");
            assert_eq!(
                text.matches("<script").count(),
                text.matches("<script src=\"/static/page.js\"").count()
            );
        }
    }
    let (status, text) = read(browser.get("/apps/none").await).await;
    assert!(
        status == 404 && text.contains("no app &#39;none&#39;") | text.contains("no app 'none'"),
        "{text}"
    );
    let (status, text) = read(browser.post("/", &[]).await).await;
    assert!(status == 405 && text.contains("POST is not possible on /"), "{text}");
    // The API beside it answers as ever.
    let (status, text) = read(browser.get("/v1/nowhere").await).await;
    assert!(status == 404 && text.contains("not_found"), "{text}");
    let (status, _) = read(browser.get("/v1/apps").await).await;
    assert_eq!(status, 401, "a session opens the page alone");
}

#[tokio::test]
async fn buttons_do_once_what_their_role_may_and_forged_ones_nothing() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    operator.set_app(&app("other", "")).await.unwrap();
    let token = cluster.token("dep", TokenRole::Deployer, Some("web")).await;
    let browser = Browser::with(&cluster, &token).await;

    // A token of one app sees one app.
    let list = browser.page("/").await;
    assert!(list.contains("/apps/web") && !list.contains("/apps/other"), "{list}");
    let (status, text) = read(browser.get("/apps/other").await).await;
    assert!(status == 403 && text.contains("bound to web"), "{text}");

    let page = browser.page("/apps/web").await;
    assert!(page.contains("id=\"build\""), "{page}");
    assert!(!page.contains("http-equiv"), "what is typed would be lost");
    let form = [("do", "build"), ("commit", SHA)];
    let first = browser.press("/apps/web", &page, &form).await;
    let second = browser.press("/apps/web", &page, &form).await;
    assert_eq!((first.status().as_u16(), place(&first)), (303, "/jobs/1"));
    assert_eq!(place(&second), "/jobs/1");
    assert_eq!(operator.jobs(None, 10).await.unwrap().len(), 1);
    let job = operator.job(1).await.unwrap();
    assert_eq!(job.requested_by, "token:dep");
    let rows = operator.audit(&Default::default(), 100).await.unwrap();
    assert!(
        rows.iter().any(|row| row.what == "job.submit" && row.origin == "127.0.0.1"),
        "{rows:?}"
    );
    // What is wrong is said in the view, with what was typed.
    let (status, text) =
        read(browser.press("/apps/web", &page, &[("do", "build"), ("commit", "abc")]).await).await;
    assert!(
        status == 400 && text.contains("40 hex digits") && text.contains("value=\"abc\""),
        "{text}"
    );
    let (status, text) = read(
        browser.press("/apps/web", &page, &[("do", "deploy"), ("artifact", "web/none")]).await,
    )
    .await;
    assert!(
        status == 404 && text.contains("role=\"alert\"") && text.contains("web/none"),
        "{text}"
    );
    let (status, _) = read(browser.press("/apps/web", &page, &[("do", "rm")]).await).await;
    assert_eq!(status, 400);

    let one = publish(&operator, "web", &cut(1, 2)).await;
    let two = publish(&operator, "web", &cut(2, 2)).await;
    for artifact in [&one, &two] {
        deployable(&operator, &artifact.name).await;
        let page = browser.page("/apps/web").await;
        let form = [("do", "deploy"), ("artifact", artifact.name.as_str())];
        let first = browser.press("/apps/web", &page, &form).await;
        let second = browser.press("/apps/web", &page, &form).await;
        assert!(place(&first).starts_with("/rollouts/"), "{}", place(&first));
        assert_eq!(place(&first), place(&second));
    }
    let page = browser.page("/rollouts/2").await;
    let other = browser.press("/rollouts/2", &page, &[("do", "pause")]).await;
    assert_eq!(place(&other), "/rollouts/2");
    assert_eq!(operator.rollout(2).await.unwrap().status.as_str(), "PAUSED");
    let page = browser.page("/rollouts/2").await;
    assert!(page.contains("Go on") && !page.contains(">Pause<"), "{page}");
    browser.press("/rollouts/2", &page, &[("do", "resume")]).await;
    assert_eq!(operator.rollout(2).await.unwrap().status.as_str(), "RUNNING");
    let back = browser.press("/rollouts/2", &page, &[("do", "rollback")]).await;
    assert_eq!(place(&back), "/rollouts/3");
    let rollout = operator.rollout(3).await.unwrap();
    assert!(rollout.rollback && rollout.artifact_name == one.name);

    // A form of another site, or with another session's word, does nothing.
    let page = browser.page("/apps/web").await;
    let form = [("do", "deploy"), ("artifact", two.name.as_str())];
    // With the session's own cookie and word, too: what the browser says of the form's origin decides alone.
    let cookie = browser.cookie.clone();
    let forged = Browser { site: "cross-site", cookie, ..Browser::of(&cluster) };
    let (status, text) = read(forged.press("/apps/web", &page, &form).await).await;
    assert!(status == 403 && text.contains("none of your session"), "{text}");
    let other = Browser::with(&cluster, &token).await;
    let (status, text) = read(other.press("/apps/web", &page, &form).await).await;
    assert!(status == 403 && text.contains("none of your session"), "{text}");
    let no_word = [&[("word", ""), ("key", "x")][..], &form].concat();
    assert_eq!(browser.post("/apps/web", &no_word).await.status(), 403);
    let login = Browser { site: "cross-site", ..Browser::of(&cluster) };
    assert_eq!(login.post("/login", &[("token", &token)]).await.status(), 403);

    // A viewer is shown no button, and is refused when it presses one all the same.
    let viewer = cluster.token("vic", TokenRole::Viewer, None).await;
    let viewer = Browser::with(&cluster, &viewer).await;
    for path in ["/", "/apps/web", "/rollouts/3", "/jobs/1", "/builds"] {
        let page = viewer.page(path).await;
        assert_eq!(page.matches("<button").count(), 1, "only the logout: {page}");
    }
    let page = viewer.page("/apps/web").await;
    for (path, form) in [
        ("/apps/web", &form[..]),
        ("/apps/web", &[("do", "build"), ("commit", SHA)]),
        ("/rollouts/3", &[("do", "rollback")]),
        ("/rollouts/3", &[("do", "pause")]),
        ("/rollouts/3", &[("do", "cancel")]),
        ("/jobs/1", &[("do", "cancel")]),
    ] {
        let (status, text) = read(viewer.press(path, &page, form).await).await;
        assert!(status == 403 && text.contains("this takes the role deployer"), "{path}: {text}");
    }
    assert_eq!(operator.rollout(3).await.unwrap().status.as_str(), "RUNNING");
    assert!(operator.rollout(4).await.is_err());
}

#[tokio::test]
async fn whatever_comes_from_outside_is_text() {
    const BAD: &str = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>";
    let cluster = Cluster::start().await;
    let (operator, worker) = (cluster.operator(), cluster.worker("w1"));
    let app = App { repository: format!("/r/{BAD}"), build_command: BAD.into(), ..app("web", "") };
    operator.set_app(&app).await.unwrap();
    let job = build(&operator, "web").await;
    let (_, lease) = claim(&worker, 5).await.unwrap();
    worker.append_log(job.id, &lease, 0, format!("said {BAD} grün\n").into()).await.unwrap();
    let outcome =
        shoal_client::types::Outcome::Failed { reason: format!("because {BAD}"), retry: false };
    let request = shoal_client::types::FinishRequest { lease, outcome };
    worker.finish(job.id, &request).await.unwrap();
    let artifact = publish(&operator, "web", &cut(1, 2)).await;
    deployable(&operator, &artifact.name).await;
    let rollout = deploy(&operator, "web", &artifact.name).await.unwrap();
    let mut seen = state("m1", "web", rollout.revision, MachineState::Failed);
    seen.report.reason = Some(format!("the disk {BAD}"));
    let fine = state("m2", "web", rollout.revision, MachineState::Active);
    report(
        &cluster.region("eu"),
        vec![machine("m1", "web"), machine("m2", "web")],
        vec![seen, fine],
    )
    .await;

    let token = cluster.token("dep", TokenRole::Deployer, None).await;
    let browser = Browser::with(&cluster, &token).await;
    let (app, job) = (browser.page("/apps/web").await, browser.page("/jobs/1").await);
    let rollout = browser.page("/rollouts/1").await;
    let (_, typed) =
        read(browser.press("/apps/web", &app, &[("do", "build"), ("commit", BAD)]).await).await;
    let (_, did) = read(browser.press("/apps/web", &app, &[("do", BAD)]).await).await;
    let (_, wrong) = read(browser.get(&format!("/apps/{}", "%3Cscript%3Ealert(1)")).await).await;
    let login = read(browser.get("/login?to=/%22%3E%3Cscript%3E").await).await.1;
    for page in [&app, &job, &rollout, &typed, &did, &wrong, &login] {
        assert!(!page.contains("<script>") && !page.contains("<img"), "{page}");
    }
    assert!(app.contains("/r/&lt;script&gt;"), "{app}");
    assert!(
        job.contains("said &lt;script&gt;")
            && job.contains("because &lt;script&gt;")
            && job.contains("grün")
    );
    assert!(rollout.contains("the disk &lt;script&gt;") && rollout.contains("m1"), "{rollout}");
    assert!(!rollout.contains("m2"), "it did not fail");
    let log = browser.get("/jobs/1/log?offset=5").await;
    assert_eq!(log.headers()["content-type"], "application/octet-stream");
    assert!(
        log.text().await.unwrap().starts_with("<script>"),
        "its bytes, for a script that shows text"
    );
}

#[tokio::test]
async fn what_happens_is_told_to_the_open_page() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    operator.set_app(&app("other", "")).await.unwrap();
    let token = cluster.token("ann", TokenRole::Viewer, Some("web")).await;
    let browser = Browser::with(&cluster, &token).await;
    assert_eq!(Browser::of(&cluster).get("/live").await.status(), 303);
    assert_eq!(browser.get("/live?app=other").await.status(), 403);
    let mut stream = browser.get("/live?app=web").await;
    assert_eq!(stream.headers()["content-type"], "text/event-stream");
    build(&operator, "other").await;
    build(&operator, "web").await;
    let mut said = String::new();
    while !said.contains("event: build:queued") {
        let chunk = tokio::time::timeout(PATIENCE, stream.chunk()).await.unwrap().unwrap().unwrap();
        said += std::str::from_utf8(&chunk).unwrap();
    }
    assert!(!said.contains("other"), "{said}");
    // What the script listens for is what is told.
    let page = browser.page("/apps/web").await;
    assert!(
        page.contains("data-events=\"/live?app=web\"") && page.contains("build:queued"),
        "{page}"
    );
    let history = browser.page("/history").await;
    assert!(history.contains("QUEUED") && !history.contains("/apps/other"), "{history}");
    let copies = browser.page("/copies").await;
    assert!(copies.contains("eu") && copies.contains("us"), "{copies}");
}

#[tokio::test]
async fn another_coordinator_knows_the_session() {
    let mut cluster = Cluster::start().await;
    let token = cluster.token("ann", TokenRole::Viewer, None).await;
    let mut browser = Browser::with(&cluster, &token).await;
    // One that has the same goal key and database, and nothing that this one held in memory.
    cluster.stop().await;
    cluster.run().await;
    browser.url = cluster.url();
    assert!(browser.page("/").await.contains("token:ann"));
}
