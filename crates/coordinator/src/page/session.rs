//! Who looks: a session is a token, sealed into a cookie.
//!
//! The cookie holds the token itself, sealed by a key that every coordinator has and the database has not, with an end
//! and the word that its forms must say. So any coordinator knows a session that another began, nothing is stored, and
//! since each page asks the API with that token, a session ends at the moment at which its token does. What is stolen
//! from a browser is no token: it opens the page alone, and for half a day at most.
//!
//! A form of another site can do nothing. The cookie is `SameSite=Strict`, so it does not come along; each form says a
//! random word that is sealed into the session, which no other site can read; and what a browser says of itself
//! (`Sec-Fetch-Site`) guards the login, where there is no session yet.

use axum::http::{HeaderMap, HeaderValue, header};
use serde::{Deserialize, Serialize};

use crate::{
    secrets::Secrets,
    state::{hex, now_ms},
};

/// The cookie's name. The prefix has browsers take it only over HTTPS, for this host alone and all its paths.
const COOKIE: &str = "__Host-shoal";

/// How long a session lasts, in seconds: a working day.
const LASTS_S: i64 = 12 * 3_600;

/// The random bytes of a form's word and of its key.
const WORD_BYTES: usize = 16;

/// The longest cookie that is opened, in bytes.
const COOKIE_MAX_BYTES: usize = 2_048;

/// Whose secrets these are among those that are sealed with the key.
const OWNER: &str = "page session";

/// A session.
#[derive(Serialize, Deserialize)]
pub(super) struct Session {
    /// The token that it stands for.
    pub(super) token: String,
    /// What each of its forms says.
    pub(super) word: String,
    /// When it ends, by any coordinator's clock.
    ends_at_ms: i64,
}

/// A text that nobody guesses.
pub(super) fn random_word() -> Result<String, String> {
    let mut bytes = [0; WORD_BYTES];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| "no random bytes to be had".to_string())?;
    Ok(hex(&bytes))
}

impl Session {
    pub(super) fn begin(token: String) -> Result<Self, String> {
        Ok(Self { token, word: random_word()?, ends_at_ms: now_ms() + LASTS_S * 1_000 })
    }

    /// The session that a browser shows, unless it is none or over.
    pub(super) fn of(secrets: &Secrets, headers: &HeaderMap) -> Option<Self> {
        let cookies = headers.get_all(header::COOKIE).iter();
        let cookies =
            cookies.filter_map(|line| line.to_str().ok()).flat_map(|line| line.split(';'));
        let mut ours = cookies.filter_map(|pair| {
            let (name, value) = pair.trim().split_once('=')?;
            (name == COOKIE && value.len() <= COOKIE_MAX_BYTES).then_some(value)
        });
        let sealed = ours.next()?;
        let bytes = secrets.open(OWNER, sealed).ok()?;
        let session: Self = serde_json::from_slice(&bytes).ok()?;
        (now_ms() < session.ends_at_ms).then_some(session)
    }

    /// The header that gives it to the browser.
    pub(super) fn cookie(&self, secrets: &Secrets) -> Result<HeaderValue, String> {
        let bytes = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        let sealed = secrets.seal(OWNER, &bytes).map_err(|error| error.to_string())?;
        set(&sealed, LASTS_S)
    }

    /// Whether a form says this session's word.
    pub(super) fn says(&self, word: &str) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(self.word.as_bytes(), word.as_bytes())
            .is_ok()
    }
}

fn set(value: &str, lasts_s: i64) -> Result<HeaderValue, String> {
    let text =
        format!("{COOKIE}={value}; Path=/; Max-Age={lasts_s}; Secure; HttpOnly; SameSite=Strict");
    let mut value = HeaderValue::from_str(&text).map_err(|error| error.to_string())?;
    value.set_sensitive(true);
    Ok(value)
}

/// The header that takes the session from the browser.
pub(super) fn no_cookie() -> HeaderValue {
    set("", 0).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Whether a browser says that another site made it ask.
pub(super) fn is_of_another_site(headers: &HeaderMap) -> bool {
    headers.get("sec-fetch-site").is_some_and(|site| site != "same-origin" && site != "none")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(cookie: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::COOKIE, format!("a=b; {cookie}; c").parse().unwrap());
        headers
    }

    #[test]
    fn a_session_is_known_by_every_holder_of_the_key_and_shows_no_token() {
        let secrets = Secrets::new(b"goal key").unwrap();
        let session = Session::begin("shoal_hush".into()).unwrap();
        let header = session.cookie(&secrets).unwrap();
        let text = header.to_str().unwrap();
        for flag in ["Secure", "HttpOnly", "SameSite=Strict", "Path=/", "__Host-"] {
            assert!(text.contains(flag), "{text}");
        }
        assert!(!text.contains("hush") && !text.contains(&hex(b"hush")), "{text}");
        let pair = text.split(';').next().unwrap();
        let again = Secrets::new(b"goal key").unwrap();
        let found = Session::of(&again, &shown(pair)).unwrap();
        assert_eq!(found.token, "shoal_hush");
        assert!(found.says(&session.word) && !found.says("") && !found.says(&found.token));
        assert!(Session::of(&Secrets::new(b"other").unwrap(), &shown(pair)).is_none());
        assert!(Session::of(&again, &shown("__Host-shoal=v1:x")).is_none());
        assert!(Session::of(&again, &HeaderMap::new()).is_none());
        // What was sealed for something else is no session.
        let webhook = secrets.seal("webhook", &serde_json::to_vec(&session).unwrap()).unwrap();
        assert!(Session::of(&again, &shown(&format!("{COOKIE}={webhook}"))).is_none());
        assert_ne!(Session::begin(String::new()).unwrap().word, session.word);
    }

    #[test]
    fn a_session_ends() {
        let secrets = Secrets::new(b"goal key").unwrap();
        let mut session = Session::begin("shoal_x".into()).unwrap();
        session.ends_at_ms = now_ms() - 1;
        let header = session.cookie(&secrets).unwrap();
        let pair = header.to_str().unwrap().split(';').next().unwrap().to_string();
        assert!(Session::of(&secrets, &shown(&pair)).is_none());
    }
}
