//! What every process of Shoal does alike: its configuration from file and flags ([`load_config`]), its
//! identity ([`load_identity`]), its place in the cluster while it runs ([`Membership`]) and how that comes to newer trust
//! ([`CatchUp`]), its log ([`init_tracing`]), its end ([`shutdown`]), its metrics ([`Meters`])
//! and their page ([`serve_metrics`]), HTTPS with mutual TLS ([`serve_https`]), and how it says that it is ready
//! ([`announce`]). And how it holds its memory ([`keep_freed_memory`]) and its threads ([`hold_spare_threads`]).

mod catch_up;
mod config;
mod files;
mod guard;
mod guests;
mod https;
mod logging;
mod membership;
mod memory;
mod metrics;
mod renewal;
mod roots;
mod threads;

pub use catch_up::CatchUp;
pub use config::{WrongConfig, load_config};
pub use files::{announce, load_identity, write_atomic};
pub use https::{Caller, serve_https, serve_metrics};
pub use logging::{LogFormat, init_tracing, shutdown};
pub use membership::{Membership, Taken};
pub use memory::keep_freed_memory;
pub use metrics::Meters;
pub use renewal::keep_renewed;
pub use roots::public_tls;
pub use threads::hold_spare_threads;
