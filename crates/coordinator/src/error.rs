//! How the API says no: a status, a fixed word, and one line that says what to do.

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use shoal_client::types::{ErrorBody, ErrorDetail};
use shoal_origin::OriginError;
use shoal_queue::QueueError;

/// A refusal.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

pub(crate) type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        // One line, whatever the cause's text looks like.
        let message = message.into().replace(['\n', '\r'], " ");
        Self { status, code, message }
    }

    /// The request is wrong by itself.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", message)
    }

    /// It does not fit what is there.
    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", message)
    }

    /// Its objects are not all in the main bucket: who has them uploads them again.
    pub(crate) fn not_whole(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "not_whole", message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    pub(crate) fn too_long(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_long", message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }
}

impl From<QueueError> for ApiError {
    fn from(error: QueueError) -> Self {
        let message = error.to_string();
        match error {
            QueueError::NotFound(_) => Self::not_found(message),
            QueueError::Conflict(_) => Self::conflict(message),
            QueueError::LeaseLost { .. } => Self::new(StatusCode::CONFLICT, "lease_lost", message),
            QueueError::NotDeployable { .. } => {
                Self::new(StatusCode::CONFLICT, "not_deployable", message)
            }
            QueueError::ObjectsGone(_) => Self::not_whole(message),
            QueueError::Refused(_) => Self::invalid(message),
            QueueError::Corrupt(_) | QueueError::Address(_) | QueueError::Migrate(_) => {
                tracing::error!(%message, "a call on the database failed");
                Self::internal(message)
            }
            QueueError::Forgotten => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message)
            }
            QueueError::Database(_) | QueueError::Unusable { .. } => {
                tracing::warn!(%message, "a call on the database failed");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message)
            }
        }
    }
}

impl From<OriginError> for ApiError {
    fn from(error: OriginError) -> Self {
        let message = error.to_string();
        match error {
            OriginError::Mismatch { .. } | OriginError::Index { .. } => Self::invalid(message),
            OriginError::TooLong { .. } => Self::too_long(message),
            OriginError::Incomplete { .. } | OriginError::Sealed { .. } => Self::conflict(message),
            OriginError::NotFound { .. } => Self::not_found(message),
            OriginError::Stalled { .. } | OriginError::Stream { .. } => {
                Self::new(StatusCode::REQUEST_TIMEOUT, "incomplete_body", message)
            }
            _ => {
                tracing::warn!(%message, "the main bucket failed");
                let message = format!("the main bucket failed: {message}");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message)
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let error = ErrorDetail { code: self.code.into(), message: self.message };
        (self.status, Json(ErrorBody { error })).into_response()
    }
}
