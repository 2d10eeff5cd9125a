//! A real browser: headless Chromium, driven over WebDriver as a person would use it.

use std::{
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};

use super::wait_for;

/// The name under which WebDriver gives an element.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// Finds texts with less contrast to their ground than WCAG 2.2 asks for (4.5, by the formula of its definition of relative
/// luminance), and says how light the page's ground is, from 0 to 1.
const CONTRASTS: &str = r#"
    const parse = (text) => text.match(/[\d.]+/g).map(Number);
    const linear = (c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const ground = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            if (colour.length < 4 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const faint = [];
    let texts = 0;
    for (const element of document.body.querySelectorAll("*")) {
        const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
        if (!own || !element.checkVisibility()) continue;
        texts += 1;
        const [one, two] = [light(parse(getComputedStyle(element).color)), light(ground(element))];
        const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
        if (ratio < 4.5) faint.push(`${element.tagName}.${element.className} ${element.textContent.slice(0, 40)} ${ratio.toFixed(2)}`);
    }
    for (const input of document.querySelectorAll("input[placeholder]")) {
        const [one, two] = [light(parse(getComputedStyle(input, "::placeholder").color)), light(ground(input))];
        const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
        if (ratio < 4.5) faint.push(`placeholder ${input.placeholder} ${ratio.toFixed(2)}`);
    }
    return { faint, texts, ground: light(ground(document.body)) };
"#;

/// A browser with a window. It and all that it started end with it, however the test ends: they are in a process
/// namespace of their own, whose first process the kernel ends with the test.
pub struct Browser {
    driver: Child,
    http: reqwest::Client,
    session: String,
    /// Where its files are.
    dir: PathBuf,
}

impl Browser {
    /// Starts one that keeps its files below `dir`, and takes the cluster's certificate.
    pub async fn start(dir: &Path) -> Self {
        fs::create_dir_all(dir).unwrap();
        let out = dir.join("log");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "unshare", "--pid", "--fork", "--kill-child"]);
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--map-current-user"]);
        }
        command.args(["chromedriver", "--port=0", "--log-level=WARNING"]);
        command.env("HOME", dir).env("TMPDIR", dir).process_group(0);
        let log = fs::File::create(&out).unwrap();
        command.stdin(Stdio::null()).stderr(log.try_clone().unwrap()).stdout(log);
        let driver = command.spawn().expect("chromedriver is missing: .ci/chromium installs it");
        let port = wait_for("chromedriver to listen", async || {
            let said = fs::read_to_string(&out).unwrap_or_default();
            let begin = said.find("successfully on port ").map(|at| at + 21);
            let digits =
                begin.map(|at| said[at..].chars().take_while(char::is_ascii_digit).collect());
            digits.and_then(|digits: String| digits.parse::<u16>().ok()).ok_or(said)
        })
        .await;
        // It asks for one even where it speaks plain HTTP.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let mut browser = Self {
            driver,
            http,
            session: format!("http://127.0.0.1:{port}/session"),
            dir: dir.into(),
        };
        let profile = format!("--user-data-dir={}", dir.join("profile").display());
        let args = [
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-proxy-server",
            &profile,
        ];
        let wanted = json!({ "acceptInsecureCerts": true, "goog:chromeOptions": { "args": args },
            "goog:loggingPrefs": { "browser": "ALL" } });
        let value =
            browser.call("", json!({ "capabilities": { "alwaysMatch": wanted } })).await.unwrap();
        browser.session += &format!("/{}", value["sessionId"].as_str().unwrap());
        browser.size(1280, 800).await;
        browser
    }

    /// One command of WebDriver; the error is what it says.
    async fn call(&self, path: &str, body: Value) -> Result<Value, String> {
        let request = self.http.post(format!("{}{path}", self.session)).json(&body);
        Self::answer(request).await
    }

    async fn ask(&self, path: &str) -> Result<Value, String> {
        Self::answer(self.http.get(format!("{}{path}", self.session))).await
    }

    async fn answer(request: reqwest::RequestBuilder) -> Result<Value, String> {
        let answer = request.send().await.map_err(|error| error.to_string())?;
        let is_good = answer.status().is_success();
        let mut body: Value = answer.json().await.map_err(|error| error.to_string())?;
        match is_good {
            true => Ok(body["value"].take()),
            false => Err(body["value"]["message"].as_str().unwrap_or_default().to_string()),
        }
    }

    pub async fn go(&self, url: &str) {
        self.call("/url", json!({ "url": url })).await.unwrap();
    }

    pub async fn url(&self) -> String {
        self.ask("/url").await.unwrap().as_str().unwrap().into()
    }

    pub async fn size(&self, width: u32, height: u32) {
        self.call("/window/rect", json!({ "width": width, "height": height })).await.unwrap();
    }

    async fn element(&self, css: &str) -> Result<String, String> {
        let found = self.call("/element", json!({ "using": "css selector", "value": css })).await?;
        Ok(format!("/element/{}", found[ELEMENT].as_str().unwrap_or_default()))
    }

    /// Clicks what a selector finds, as soon as it is there; one that was replaced meanwhile is looked for again.
    pub async fn click(&self, css: &str) {
        wait_for(&format!("to click {css}"), async || {
            let element = self.element(css).await?;
            self.call(&format!("{element}/click"), json!({})).await
        })
        .await;
    }

    /// Presses the mouse's button down on what a selector finds.
    pub async fn hold(&self, css: &str) {
        let element = self.element(css).await.unwrap();
        let origin = json!({ ELEMENT: element.trim_start_matches("/element/") });
        let there = json!({ "type": "pointerMove", "origin": origin, "x": 0, "y": 0 });
        self.mouse(&[there, json!({ "type": "pointerDown", "button": 0 })]).await;
    }

    /// Lets the mouse's button go where it is.
    pub async fn let_go(&self) {
        self.mouse(&[json!({ "type": "pointerUp", "button": 0 })]).await;
    }

    async fn mouse(&self, actions: &[Value]) {
        let mouse = json!({ "type": "pointer", "id": "mouse", "actions": actions });
        self.call("/actions", json!({ "actions": [mouse] })).await.unwrap();
    }

    /// How often the page has asked for something since it was loaded.
    pub async fn fetches(&self) -> u64 {
        let script = "return performance.getEntriesByType('resource').filter((e) => e.initiatorType === 'fetch').length";
        self.run(script, &[]).await.as_u64().unwrap()
    }

    pub async fn fill(&self, css: &str, text: &str) {
        let element = self.element(css).await.unwrap();
        self.call(&format!("{element}/clear"), json!({})).await.unwrap();
        self.call(&format!("{element}/value"), json!({ "text": text })).await.unwrap();
    }

    /// Runs a function's body in the page; a promise is waited for.
    pub async fn run(&self, script: &str, args: &[&str]) -> Value {
        self.call("/execute/sync", json!({ "script": script, "args": args })).await.unwrap()
    }

    /// The text that is seen of what a selector finds; empty when there is nothing.
    pub async fn text(&self, css: &str) -> String {
        let script = "const e = document.querySelector(arguments[0]); return e ? e.innerText : ''";
        self.run(script, &[css]).await.as_str().unwrap_or_default().into()
    }

    /// How many there are of what a selector finds.
    pub async fn count(&self, css: &str) -> u64 {
        let script = "return document.querySelectorAll(arguments[0]).length";
        self.run(script, &[css]).await.as_u64().unwrap()
    }

    /// Waits until a text is seen, without touching anything.
    pub async fn sees(&self, css: &str, wanted: &str) -> String {
        wait_for(&format!("{css} to say '{wanted}'"), async || {
            let text = self.text(css).await;
            if text.contains(wanted) { Ok(text) } else { Err(text) }
        })
        .await
    }

    /// What the browser's console says: errors of scripts, and what the policy forbade.
    pub async fn console(&self) -> Vec<String> {
        let log = self.call("/se/log", json!({ "type": "browser" })).await.unwrap();
        let lines = log.as_array().unwrap().iter();
        lines.map(|line| line["message"].as_str().unwrap_or_default().to_string()).collect()
    }

    /// Has the system prefer `light` or `dark` colours, as the page can ask.
    async fn prefer(&self, scheme: &str) {
        let feature = json!({ "name": "prefers-color-scheme", "value": scheme });
        let params = json!({ "features": [feature] });
        let command = json!({ "cmd": "Emulation.setEmulatedMedia", "params": params });
        self.call("/goog/cdp/execute", command).await.unwrap();
    }

    /// Checks that all text of the window can be read in both sets of colours, and keeps pictures of it where
    /// `SHOAL_TEST_PICTURES` names a directory, for those who want to look.
    pub async fn picture(&self, name: &str) {
        let mut grounds = vec![];
        for scheme in ["light", "dark"] {
            self.prefer(scheme).await;
            let seen = self.run(CONTRASTS, &[]).await;
            let faint = seen["faint"].as_array().unwrap();
            assert!(faint.is_empty(), "{name}, {scheme}: {faint:?}");
            assert!(seen["texts"].as_u64().unwrap() > 2, "{name}: nothing was looked at");
            grounds.push(seen["ground"].as_f64().unwrap());
            if let Some(dir) = std::env::var_os("SHOAL_TEST_PICTURES") {
                self.pictures(&Path::new(&dir).join(format!("{name}-{scheme}"))).await;
            }
        }
        assert!(grounds[0] > 0.8 && grounds[1] < 0.1, "{name}: light and dark are {grounds:?}");
        self.prefer("light").await;
    }

    /// One of a wide and one of a narrow window, with all that there is to scroll to.
    async fn pictures(&self, path: &Path) {
        let script = "return document.documentElement.scrollHeight";
        for width in [1280, 400] {
            self.size(width, 800).await;
            let height = self.run(script, &[]).await.as_u64().unwrap().clamp(800, 4_000) as u32;
            self.size(width, height + 150).await;
            let picture = self.ask("/screenshot").await.unwrap();
            let bytes = decode(picture.as_str().unwrap());
            fs::write(format!("{}-{width}.png", path.display()), bytes).unwrap();
        }
        self.size(1280, 800).await;
    }

    /// The processes that have its directory in their environment or command line.
    pub fn processes(dir: &Path) -> usize {
        let dir = dir.to_str().unwrap().as_bytes();
        let names =
            |file: PathBuf| fs::read(file).unwrap_or_default().windows(dir.len()).any(|w| w == dir);
        let entries = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
        entries.filter(|path| names(path.join("cmdline"))).count()
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Base64, as pictures come.
fn decode(text: &str) -> Vec<u8> {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    STANDARD.decode(text).unwrap()
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
