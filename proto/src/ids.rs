//! Names and ids, each its own type, each checked where it enters.

use alloc::{
    format,
    string::{String, ToString},
};
use core::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a name or an id was refused; the text says what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidId(String);

impl fmt::Display for InvalidId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for InvalidId {}

fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

/// The JSON schema of a text of this shape.
#[cfg(feature = "schema")]
fn text_schema(pattern: &'static str, examples: &[&str]) -> schemars::Schema {
    if examples.is_empty() {
        return schemars::json_schema!({ "type": "string", "pattern": pattern });
    }
    schemars::json_schema!({ "type": "string", "pattern": pattern, "examples": examples })
}

macro_rules! bytes32 {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let wrong = || InvalidId(format!("'{text}' is not {}: give 64 hex digits", $what));
                let digits = text.as_bytes();
                if digits.len() != 64 {
                    return Err(wrong());
                }
                let mut bytes = [0; 32];
                for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
                    let high = hex_digit(pair[0]).ok_or_else(wrong)?;
                    let low = hex_digit(pair[1]).ok_or_else(wrong)?;
                    *byte = high << 4 | low;
                }
                Ok(Self(bytes))
            }
        }

        #[cfg(feature = "schema")]
        impl schemars::JsonSchema for $name {
            fn schema_name() -> alloc::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                text_schema("^[0-9a-fA-F]{64}$", &[])
            }
        }

        // Hex for people (JSON, TOML), 32 bytes on the wire.
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
                } else {
                    <[u8; 32]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

bytes32!(
    /// BLAKE3 of an artifact's bytes: what `b3sum FILE` prints.
    ArtifactId,
    "an artifact id"
);
bytes32!(
    /// BLAKE3 of an encoding's index object: which of the possible compressed forms of an artifact.
    EncodingId,
    "an encoding id"
);
bytes32!(
    /// A piece's subtree chaining value in its artifact's BLAKE3 tree; the plain BLAKE3 hash when the
    /// artifact is one piece.
    PieceHash,
    "a piece hash"
);
bytes32!(
    /// A machine's or process's Ed25519 public key: the key of its certificate and of its libp2p
    /// `PeerId`.
    NodeId,
    "a node id"
);

impl ArtifactId {
    /// The hash of nothing: the id of an artifact of no bytes.
    pub const EMPTY: Self = Self([
        0xaf, 0x13, 0x49, 0xb9, 0xf5, 0xf9, 0xa1, 0xa6, 0xa0, 0x40, 0x4d, 0xea, 0x36, 0xdc, 0xc9,
        0x49, 0x9b, 0xcb, 0x25, 0xc9, 0xad, 0xc1, 0x12, 0xb7, 0xcc, 0x9a, 0x93, 0xca, 0xe4, 0x1f,
        0x32, 0x62,
    ]);
}

/// A piece's place in its artifact, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PieceIndex(pub u32);

impl fmt::Display for PieceIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a goal stands in its app's history: a higher one replaces a lower one. The epoch rises only
/// when the coordinator's database was restored from a backup that may have lost revisions.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Revision {
    /// Raised by a recovery; compared first.
    pub epoch: u32,
    /// Counts the app's goals from 1.
    pub number: u64,
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.number)
    }
}

/// The longest app, region, machine or label name, in bytes: it fits a DNS label and a path component.
pub const NAME_MAX_BYTES: usize = 63;

/// Checks the shape that every name has: 1-63 of `a-z`, `0-9`, `-`, `.`, `_`, first a letter or digit.
fn check_name(what: &str, text: &str) -> Result<(), InvalidId> {
    let ok = !text.is_empty()
        && text.len() <= NAME_MAX_BYTES
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b))
        && text.as_bytes()[0].is_ascii_alphanumeric();
    if ok {
        return Ok(());
    }
    Err(InvalidId(format!(
        "'{}' is not {what}: use 1-{NAME_MAX_BYTES} of a-z 0-9 - . _, first a letter or digit",
        text.chars().take(80).collect::<String>()
    )))
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $example:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Checks `text` and takes it.
            ///
            /// # Errors
            /// [`InvalidId`] when it is empty, too long or has a character that is not allowed.
            pub fn new(text: impl Into<String>) -> Result<Self, InvalidId> {
                let text = text.into();
                check_name($what, &text)?;
                Ok(Self(text))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::new(text.to_string())
            }
        }

        #[cfg(feature = "schema")]
        impl schemars::JsonSchema for $name {
            fn schema_name() -> alloc::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                text_schema("^[a-z0-9][a-z0-9._-]{0,62}$", &[$example])
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(String::deserialize(deserializer)?).map_err(de::Error::custom)
            }
        }
    };
}

name!(
    /// The name of a registered app.
    AppName,
    "an app name",
    "web"
);
name!(
    /// The name of a region: one bucket, one gossip topic, two or more region processes.
    RegionName,
    "a region name",
    "eu"
);
name!(
    /// The name of a machine or process, unique in its cluster; its certificate carries it.
    MachineName,
    "a name",
    "m1"
);

/// A full git commit id: 40 hex digits (SHA-1) or 64 (SHA-256), lower case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct CommitSha(String);

impl CommitSha {
    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 12 digits, which name an artifact (`APP/SHA12-JOB`).
    #[must_use]
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

impl FromStr for CommitSha {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let ok = matches!(text.len(), 40 | 64) && text.bytes().all(|b| hex_digit(b).is_some());
        if ok {
            return Ok(Self(text.to_ascii_lowercase()));
        }
        Err(InvalidId(format!(
            "'{}' is not a full commit SHA: give its 40 hex digits (git rev-parse HEAD prints them)",
            text.chars().take(80).collect::<String>()
        )))
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for CommitSha {
    fn schema_name() -> alloc::borrow::Cow<'static, str> {
        "CommitSha".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        text_schema(
            "^([0-9a-fA-F]{40}|[0-9a-fA-F]{64})$",
            &["d0be2dc421be4fcd0172e5afceea3970e2f3d940"],
        )
    }
}

impl fmt::Display for CommitSha {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for CommitSha {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl<'de> Deserialize<'de> for CommitSha {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}
