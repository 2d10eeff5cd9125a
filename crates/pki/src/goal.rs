//! Goal keys: say what shall run.

use std::fmt;

use shoal_proto::{
    codec::{self, CodecError},
    goal::{GOAL_MAX_BYTES, Goal, SignedGoal},
    trust::{GoalKey, SignedTrust, TRUST_DOMAIN, TRUST_MAX_BYTES, TrustBundle},
};

use crate::{key::Key, member::PkiError};

/// The line before a goal key's PEM section that carries its number.
const ID_LINE: &str = "Goal-Key-Id: ";

/// Why something was not signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignError {
    /// A goal that no gossip message could carry.
    #[error(
        "the goal is too long to send, use fewer or shorter arguments, labels and regions: {0}"
    )]
    Goal(CodecError),
    /// A trust bundle that is too long.
    #[error("the trust bundle is too long: {0}")]
    Trust(CodecError),
}

/// A numbered key that signs goals and trust bundles.
pub struct GoalSigner {
    id: u32,
    key: Key,
}

impl GoalSigner {
    /// Makes a new key under number `id`.
    ///
    /// # Errors
    /// [`PkiError`] when no key can be made.
    pub fn create(id: u32) -> Result<Self, PkiError> {
        Ok(Self { id, key: Key::generate()? })
    }

    /// The number in a line, then the key, PKCS #8 in PEM: for its holder only.
    ///
    /// # Errors
    /// [`PkiError`] when the key cannot be written.
    pub fn to_pem(&self) -> Result<String, PkiError> {
        Ok(format!("{ID_LINE}{}\n{}", self.id, self.key.to_pem()?))
    }

    /// Reads what [`Self::to_pem`] wrote.
    ///
    /// # Errors
    /// [`PkiError::Pem`] when there is no number or no key.
    pub fn from_pem(pem: &str) -> Result<Self, PkiError> {
        let id = pem
            .lines()
            .find_map(|line| line.strip_prefix(ID_LINE))
            .and_then(|id| id.trim().parse().ok())
            .ok_or(PkiError::Pem("no line 'Goal-Key-Id: NUMBER' before the key"))?;
        Ok(Self { id, key: Key::from_pem(pem)? })
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The public half, as a trust bundle holds it.
    #[must_use]
    pub fn public(&self) -> GoalKey {
        GoalKey { id: self.id, public: self.key.public() }
    }

    /// Signs a goal.
    ///
    /// # Errors
    /// [`SignError::Goal`] when it is longer than [`GOAL_MAX_BYTES`] with its envelope.
    pub fn sign_goal(&self, goal: &Goal) -> Result<SignedGoal, SignError> {
        let goal = codec::encode(goal, GOAL_MAX_BYTES).map_err(SignError::Goal)?;
        let signature = self.key.sign(&SignedGoal::signing_input(&goal));
        let signed = SignedGoal { goal, key_id: self.id, signature };
        codec::encode(&signed, GOAL_MAX_BYTES).map_err(SignError::Goal)?;
        Ok(signed)
    }

    /// Signs a trust bundle.
    ///
    /// # Errors
    /// [`SignError::Trust`] when it is longer than [`TRUST_MAX_BYTES`] with its envelope.
    pub fn sign_trust(&self, bundle: &TrustBundle) -> Result<SignedTrust, SignError> {
        let bundle = codec::encode(bundle, TRUST_MAX_BYTES).map_err(SignError::Trust)?;
        let signature = self.key.sign(&trust_input(&bundle));
        let signed = SignedTrust { bundle, key_id: self.id, signature };
        codec::encode(&signed, TRUST_MAX_BYTES).map_err(SignError::Trust)?;
        Ok(signed)
    }
}

// The key stays out of logs.
impl fmt::Debug for GoalSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GoalSigner").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The bytes that a trust bundle's signature covers.
pub(crate) fn trust_input(bundle: &[u8]) -> Vec<u8> {
    [TRUST_DOMAIN, bundle].concat()
}
