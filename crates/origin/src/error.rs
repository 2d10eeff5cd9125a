//! What can go wrong with a bucket.

use std::{io, path::PathBuf};

/// Why an operation on a bucket failed.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// Not the address of a bucket.
    #[error(
        "'{url}' is not a bucket: {reason} (give a directory, file:///dir, s3://bucket/prefix or gs://bucket/prefix)"
    )]
    Address {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No such object.
    #[error("{key} is not in the bucket {bucket}")]
    NotFound {
        /// The bucket.
        bucket: String,
        /// The object's key.
        key: String,
    },
    /// No such bucket.
    #[error("there is no bucket {bucket}: create it, or look at its address, region and endpoint")]
    NoBucket {
        /// The bucket.
        bucket: String,
    },
    /// No credentials anywhere that its SDK would look.
    #[error(
        "no credentials for {bucket}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, have them in a credentials file, or give the machine a role"
    )]
    NoCredentials {
        /// The bucket.
        bucket: String,
    },
    /// The credentials do not do, or may not do this.
    #[error(
        "{bucket} refuses access to {key}: {reason}; look at the credentials and what they permit"
    )]
    Denied {
        /// The bucket.
        bucket: String,
        /// The object's key, or the prefix of a listing.
        key: String,
        /// What the store says.
        reason: String,
    },
    /// A setting in the environment or in a file of the SDK that does not do.
    #[error("{name}: {reason}")]
    Settings {
        /// The variable or the file.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The bucket makes no URLs for others: it is a directory.
    #[error("{bucket} makes no URLs for others: only S3 and GCS do")]
    NoUrls {
        /// The bucket.
        bucket: String,
    },
    /// A range could not be read by its URL.
    #[error("{host}: {reason}")]
    Url {
        /// Whom it names; the rest of it is a secret.
        host: String,
        /// What happened.
        reason: String,
        /// Whether it may go better later.
        transient: bool,
    },
    /// A part's bytes are not what the index says; nothing of it was written.
    #[error("part {part} is not what its index says: {reason}")]
    Mismatch {
        /// The part's number.
        part: u32,
        /// Length or hash, expected and met.
        reason: String,
    },
    /// The index is not this encoding's, or contradicts itself.
    #[error("index of encoding {encoding}: {reason}")]
    Index {
        /// The encoding.
        encoding: shoal_proto::EncodingId,
        /// What is wrong with it.
        reason: String,
    },
    /// The index may not be written yet: parts are missing, or are of the wrong length.
    #[error("{} parts are missing, the first is {:?}", missing.len(), missing.first())]
    Incomplete {
        /// Their numbers, ascending.
        missing: Vec<u32>,
    },
    /// The encoding is whole already: a part of unknown hash cannot be written over it.
    #[error("{key} belongs to an encoding that is already whole")]
    Sealed {
        /// The part's key.
        key: String,
    },
    /// Pieces that the artifact does not have.
    #[error("pieces {first}..+{count} of an artifact of {pieces}")]
    NoSuchPieces {
        /// The first asked for.
        first: u32,
        /// How many.
        count: u32,
        /// How many there are.
        pieces: usize,
    },
    /// The store answered with other bytes than the range that was asked for.
    #[error("{key}: asked for bytes {asked:?}, got {got}")]
    WrongRange {
        /// The object's key.
        key: String,
        /// The range in bytes.
        asked: std::ops::Range<u64>,
        /// What came instead.
        got: String,
    },
    /// An object that is longer than its kind may be.
    #[error("{key} is {len} bytes, more than {limit}")]
    TooLong {
        /// The object's key.
        key: String,
        /// Its length in bytes.
        len: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The sender of a part gave nothing for too long.
    #[error("the sender of {key} gave nothing for {seconds} s")]
    Stalled {
        /// The part's key.
        key: String,
        /// How long, in seconds.
        seconds: u64,
    },
    /// The caller's stream of a part's bytes failed.
    #[error("the bytes of {key} could not be read: {source}")]
    Stream {
        /// The part's key.
        key: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A local file could not be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The store failed.
    #[error("{}", one_line(.0))]
    Store(#[from] object_store::Error),
}

impl OriginError {
    /// Whether a write on the condition that nothing was there found something.
    pub(crate) fn is_there_already(&self) -> bool {
        matches!(self, Self::Store(object_store::Error::AlreadyExists { .. }))
    }

    /// The store's error in the words of this crate.
    pub(crate) fn of_store(bucket: &str, key: &str, error: object_store::Error) -> Self {
        let (bucket, key) = (bucket.to_string(), key.to_string());
        let text = chain(&error);
        // Where credentials are looked for last of all.
        if ["/latest/api/token", "/latest/meta-data", NO_CREDENTIALS]
            .iter()
            .any(|c| text.contains(c))
        {
            return Self::NoCredentials { bucket };
        }
        // A HEAD's answer has no body to tell it from a missing object.
        if code(&text) == Some("NoSuchBucket") {
            return Self::NoBucket { bucket };
        }
        // A listing's errors are of no kind of their own.
        let refused = ["status code: 403", "status code: 401"].iter().any(|s| text.contains(s));
        match error {
            object_store::Error::NotFound { .. } => Self::NotFound { bucket, key },
            object_store::Error::PermissionDenied { .. }
            | object_store::Error::Unauthenticated { .. } => {
                Self::Denied { bucket, key, reason: said(&text) }
            }
            object_store::Error::Generic { .. } if refused => {
                Self::Denied { bucket, key, reason: said(&text) }
            }
            other => Self::Store(other),
        }
    }

    /// The word by which an S3 server names what went wrong, such as `SlowDown`.
    pub(crate) fn is_code(&self, word: &str) -> bool {
        matches!(self, Self::Store(error) if code(&chain(error)) == Some(word))
    }

    /// Whether the same request may succeed later without anything being changed by hand.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store(object_store::Error::Generic { store, source }) => {
                if *store != "LocalFileSystem" {
                    let text = chain(source.as_ref());
                    // What the request says is wrong stays wrong, but for what the way has done to it.
                    let refused = text.contains(STATUS_4XX) && !text.contains(" 408 ");
                    return !refused || code(&text).is_some_and(|code| DAMAGED.contains(&code));
                }
                // A directory that fails does so at once and for good, unless it is on a network.
                let kind = io_kind(source.as_ref());
                use io::ErrorKind::{Interrupted, StaleNetworkFileHandle, TimedOut, WouldBlock};
                matches!(kind, Some(Interrupted | TimedOut | WouldBlock | StaleNetworkFileHandle))
            }
            Self::WrongRange { .. } | Self::Url { transient: true, .. } => true,
            _ => false,
        }
    }
}

