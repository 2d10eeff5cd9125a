//! Secrets that must be used, and so cannot be hashed: what signs webhooks' messages, and what pushes are signed with.
//!
//! They lie in the database sealed with AES-256-GCM, by a key that is derived (HKDF-SHA256) from a file that every
//! coordinator has and the database has not: the goal key, or the one that `secrets_key` names. A backup of the
//! database alone gives none away. Each says by which key it was sealed, so that a wrong one is named as such.

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey},
    hkdf::{HKDF_SHA256, Salt},
};

use crate::state::hex;

/// What the keys are derived for.
const SALT: &[u8] = b"shoal secrets v1";

/// The first word of what is sealed.
const VERSION: &str = "v1";

/// The length of a nonce, in bytes.
const NONCE_BYTES: usize = 12;

/// Seals and opens secrets.
pub(crate) struct Secrets {
    key: RandomizedNonceKey,
    /// Tells one key from another, and nothing about it.
    print: String,
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    let pairs = (0..text.len()).step_by(2);
    pairs.map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

impl Secrets {
    /// Derives the keys from a file's content.
    pub(crate) fn new(content: &[u8]) -> anyhow::Result<Self> {
        let none = |_| anyhow::anyhow!("no key can be derived");
        let prk = Salt::new(HKDF_SHA256, SALT).extract(content);
        let derive = |what: &'static [u8]| {
            let mut bytes = [0; 32];
            let info = [what];
            prk.expand(&info, HKDF_SHA256).and_then(|okm| okm.fill(&mut bytes)).map(|()| bytes)
        };
        let key = RandomizedNonceKey::new(&AES_256_GCM, &derive(b"key").map_err(none)?);
        let print = hex(&derive(b"print").map_err(none)?[..4]);
        Ok(Self { key: key.map_err(none)?, print })
    }

    /// Seals a secret of `owner`, for whom alone it opens.
    pub(crate) fn seal(&self, owner: &str, secret: &[u8]) -> anyhow::Result<String> {
        let mut bytes = secret.to_vec();
        let nonce = self
            .key
            .seal_in_place_append_tag(Aad::from(owner.as_bytes()), &mut bytes)
            .map_err(|_| anyhow::anyhow!("a secret cannot be sealed"))?;
        Ok(format!("{VERSION}:{}:{}{}", self.print, hex(nonce.as_ref()), hex(&bytes)))
    }

    /// Opens what [`Secrets::seal`] made for the same owner.
    ///
    /// # Errors
    /// One line that says what to do.
    pub(crate) fn open(&self, owner: &str, sealed: &str) -> Result<Vec<u8>, String> {
        let mut parts = sealed.splitn(3, ':');
        let (version, print, text) = (parts.next(), parts.next(), parts.next());
        if version != Some(VERSION) || print.is_none() {
            return Err("its secret was sealed by another release".into());
        }
        if print != Some(self.print.as_str()) {
            return Err("its secret was sealed with another key than this coordinator's secrets_key (or goal key): give the \
                        coordinator that one back, or set the secret again"
                .into());
        }
        let broken = || "its secret cannot be read: set it again".to_string();
        let mut bytes =
            text.and_then(unhex).filter(|bytes| bytes.len() > NONCE_BYTES).ok_or_else(broken)?;
        let mut secret = bytes.split_off(NONCE_BYTES);
        let nonce = Nonce::try_assume_unique_for_key(&bytes).map_err(|_| broken())?;
        let aad = Aad::from(owner.as_bytes());
        let open = self.key.open_in_place(nonce, aad, &mut secret).map_err(|_| broken())?;
        Ok(open.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_opens_for_its_owner_with_its_key_alone() {
        let secrets = Secrets::new(b"goal key").unwrap();
        let sealed = secrets.seal("webhook", b"hush").unwrap();
        assert!(!sealed.contains(&hex(b"hush")));
        assert_ne!(sealed, secrets.seal("webhook", b"hush").unwrap(), "never sealed alike");
        let again = Secrets::new(b"goal key").unwrap();
        assert_eq!(again.open("webhook", &sealed).unwrap(), b"hush");
        assert!(secrets.open("push web", &sealed).unwrap_err().contains("set it again"));
        let other = Secrets::new(b"another").unwrap().open("webhook", &sealed).unwrap_err();
        assert!(other.contains("another key"), "{other}");
        let end = sealed.len() - 1;
        let last = if sealed.ends_with('0') { "1" } else { "0" };
        assert!(secrets.open("webhook", &format!("{}{last}", &sealed[..end])).is_err());
        for broken in ["", "v1", "v1:", "v2:00:00", &format!("v1:{}:zz", secrets.print)] {
            assert!(secrets.open("webhook", broken).is_err(), "{broken}");
        }
    }
}
