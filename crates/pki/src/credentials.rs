//! What a process shows and whom it believes, as both are at present: certificates are renewed and trust changes
//! while it runs.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use crate::{identity::Identity, member::PkiError, trust::Trust};

/// A process's identity and trust. Clones share them: what is set on one, every handshake from then on goes by.
#[derive(Clone)]
pub struct Credentials(Arc<Inner>);

struct Inner {
    identity: RwLock<Identity>,
    trust: RwLock<Trust>,
}

impl Credentials {
    /// Begins with these.
    #[must_use]
    pub fn new(identity: Identity, trust: Trust) -> Self {
        Self(Arc::new(Inner { identity: RwLock::new(identity), trust: RwLock::new(trust) }))
    }

    /// The certificate and key at present.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.0.identity.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The trust at present.
    #[must_use]
    pub fn trust(&self) -> Trust {
        self.0.trust.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Shows a renewed certificate from the next handshake on.
    ///
    /// # Errors
    /// [`PkiError::Request`] for one of another member or key: what was bound to the old one would be another machine's.
    pub fn set_identity(&self, identity: Identity) -> Result<(), PkiError> {
        let mut held = self.0.identity.write().unwrap_or_else(PoisonError::into_inner);
        if held.member() != identity.member() {
            let (new, old) = (identity.member(), held.member());
            return Err(PkiError::Request(format!("a certificate of {new}, not of {old}")));
        }
        *held = identity;
        Ok(())
    }

    /// Goes by `trust` from the next handshake on, if its number is higher; whether it was. That it follows on the
    /// one before is for [`Trust::successor`] to have said.
    pub fn set_trust(&self, trust: Trust) -> bool {
        let mut held = self.0.trust.write().unwrap_or_else(PoisonError::into_inner);
        let newer = trust.number() > held.number();
        if newer {
            *held = trust;
        }
        newer
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("identity", &self.identity())
            .field("trust", &self.trust())
            .finish()
    }
}
