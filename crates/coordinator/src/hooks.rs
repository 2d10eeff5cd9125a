//! Pushes as GitHub and GitLab tell them: what is in them, and of which repository they are.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::Mutex,
    time::{Duration, Instant},
};

use serde::Deserialize;
use shoal_proto::CommitSha;

use crate::state::lock;

/// How many calls an address may make at once, and how many a second from then on.
const BURST: f64 = 60.0;
const PER_SECOND: f64 = 5.0;

/// How many addresses are remembered.
const ADDRESSES_MAX: usize = 4_096;

/// The longest name of a person that is kept, in bytes.
const LOGIN_MAX_BYTES: usize = 100;

/// A limit of calls, an address for itself.
#[derive(Default)]
pub(crate) struct Limit {
    callers: Mutex<HashMap<IpAddr, (f64, Instant)>>,
}

impl Limit {
    /// Whether this address may call now.
    pub(crate) fn allows(&self, address: IpAddr, now: Instant) -> bool {
        let mut callers = lock(&self.callers);
        let filled = |(left, at): (f64, Instant)| {
            let gained = now.saturating_duration_since(at).as_secs_f64() * PER_SECOND;
            (left + gained).min(BURST)
        };
        if callers.len() >= ADDRESSES_MAX && !callers.contains_key(&address) {
            callers.retain(|_, known| filled(*known) < BURST);
            // So many busy addresses are an attack: whoever is not known waits.
            if callers.len() >= ADDRESSES_MAX {
                return false;
            }
        }
        let left = callers.get(&address).map_or(BURST, |known| filled(*known));
        let allowed = left >= 1.0;
        callers.insert(address, (if allowed { left - 1.0 } else { left }, now));
        allowed
    }

    /// How long a caller that was refused waits.
    pub(crate) fn retry_after() -> Duration {
        Duration::from_secs(1)
    }
}

/// What a push says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pushed {
    /// Its repository's addresses, as they are compared.
    pub(crate) repositories: Vec<String>,
    /// What it is, when it is a push to a branch; else why it is none.
    pub(crate) change: Result<Change, String>,
    /// Who pushed.
    pub(crate) login: String,
}

/// A branch's new head.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) branch: String,
    pub(crate) commit: CommitSha,
}

