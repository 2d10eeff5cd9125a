//! Why a call on a goal store failed.

/// Why a call on a goal store failed.
#[derive(Debug, thiserror::Error)]
pub enum GoalsError {
    /// The address cannot be used, or a file that it names; says what to write.
    #[error("{0}")]
    Address(String),
    /// No endpoint answered in time.
    #[error(
        "etcd does not answer ({endpoint}: {reason}); is it running, and is the address right?"
    )]
    Unreachable {
        /// The last one tried, without user and password.
        endpoint: String,
        /// What happened.
        reason: String,
    },
    /// etcd understood the call and says no.
    #[error("etcd refuses: {message}")]
    Refused {
        /// etcd's reason.
        message: String,
    },
    /// An answer that is none of etcd's.
    #[error(
        "{endpoint} does not answer as etcd's JSON gateway does: {text}; etcd 3.4 or newer is needed, with \
         its gRPC gateway on (enable-grpc-gateway)"
    )]
    Unexpected {
        /// Who answered.
        endpoint: String,
        /// What came instead.
        text: String,
    },
    /// More keys than a cluster has apps.
    #[error("more than {most} keys lie under {prefix} in etcd: does something else write there?")]
    TooMany {
        /// How many are read.
        most: usize,
        /// What they begin with.
        prefix: String,
    },
    /// An embedded store's file could not be written.
    #[error("cannot keep a goal in {path}: {source}")]
    File {
        /// The file.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
}

impl GoalsError {
    /// Whether it has to do with this one goal rather than with the store: others may still be written.
    #[must_use]
    pub fn is_about_content(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// The result of a call on a goal store.
pub type Result<T> = std::result::Result<T, GoalsError>;
