//! What makes an artifact's pieces trustworthy and small, over byte slices only.
//!
//! An artifact's id is the BLAKE3 hash of its bytes. BLAKE3 is a tree, and a piece is an aligned,
//! power-of-two-sized range, so a piece's hash is the chaining value of one subtree of that very tree
//! ([`piece_hash`]) and the list of piece hashes merges to the id ([`merge`]). That is the whole chain of
//! trust: the 32-byte id proves the list ([`verify_manifest`]), the list proves each piece alone
//! ([`verify_piece`]), and no piece list needs a signature.
//!
//! Pieces travel compressed. The compressed form is no part of the identity: an [`Encoder`] makes it, a
//! [`Decoder`] takes it apart with the output held to the piece's length, and only then is the piece
//! verified. Which form each piece has, and in which part objects the pieces lie, is an encoding's index;
//! [`seal_index`] writes it and names it by its hash, [`open_index`] reads one from anywhere and believes
//! none of it unchecked.
//!
//! There are no files, sockets or threads here: `shoal-store` has them.

mod codec;
mod hash;
mod index;
mod verify;

pub use codec::{DecodeError, Decoder, Encoder, LEVEL_DEFAULT, LEVEL_MAX, LEVEL_MIN};
pub use hash::{PieceHasher, merge, piece_hash};
pub use index::{IndexError, open_index, seal_index};
pub use verify::{ManifestError, PieceError, verify_manifest, verify_piece};