/// A repository's address as it is compared: host and path, whatever it is fetched by.
pub(crate) fn canonical(address: &str) -> String {
    let address = address.trim();
    let without = |text: &str| {
        let text = text.trim_end_matches('/');
        text.strip_suffix(".git").unwrap_or(text).trim_end_matches('/').to_string()
    };
    if let Some(path) = address.strip_prefix("file://") {
        return without(path);
    }
    if address.starts_with(['/', '.']) {
        return without(address);
    }
    let (authority, path) = match address.split_once("://") {
        Some((_, rest)) => rest.split_once('/').unwrap_or((rest, "")),
        // As ssh writes it: git@host:path.
        None => match address.split_once(':') {
            Some((authority, path)) if !authority.contains('/') => (authority, path),
            _ => address.split_once('/').unwrap_or((address, "")),
        },
    };
    let host = authority.rsplit('@').next().unwrap_or(authority);
    let host = host.split(':').next().unwrap_or(host);
    // Neither forge tells capitals apart.
    without(&format!("{host}/{}", path.trim_start_matches('/'))).to_lowercase()
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Body {
    #[serde(rename = "ref")]
    reference: Option<String>,
    after: Option<String>,
    /// GitHub's.
    deleted: Option<bool>,
    sender: Option<Sender>,
    /// GitLab's.
    object_kind: Option<String>,
    user_username: Option<String>,
    repository: Option<Addresses>,
    project: Option<Addresses>,
}

#[derive(Deserialize)]
struct Sender {
    login: Option<String>,
}

#[derive(Deserialize)]
struct Addresses {
    clone_url: Option<String>,
    ssh_url: Option<String>,
    git_url: Option<String>,
    html_url: Option<String>,
    git_http_url: Option<String>,
    git_ssh_url: Option<String>,
    web_url: Option<String>,
}

impl Addresses {
    fn all(self) -> impl Iterator<Item = String> {
        let all = [
            self.clone_url,
            self.ssh_url,
            self.git_url,
            self.html_url,
            self.git_http_url,
            self.git_ssh_url,
            self.web_url,
        ];
        all.into_iter().flatten().filter(|url| !url.is_empty()).map(|url| canonical(&url))
    }
}

/// Reads a push's JSON. `is_push`: whether its header says that it is one.
///
/// # Errors
/// One line that says what is wrong.
pub(crate) fn read(body: &[u8], is_push: bool) -> Result<Pushed, String> {
    let body: Body = serde_json::from_slice(body).map_err(|error| {
        let text = error.to_string();
        format!("wrong body: {}", text.split(" at line ").next().unwrap_or_default())
    })?;
    let is_push = is_push && body.object_kind.as_deref().is_none_or(|kind| kind == "push");
    let change = if is_push { change(&body) } else { Err("it is no push to a branch".into()) };
    let login = body.sender.and_then(|sender| sender.login).or(body.user_username);
    let login: String = login
        .unwrap_or_else(|| "unknown".into())
        .chars()
        .filter(|letter| letter.is_ascii_graphic())
        .take(LOGIN_MAX_BYTES)
        .collect();
    let addresses = [body.repository, body.project].into_iter().flatten();
    let mut repositories: Vec<_> = addresses.flat_map(Addresses::all).collect();
    repositories.sort();
    repositories.dedup();
    Ok(Pushed { repositories, change, login })
}

fn change(body: &Body) -> Result<Change, String> {
    let reference = body.reference.as_deref().unwrap_or_default();
    let Some(branch) = reference.strip_prefix("refs/heads/") else {
        return Err(match reference.strip_prefix("refs/tags/") {
            Some(_) => "it is a tag's, not a branch's".into(),
            None => "it names no branch".into(),
        });
    };
    let after = body.after.as_deref().unwrap_or_default();
    if body.deleted == Some(true) || (!after.is_empty() && after.bytes().all(|byte| byte == b'0')) {
        return Err("the branch was deleted".into());
    }
    let commit = after.parse().map_err(|error| format!("its head is no commit: {error}"))?;
    Ok(Change { branch: branch.into(), commit })
}

/// The JSON of a body: itself, or the field `payload` of a form, which GitHub sends unless it is told otherwise.
pub(crate) fn payload<'a>(body: &'a [u8], content_type: &str) -> std::borrow::Cow<'a, [u8]> {
    if !content_type.starts_with("application/x-www-form-urlencoded") {
        return body.into();
    }
    let mut fields = url::form_urlencoded::parse(body);
    let payload = fields.find(|(name, _)| name == "payload").map(|(_, value)| value.into_owned());
    payload.unwrap_or_default().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA: &str = "6113728f27ae82c7b1a177c8d03f9e96e0adf246";

    #[test]
    fn a_repository_is_the_same_however_it_is_fetched() {
        for same in [
            "https://github.com/Acme/Web.git",
            "https://github.com/acme/web",
            "https://token@github.com/acme/web.git/",
            "git://github.com/acme/web.git",
            "git@github.com:acme/web.git",
            "ssh://git@github.com:22/acme/web.git",
            "github.com/acme/web",
        ] {
            assert_eq!(canonical(same), "github.com/acme/web", "{same}");
        }
        assert_ne!(canonical("https://github.com/acme/web2"), "github.com/acme/web");
        assert_ne!(canonical("https://github.com.evil.org/acme/web"), "github.com/acme/web");
        assert_eq!(canonical("/srv/git/Web.git/"), "/srv/git/Web");
        assert_eq!(canonical("file:///srv/git/Web"), "/srv/git/Web");
    }

    #[test]
    fn pushes_of_both_forges_are_read() {
        let github = format!(
            r#"{{"ref":"refs/heads/main","before":"x","after":"{SHA}","deleted":false,"commits":[],
            "repository":{{"id":1,"full_name":"acme/web","clone_url":"https://github.com/acme/web.git",
            "ssh_url":"git@github.com:acme/web.git","git_url":"git://github.com/acme/web.git",
            "html_url":"https://github.com/acme/web","url":"https://github.com/acme/web"}},
            "sender":{{"login":"octocat","id":1}}}}"#
        );
        let pushed = read(github.as_bytes(), true).unwrap();
        let change = Change { branch: "main".into(), commit: SHA.parse().unwrap() };
        let want = Pushed {
            repositories: vec!["github.com/acme/web".into()],
            change: Ok(change),
            login: "octocat".into(),
        };
        assert_eq!(pushed, want);
        let gitlab = format!(
            r#"{{"object_kind":"push","ref":"refs/heads/feature/x","after":"{SHA}","checkout_sha":"{SHA}",
            "user_username":"jsmith","project":{{"id":15,"web_url":"http://example.com/mike/diaspora",
            "git_ssh_url":"git@example.com:mike/diaspora.git","git_http_url":"http://example.com/mike/diaspora.git"}},
            "repository":{{"name":"Diaspora","url":"git@example.com:mike/diaspora.git",
            "git_http_url":"http://example.com/mike/diaspora.git"}}}}"#
        );
        let pushed = read(gitlab.as_bytes(), true).unwrap();
        assert_eq!(pushed.repositories, ["example.com/mike/diaspora"]);
        assert_eq!(
            (pushed.change.unwrap().branch.as_str(), pushed.login.as_str()),
            ("feature/x", "jsmith")
        );
    }

    #[test]
    fn what_builds_nothing_says_why() {
        let why =
            |text: String, is_push| read(text.as_bytes(), is_push).unwrap().change.unwrap_err();
        let push =
            |reference: &str, after: &str| format!(r#"{{"ref":"{reference}","after":"{after}"}}"#);
        assert!(why(push("refs/tags/v1", SHA), true).contains("tag"));
        assert!(why(push("refs/heads/main", &"0".repeat(40)), true).contains("deleted"));
        assert!(why(push("refs/heads/main", "main"), true).contains("no commit"));
        assert!(why(push("", SHA), true).contains("no branch"));
        assert!(why("{}".into(), true).contains("no branch"));
        assert!(why(push("refs/heads/main", SHA), false).contains("no push"));
        let tag =
            format!(r#"{{"object_kind":"tag_push","ref":"refs/heads/main","after":"{SHA}"}}"#);
        assert!(why(tag, true).contains("no push"));
        assert!(read(b"[1]", true).is_err() && read(b"", true).is_err());
        let odd = read(br#"{"sender":{"login":"a b\n\u00e4"}}"#, true).unwrap();
        assert_eq!(odd.login, "ab");
    }

    #[test]
    fn a_form_holds_the_json_in_a_field() {
        let form = b"payload=%7B%22ref%22%3A%22x%22%7D";
        let json = payload(form, "application/x-www-form-urlencoded; charset=utf-8");
        assert_eq!(json.as_ref(), br#"{"ref":"x"}"#);
        assert_eq!(payload(b"{}", "application/json").as_ref(), b"{}");
    }

    #[test]
    fn an_address_has_its_own_limit() {
        let limit = Limit::default();
        let start = Instant::now();
        let (one, two) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let burst = (0..1_000).filter(|_| limit.allows(one, start)).count();
        assert_eq!(burst, BURST as usize);
        assert!(limit.allows(two, start));
        let later = start + Duration::from_secs(1);
        assert_eq!((0..1_000).filter(|_| limit.allows(one, later)).count(), PER_SECOND as usize);
        // However many there are, only so many are remembered, and those at rest make room.
        for at in 0..2 * ADDRESSES_MAX as u32 {
            limit.allows(IpAddr::from((at + (1 << 24)).to_be_bytes()), later);
        }
        assert_eq!(lock(&limit.callers).len(), ADDRESSES_MAX);
        assert!(limit.allows(IpAddr::from([198, 51, 100, 1]), later + Duration::from_secs(60)));
    }
}
