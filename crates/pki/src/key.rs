//! Ed25519 keys: made, written as PKCS #8 in PEM, read, used.

use aws_lc_rs::{
    encoding::AsBigEndian,
    signature::{ED25519, Ed25519KeyPair, KeyPair, ParsedPublicKey},
};
use rcgen::PKCS_ED25519;
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject};

use crate::member::PkiError;

/// A key pair in the two forms that its users want: one that signs bytes, and its PKCS #8 DER.
pub(crate) struct Key {
    pair: Ed25519KeyPair,
    der: PrivatePkcs8KeyDer<'static>,
}

impl Key {
    /// A new random key.
    pub(crate) fn generate() -> Result<Self, PkiError> {
        let failed = |_| PkiError::Crypto("cannot make an Ed25519 key");
        let pair = Ed25519KeyPair::generate().map_err(failed)?;
        // Version 1 of PKCS #8 is what openssl and ssh-keygen read too.
        let der = pair.to_pkcs8v1().map_err(failed)?;
        Ok(Self { der: PrivatePkcs8KeyDer::from(der.as_ref().to_vec()), pair })
    }

    /// Reads the first `PRIVATE KEY` section; text around it is skipped.
    pub(crate) fn from_pem(pem: &str) -> Result<Self, PkiError> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| PkiError::Pem("no PRIVATE KEY section"))?;
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der())
            .map_err(|_| PkiError::Pem("the private key is not an Ed25519 key"))?;
        Ok(Self { pair, der })
    }

    /// The same key once more.
    pub(crate) fn again(&self) -> Result<Self, PkiError> {
        let der = self.der.clone_key();
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der())
            .map_err(|_| PkiError::Crypto("cannot read a key again"))?;
        Ok(Self { pair, der })
    }

    /// The key for rcgen, which signs certificates.
    pub(crate) fn for_issuing(&self) -> Result<rcgen::KeyPair, PkiError> {
        Ok(rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&self.der, &PKCS_ED25519)?)
    }

    /// PKCS #8 in PEM.
    pub(crate) fn to_pem(&self) -> Result<String, PkiError> {
        Ok(self.for_issuing()?.serialize_pem())
    }

    /// PKCS #8.
    pub(crate) fn der(&self) -> &PrivatePkcs8KeyDer<'static> {
        &self.der
    }

    /// The public half.
    pub(crate) fn public(&self) -> [u8; 32] {
        let mut public = [0; 32];
        public.copy_from_slice(self.pair.public_key().as_ref());
        public
    }

    /// The 32 bytes that the key is derived from.
    pub(crate) fn seed(&self) -> Result<[u8; 32], PkiError> {
        let failed = PkiError::Crypto("cannot read the seed of a key");
        let seed = self.pair.seed().and_then(|seed| seed.as_be_bytes()).map_err(|_| failed)?;
        seed.as_ref().try_into().map_err(|_| PkiError::Crypto("a seed is not of 32 bytes"))
    }

    /// Signs `message`: 64 bytes.
    pub(crate) fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.pair.sign(message).as_ref().to_vec()
    }
}

/// Whether `signature` over `message` is by the Ed25519 key `public`.
pub(crate) fn signature_holds(public: &[u8; 32], message: &[u8], signature: &[u8]) -> bool {
    ParsedPublicKey::new(&ED25519, public)
        .is_ok_and(|key| key.verify_sig(message, signature).is_ok())
}