/// What a store without any credentials says.
pub(crate) const NO_CREDENTIALS: &str = "no credentials in the environment";

/// How `object_store` tells of an answer that refuses the request.
const STATUS_4XX: &str = "status code: 4";

/// What S3 calls a request that has come to harm on its way: the same one may be right the next time.
const DAMAGED: [&str; 5] =
    ["BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "RequestTimeout", "InvalidPart"];

/// The longest error text of a store that is passed on, in characters.
const SAID_MAX_CHARS: usize = 300;

/// An error and its causes, each once.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(error) = at {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        at = error.source();
    }
    text
}

/// What stands in an element of S3's XML.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    Some(rest.split_once(&format!("</{name}>"))?.0)
}

fn code(text: &str) -> Option<&str> {
    element(text, "Code")
}

/// What the store says, in a line. S3's XML also names the access key and what was signed: those stay here.
fn said(text: &str) -> String {
    let said = match (code(text), element(text, "Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code.to_string(),
        (None, _) => {
            let plain = text.split_once("<?xml").map_or(text, |(before, _)| before);
            plain.rsplit_once("status code: ").map_or(plain, |(_, status)| status).into()
        }
    };
    let words: Vec<_> = said.split_whitespace().collect();
    let line = words.join(" ");
    line.trim_end_matches([':', '.']).chars().take(SAID_MAX_CHARS).collect()
}

/// A store's error in a line: what was asked, and what it says.
fn one_line(error: &object_store::Error) -> String {
    let text = chain(error);
    let asked = text.split_once("Error performing ").and_then(|(_, rest)| rest.split_once(" in "));
    match asked {
        Some((asked, _)) => format!("{asked}: {}", said(&text)),
        None => said(&text),
    }
}

/// The kind of the I/O error at the bottom of a chain, when there is one.
fn io_kind(error: &(dyn std::error::Error + 'static)) -> Option<io::ErrorKind> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        at = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_store_says_becomes_a_line_without_secrets() {
        let xml = "Error performing PUT http://s3/b/k in 1.2s, after 4 retries, max_retries: 4, \
                   retry_timeout: 60s  - Server returned non-2xx status code: 503 Service Unavailable: \
                   <?xml version=\"1.0\"?>\n<Error>\n<Code>SlowDown</Code>\n<Message>Please reduce\n your rate.\
                   </Message><AWSAccessKeyId>AKIASECRET</AWSAccessKeyId></Error>";
        let generic =
            |text: &str| object_store::Error::Generic { store: "S3", source: text.into() };
        let error = OriginError::of_store("s3://b", "k", generic(xml));
        assert_eq!(error.to_string(), "PUT http://s3/b/k: SlowDown: Please reduce your rate");
        assert!(error.is_transient() && error.is_code("SlowDown"));
        let refused = xml.replace("503 Service Unavailable", "400 Bad Request");
        assert!(!OriginError::Store(generic(&refused)).is_transient());
        assert!(
            OriginError::Store(generic(&refused.replace("SlowDown", "BadDigest"))).is_transient()
        );
        let denied = object_store::Error::PermissionDenied { path: "k".into(), source: xml.into() };
        let denied = OriginError::of_store("s3://b", "k", denied).to_string();
        assert!(denied.contains("SlowDown") && !denied.contains("AKIASECRET"), "{denied}");
        let head = "Server returned non-2xx status code: 403 Forbidden: ";
        assert_eq!(said(head), "403 Forbidden");
        let missing = |code: &str| object_store::Error::NotFound {
            path: "k".into(),
            source: format!("x: <Code>{code}</Code>").into(),
        };
        let no_bucket = OriginError::of_store("s3://b", "k", missing("NoSuchBucket"));
        assert!(matches!(no_bucket, OriginError::NoBucket { .. }), "{no_bucket}");
        let no_key = OriginError::of_store("s3://b", "k", missing("NoSuchKey"));
        assert!(matches!(no_key, OriginError::NotFound { .. }), "{no_key}");
    }
}
