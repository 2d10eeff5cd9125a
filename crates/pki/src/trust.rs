//! Whom a process believes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use rustls::pki_types::{CertificateDer, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use shoal_proto::{
    NodeId,
    codec::{self, CodecError},
    goal::{GOAL_MAX_BYTES, Goal, SignedGoal},
    trust::{SignedTrust, TRUST_MAX_BYTES, TrustBundle},
};
use webpki::{EndEntityCert, KeyUsage};

use crate::{
    goal::trust_input,
    key::signature_holds,
    member::{Member, PkiError, ca_id, cluster_of_ca, member_of_parsed, parse},
};

/// How far two machines' clocks may be apart, in seconds: a certificate counts this long before and
/// after its time.
pub const CLOCK_LEEWAY_S: i64 = 600;

/// The cluster issues Ed25519 certificates only.
const SIGNATURES: &[&dyn SignatureVerificationAlgorithm] = &[webpki::aws_lc_rs::ED25519];

/// Why a trust bundle was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// Not a bundle, or too long.
    #[error("the trust bundle cannot be read: {0}")]
    Codec(#[from] CodecError),
    /// Not signed by a key that may.
    #[error("the trust bundle's signature does not hold")]
    Signature,
    /// A CA certificate in it is no CA of the cluster.
    #[error("the trust bundle holds a bad CA certificate: {0}")]
    Ca(String),
    /// It names two goal keys with one number.
    #[error("the trust bundle holds goal key {0} twice")]
    GoalKeyTwice(u32),
    /// It is another cluster's.
    #[error("the trust bundle is of cluster '{0}'")]
    OtherCluster(String),
    /// It does not replace the one that is held.
    #[error("trust bundle {offered} does not replace {held}")]
    Old {
        /// The number offered.
        offered: u64,
        /// The number held.
        held: u64,
    },
}

/// Why a goal was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GoalError {
    /// Not a goal, or too long.
    #[error("the goal cannot be read: {0}")]
    Codec(#[from] CodecError),
    /// No such goal key.
    #[error("the goal is signed with key {0}, which is not in the trust bundle")]
    UnknownKey(u32),
    /// Not by that key, or not over these bytes.
    #[error("the goal's signature does not hold")]
    Signature,
    /// It is another cluster's.
    #[error("the goal is of cluster '{0}'")]
    OtherCluster(String),
}

/// Why a certificate was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// It cannot be read, or names no member.
    #[error(transparent)]
    Malformed(PkiError),
    /// No CA of the bundle issued it.
    #[error("the certificate was not issued by this cluster's CA")]
    UnknownIssuer,
    /// Its time is over.
    #[error("the certificate expired {0} s ago: issue a new one with `shoal pki issue`")]
    Expired(i64),
    /// Its time has not come, even if clocks differ.
    #[error("the certificate counts only in {0} s: is this machine's clock right?")]
    NotYet(i64),
    /// The machine is on the bundle's list.
    #[error("the certificate of {0} is revoked")]
    Revoked(NodeId),
    /// It is another cluster's.
    #[error("the certificate is of cluster '{0}'")]
    OtherCluster(String),
    /// It breaks a rule of X.509.
    #[error("the certificate is not acceptable: {0}")]
    Refused(String),
}

/// A verified trust bundle. Cheap to clone.
#[derive(Clone)]
pub struct Trust(Arc<Inner>);

struct Inner {
    bundle: TrustBundle,
    signed: Vec<u8>,
    signed_by: u32,
    anchors: Vec<TrustAnchor<'static>>,
    goal_keys: BTreeMap<u32, [u8; 32]>,
    revoked: BTreeSet<NodeId>,
}

