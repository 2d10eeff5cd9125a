//! Signatures over bodies: ours as Standard Webhooks wants them, and those of GitHub and GitLab.

use aws_lc_rs::{constant_time::verify_slices_are_equal, hmac};
use base64::{Engine as _, engine::general_purpose::STANDARD};

/// What a secret of Standard Webhooks begins with; base64 follows.
const PREFIX: &str = "whsec_";

/// How far a signed time may be off, in seconds: clocks may differ by ten minutes, and a message takes its time.
pub(crate) const TIME_OFF_MAX_S: i64 = 15 * 60;

/// The bytes of a secret: `whsec_` and base64, or the text itself.
pub(crate) fn secret_bytes(text: &str) -> Result<Vec<u8>, String> {
    match text.strip_prefix(PREFIX) {
        Some(rest) => STANDARD
            .decode(rest)
            .map_err(|_| format!("a secret that begins with {PREFIX} goes on in base64")),
        None => Ok(text.as_bytes().to_vec()),
    }
}

/// A secret as a person may copy it.
pub(crate) fn secret_text(bytes: &[u8]) -> String {
    format!("{PREFIX}{}", STANDARD.encode(bytes))
}

fn signed_content(id: &str, timestamp: i64, body: &[u8]) -> Vec<u8> {
    let mut content = format!("{id}.{timestamp}.").into_bytes();
    content.extend_from_slice(body);
    content
}

/// The value of `webhook-signature`.
pub(crate) fn sign(secret: &[u8], id: &str, timestamp: i64, body: &[u8]) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let tag = hmac::sign(&key, &signed_content(id, timestamp, body));
    format!("v1,{}", STANDARD.encode(tag.as_ref()))
}

/// Whether one of the signatures of a `webhook-signature` is right, at `now_s`.
pub(crate) fn is_signed(
    secret: &[u8],
    (id, timestamp, signatures): (&str, &str, &str),
    body: &[u8],
    now_s: i64,
) -> bool {
    let Ok(timestamp) = timestamp.parse::<i64>() else { return false };
    if timestamp.abs_diff(now_s) > TIME_OFF_MAX_S.unsigned_abs() {
        return false;
    }
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let content = signed_content(id, timestamp, body);
    let given = signatures.split(' ').filter_map(|one| one.strip_prefix("v1,"));
    let given = given.filter_map(|text| STANDARD.decode(text).ok());
    // Each is compared in constant time.
    given.into_iter().any(|tag| hmac::verify(&key, &content, &tag).is_ok())
}

/// Whether GitHub's `X-Hub-Signature-256` is right.
pub(crate) fn is_github(secret: &[u8], signature: &str, body: &[u8]) -> bool {
    let Some(text) = signature.strip_prefix("sha256=") else { return false };
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let mut tag = [0; 32];
    let is_hex = text.len() == 64 && text.is_ascii();
    let bytes = (0..tag.len()).map(|at| text.get(2 * at..2 * at + 2));
    let bytes = bytes.map(|pair| u8::from_str_radix(pair.unwrap_or("-"), 16));
    for (place, byte) in tag.iter_mut().zip(bytes) {
        match byte {
            Ok(byte) => *place = byte,
            Err(_) => return false,
        }
    }
    is_hex && hmac::verify(&key, body, &tag).is_ok()
}

/// Whether GitLab's `X-Gitlab-Token` is the secret.
pub(crate) fn is_token(secret: &[u8], token: &str) -> bool {
    !secret.is_empty() && verify_slices_are_equal(secret, token.as_bytes()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn github_s_own_example_holds() {
        // docs.github.com, "Validating webhook deliveries", "Testing the webhook payload validation".
        let (secret, body) = (b"It's a Secret to Everybody", b"Hello, World!");
        let right = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
        assert!(is_github(secret, right, body));
        assert!(!is_github(b"another", right, body));
        assert!(!is_github(secret, right, b"Hello, World?"));
        for wrong in [
            "",
            "sha256=",
            "sha1=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
            "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e1",
            "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e1700",
            "sha256=+57107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
            "sha256=\u{e4}\u{e4}7107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e",
        ] {
            assert!(!is_github(secret, wrong, body), "{wrong}");
        }
    }

    #[test]
    fn standard_webhooks_own_example_holds() {
        // The example of the specification and of its libraries' tests.
        let secret = secret_bytes("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let (id, time, body) =
            ("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, b"{\"test\": 2432232314}");
        let right = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
        assert_eq!(sign(&secret, id, time, body), right);
        let text = time.to_string();
        let holds =
            |signature: &str, now_s| is_signed(&secret, (id, &text, signature), body, now_s);
        assert!(holds(right, time) && holds(right, time + TIME_OFF_MAX_S));
        // While a secret is replaced there are two.
        assert!(holds(&format!("v1,AAAA {right}"), time));
        assert!(!holds(right, time + TIME_OFF_MAX_S + 1), "too old");
        assert!(!holds(right, time - TIME_OFF_MAX_S - 1));
        for wrong in ["", "v1,", "v2,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=", "v1,AAAA"] {
            assert!(!holds(wrong, time), "{wrong}");
        }
        assert!(!is_signed(&secret, ("other", &text, right), body, time));
        assert!(!is_signed(&secret, (id, "soon", right), body, time));
        assert_eq!(secret_text(&secret), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        assert!(secret_bytes("whsec_*").is_err());
    }

    #[test]
    fn a_token_is_the_secret_itself() {
        assert!(is_token(b"hush", "hush"));
        assert!(!is_token(b"hush", "hush ") && !is_token(b"hush", "") && !is_token(b"", ""));
    }
}
