//! How a new machine shows that it has the key that it wants a certificate for.

use shoal_proto::{MachineName, NodeId};

use crate::{
    key::{Key, signature_holds},
    member::PkiError,
};

/// What is signed is this tag, the token's length and text, and the machine's name.
const JOIN_DOMAIN: &[u8] = b"shoal join v1\0";

/// A key that has no certificate yet.
pub struct NewKey(Key);

impl NewKey {
    /// Makes one.
    ///
    /// # Errors
    /// [`PkiError`] when no key can be made.
    pub fn generate() -> Result<Self, PkiError> {
        Key::generate().map(Self)
    }

    /// Reads what [`Self::to_pem`] wrote.
    ///
    /// # Errors
    /// [`PkiError::Pem`] when it holds no key.
    pub fn from_pem(pem: &str) -> Result<Self, PkiError> {
        Key::from_pem(pem).map(Self)
    }

    /// PKCS #8 in PEM: for its holder only.
    ///
    /// # Errors
    /// [`PkiError`] when the key cannot be written.
    pub fn to_pem(&self) -> Result<String, PkiError> {
        self.0.to_pem()
    }

    /// The public half.
    #[must_use]
    pub fn node(&self) -> NodeId {
        NodeId(self.0.public())
    }

    /// Signs the wish to join as `machine` by `token`.
    #[must_use]
    pub fn sign_join(&self, token: &str, machine: &MachineName) -> Vec<u8> {
        self.0.sign(&join_input(token, machine))
    }
}

/// Whether whoever wants to join as `machine` by `token` has the key of `node`.
#[must_use]
pub fn join_signature_holds(
    node: &NodeId,
    token: &str,
    machine: &MachineName,
    signature: &[u8],
) -> bool {
    signature_holds(&node.0, &join_input(token, machine), signature)
}

fn join_input(token: &str, machine: &MachineName) -> Vec<u8> {
    let len = (token.len() as u64).to_le_bytes();
    [JOIN_DOMAIN, &len, token.as_bytes(), machine.as_str().as_bytes()].concat()
}
