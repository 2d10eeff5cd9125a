//! The JSON of the HTTP API. Times are milliseconds since the Unix epoch (`…_ms`) or seconds (`…_s`).

mod access;
mod artifacts;
mod builds;
mod copies;
mod events;
mod queue;
mod regions;
mod rollouts;
mod trust;
mod work;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use access::*;
pub use artifacts::*;
pub use builds::*;
pub use copies::*;
pub use events::*;
pub use queue::*;
pub use regions::*;
pub use rollouts::*;
pub use trust::*;
pub use work::*;

/// The body of every answer that is not 2xx.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong, for programs and for people.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ErrorDetail {
    /// A fixed word, such as `not_found`, `invalid`, `conflict`, `lease_lost`, `forbidden`.
    pub code: String,
    /// One line that says what to do.
    pub message: String,
}
