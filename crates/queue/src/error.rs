//! Why a call on the database failed.

use shoal_proto::{AppName, EncodingId};

/// Why a call on the database failed.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// What was named is not there.
    #[error("{0}")]
    NotFound(String),
    /// It is there, in a state that does not allow the call.
    #[error("{0}")]
    Conflict(String),
    /// The caller does not hold the job: it was given to another, was ended, or never was the caller's.
    #[error("job {job} is not held by this attempt and lease: stop working on it")]
    LeaseLost {
        /// The job.
        job: i64,
    },
    /// The artifact is not whole in every region that is in service, or was deleted.
    #[error("{name} cannot be deployed: {reason}")]
    NotDeployable {
        /// The artifact's name.
        name: String,
        /// Why, in words.
        reason: String,
    },
    /// The objects of an encoding were removed, or are being removed, though its upload found some of them there.
    #[error("the objects of encoding {0} were being removed at this moment: upload it again")]
    ObjectsGone(EncodingId),
    /// What was noted of a request that may come again is gone: the server failed right then, or forgot it. Nothing was done.
    #[error("the request was given up on its way: send it again")]
    Forgotten,
    /// The caller's step inside a transaction failed, such as signing a goal.
    #[error("{0}")]
    Refused(String),
    /// A row holds what this release cannot read.
    #[error("the database holds something that this release cannot read: {0}")]
    Corrupt(String),
    /// The address of the database is of no kind that is supported.
    #[error("'{0}' is not a database: write sqlite:///PATH or postgres://USER@HOST/DATABASE")]
    Address(String),
    /// The server cannot be reached, or does not let this process in.
    #[error("the database at {at} cannot be used: {reason}")]
    Unusable {
        /// Host, port and database, or socket and database.
        at: String,
        /// Why, in words.
        reason: String,
    },
    /// The database failed or cannot be reached.
    #[error("the database does not answer: {0}")]
    Database(#[from] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("the database's schema cannot be brought up to date: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
}

impl QueueError {
    pub(crate) fn no_app(app: &AppName) -> Self {
        Self::NotFound(format!("no app '{app}': register it with: shoal app set {app}"))
    }

    pub(crate) fn no_job(job: i64) -> Self {
        Self::NotFound(format!("no job {job}: shoal jobs lists them"))
    }

    pub(crate) fn no_worker(worker: &str) -> Self {
        Self::NotFound(format!("no worker '{worker}': shoal workers lists them"))
    }

    pub(crate) fn no_artifact(reference: &str) -> Self {
        let short: String = reference.chars().take(100).collect();
        Self::NotFound(format!(
            "no artifact '{short}': give a name such as APP/SHA12-JOB or an id of 64 hex digits; shoal artifacts lists them"
        ))
    }

    pub(crate) fn no_rollout(rollout: i64) -> Self {
        Self::NotFound(format!("no rollout {rollout}: shoal status shows them"))
    }
}

/// The result of a call on the database.
pub type Result<T> = std::result::Result<T, QueueError>;