impl Trust {
    /// Reads an encoded [`SignedTrust`] that is signed by one of its own goal keys. That shows that it is
    /// whole, not that it is this cluster's: the bytes must come from a place that is believed, such as
    /// the file that the operator put there. [`Self::successor`] is for those that come by the network.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn from_signed(bytes: &[u8]) -> Result<Self, TrustError> {
        let signed: SignedTrust = codec::decode(bytes, TRUST_MAX_BYTES)?;
        let bundle: TrustBundle = codec::decode(&signed.bundle, TRUST_MAX_BYTES)?;
        let mut goal_keys = BTreeMap::new();
        for key in &bundle.goal_keys {
            if goal_keys.insert(key.id, key.public).is_some() {
                return Err(TrustError::GoalKeyTwice(key.id));
            }
        }
        let key = goal_keys.get(&signed.key_id).ok_or(TrustError::Signature)?;
        if !signature_holds(key, &trust_input(&signed.bundle), &signed.signature) {
            return Err(TrustError::Signature);
        }
        let mut anchors = Vec::with_capacity(bundle.ca_certificates.len());
        for der in &bundle.ca_certificates {
            let cluster = cluster_of_ca(der).map_err(|error| TrustError::Ca(error.to_string()))?;
            if cluster != bundle.cluster {
                return Err(TrustError::Ca(format!("it is of cluster '{cluster}'")));
            }
            let der = CertificateDer::from(der.as_slice());
            let anchor = webpki::anchor_from_trusted_cert(&der)
                .map_err(|error| TrustError::Ca(error.to_string()))?;
            anchors.push(anchor.to_owned());
        }
        let revoked = bundle.revoked.iter().copied().collect();
        let signed_by = signed.key_id;
        let signed = bytes.to_vec();
        Ok(Self(Arc::new(Inner { bundle, signed, signed_by, anchors, goal_keys, revoked })))
    }

    /// A trust in one CA alone, known by other means: enough to see who a coordinator is. No goal counts by it.
    ///
    /// # Errors
    /// [`TrustError::Ca`] when it is no CA's certificate.
    pub fn of_ca(der: &[u8]) -> Result<Self, TrustError> {
        let cluster = cluster_of_ca(der).map_err(|error| TrustError::Ca(error.to_string()))?;
        let ca_certificates = vec![der.to_vec()];
        let (goal_keys, revoked) = (Vec::new(), Vec::new());
        let bundle = TrustBundle { cluster, number: 0, ca_certificates, goal_keys, revoked };
        let der = CertificateDer::from(der);
        let anchor = webpki::anchor_from_trusted_cert(&der)
            .map_err(|error| TrustError::Ca(error.to_string()))?;
        Ok(Self(Arc::new(Inner {
            bundle,
            signed: Vec::new(),
            signed_by: 0,
            anchors: vec![anchor.to_owned()],
            goal_keys: BTreeMap::new(),
            revoked: BTreeSet::new(),
        })))
    }

    /// Reads the bundle that replaces this one: of the same cluster, with a higher number, and signed by
    /// a goal key that this one already believes.
    ///
    /// # Errors
    /// [`TrustError`]; this one goes on.
    pub fn successor(&self, bytes: &[u8]) -> Result<Self, TrustError> {
        let next = Self::from_signed(bytes)?;
        if next.cluster() != self.cluster() {
            return Err(TrustError::OtherCluster(next.cluster().to_string()));
        }
        if next.number() <= self.number() {
            return Err(TrustError::Old { offered: next.number(), held: self.number() });
        }
        let signed: SignedTrust = codec::decode(bytes, TRUST_MAX_BYTES)?;
        let key = self.0.goal_keys.get(&signed.key_id).ok_or(TrustError::Signature)?;
        if !signature_holds(key, &trust_input(&signed.bundle), &signed.signature) {
            return Err(TrustError::Signature);
        }
        Ok(next)
    }

    /// [`Self::successor`], over bundles that each lead on from the one before; the last one. Those that are no newer
    /// than this one are passed over.
    ///
    /// # Errors
    /// [`TrustError`]: of the first that does not follow; [`TrustError::Old`] when none is newer.
    pub fn follow<'a>(
        &self,
        chain: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<Self, TrustError> {
        let mut last = self.clone();
        let mut old = TrustError::Old { offered: 0, held: self.number() };
        for bytes in chain {
            match last.successor(bytes) {
                Ok(next) => last = next,
                Err(error @ TrustError::Old { .. }) => old = error,
                Err(error) => return Err(error),
            }
        }
        if last.number() > self.number() { Ok(last) } else { Err(old) }
    }

    /// The CA that certificates come from at present: the last of the bundle's, by [`crate::ca_id`].
    #[must_use]
    pub fn newest_ca(&self) -> Option<u64> {
        ca_id(self.0.bundle.ca_certificates.last()?)
    }

    /// Whether goal key `one` is a later one of the bundle than `other`, which may have gone from it.
    #[must_use]
    pub fn is_later_key(&self, one: u32, other: u32) -> bool {
        let place = |id| self.0.bundle.goal_keys.iter().position(|key| key.id == id);
        place(one).is_some() && place(one) > place(other)
    }

    /// Whether goals signed with key `id` are believed.
    #[must_use]
    pub fn has_goal_key(&self, id: u32) -> bool {
        self.0.goal_keys.contains_key(&id)
    }

    /// Whether a machine's certificates no longer count.
    #[must_use]
    pub fn is_revoked(&self, node: &NodeId) -> bool {
        self.0.revoked.contains(node)
    }

    /// The goal key that signed this bundle.
    #[must_use]
    pub fn signed_by(&self) -> u32 {
        self.0.signed_by
    }

    /// The cluster.
    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.0.bundle.cluster
    }

    /// The bundle's number; a higher one replaces a lower one.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.0.bundle.number
    }

    /// What the bundle says.
    #[must_use]
    pub fn bundle(&self) -> &TrustBundle {
        &self.0.bundle
    }

    /// The encoded [`SignedTrust`], as it was read: to keep it or to pass it on.
    #[must_use]
    pub fn signed_bytes(&self) -> &[u8] {
        &self.0.signed
    }

    /// Checks who signed a goal and for which cluster, and reads it. Whether its revision is new is for
    /// the caller to say.
    ///
    /// # Errors
    /// [`GoalError`].
    pub fn open_goal(&self, signed: &SignedGoal) -> Result<Goal, GoalError> {
        // Nothing longer can be passed on to others, so nothing longer is taken.
        codec::encode(signed, GOAL_MAX_BYTES)?;
        let key =
            self.0.goal_keys.get(&signed.key_id).ok_or(GoalError::UnknownKey(signed.key_id))?;
        if !signature_holds(key, &SignedGoal::signing_input(&signed.goal), &signed.signature) {
            return Err(GoalError::Signature);
        }
        let goal = signed.decode_unverified()?;
        if goal.cluster != self.cluster() {
            return Err(GoalError::OtherCluster(goal.cluster));
        }
        Ok(goal)
    }

    /// Checks a certificate (issuer, time, revocation, cluster) and reads its member. The holder's key is
    /// proved by the handshake or the protocol around it, not here.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn verify_certificate(&self, der: &[u8]) -> Result<Member, CertificateError> {
        self.verify_certificate_at(der, UnixTime::now())
    }

    pub(crate) fn verify_certificate_at(
        &self,
        der: &[u8],
        now: UnixTime,
    ) -> Result<Member, CertificateError> {
        let parsed = parse(der).map_err(CertificateError::Malformed)?;
        let now_s = now.as_secs() as i64;
        let not_before_s = parsed.validity().not_before.timestamp();
        let not_after_s = parsed.validity().not_after.timestamp();
        if now_s < not_before_s - CLOCK_LEEWAY_S {
            return Err(CertificateError::NotYet(not_before_s - now_s));
        }
        if now_s > not_after_s + CLOCK_LEEWAY_S {
            return Err(CertificateError::Expired(now_s - not_after_s));
        }
        // Within the leeway the rest is checked as of the nearest moment at which it counts.
        let moment = now_s.max(not_before_s).min(not_after_s);
        let moment = UnixTime::since_unix_epoch(Duration::from_secs(moment.max(0) as u64));
        self.verify_chain(der, moment)?;

        let member = member_of_parsed(&parsed).map_err(CertificateError::Malformed)?;
        if member.cluster != self.cluster() {
            return Err(CertificateError::OtherCluster(member.cluster));
        }
        if self.0.revoked.contains(&member.node) {
            return Err(CertificateError::Revoked(member.node));
        }
        Ok(member)
    }

    fn verify_chain(&self, der: &[u8], moment: UnixTime) -> Result<(), CertificateError> {
        let der = CertificateDer::from(der);
        let refused = |error: webpki::Error| CertificateError::Refused(error.to_string());
        let leaf = EndEntityCert::try_from(&der).map_err(refused)?;
        // Every certificate is for both ends of a connection, so one usage stands for both.
        let usage = KeyUsage::client_auth();
        match leaf.verify_for_usage(SIGNATURES, &self.0.anchors, &[], moment, usage, None, None) {
            Ok(_) => Ok(()),
            Err(
                webpki::Error::UnknownIssuer
                | webpki::Error::InvalidSignatureForPublicKey
                | webpki::Error::UnsupportedSignatureAlgorithmContext(_)
                | webpki::Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_),
            ) => Err(CertificateError::UnknownIssuer),
            Err(error) => Err(refused(error)),
        }
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust")
            .field("cluster", &self.cluster())
            .field("number", &self.number())
            .finish_non_exhaustive()
    }
}
