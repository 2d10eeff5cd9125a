//! The states that people see, with the names that they see.

use alloc::{format, string::String};
use core::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

macro_rules! states {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $text)] $variant),+
        }

        impl $name {
            /// All states, in the order of their life.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The state's name, as in the database, the API and the metrics.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(format!("'{text}' is not one of {}", [$($text),+].join(", "))),
                }
            }
        }
    };
}

states!(
    /// A build job's state.
    JobStatus {
        /// Waits for a worker.
        Queued = "QUEUED",
        /// A worker holds its lease.
        Running = "RUNNING",
        /// Built, verified and stored whole in the main bucket.
        Succeeded = "SUCCEEDED",
        /// Ended without an artifact; the reason says why.
        Failed = "FAILED",
        /// Ended by an operator.
        Cancelled = "CANCELLED",
    }
);

impl JobStatus {
    /// Whether it never changes again.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

states!(
    /// Which jobs are taken first; within a priority the oldest is.
    #[derive(Default)]
    Priority {
        /// Before all: what ends an outage.
        Urgent = "urgent",
        /// Before the ordinary.
        High = "high",
        /// The ordinary.
        #[default]
        Normal = "normal",
        /// What can wait.
        Low = "low",
    }
);

impl Priority {
    /// Its place among [`Priority::ALL`]: 0 is taken first.
    #[must_use]
    pub fn rank(self) -> u8 {
        self as u8
    }

    /// The priority of a rank.
    #[must_use]
    pub fn of_rank(rank: u8) -> Option<Self> {
        Self::ALL.get(usize::from(rank)).copied()
    }
}

states!(
    /// What a token's holder may do, from the least to the most; each may do what those before it may.
    TokenRole {
        /// Looks.
        Viewer = "viewer",
        /// Builds, publishes, deploys and goes back.
        Deployer = "deployer",
        /// Sets apps, takes workers and regions out of service, makes tokens, reads the audit log.
        Admin = "admin",
    }
);

states!(
    /// What a worker does.
    WorkerState {
        /// Waits for a job.
        Idle = "IDLE",
        /// Works on a job.
        Busy = "BUSY",
        /// Finishes what it has, and takes nothing more.
        Draining = "DRAINING",
        /// Has finished, and takes nothing more.
        Drained = "DRAINED",
        /// Was not heard of for a while.
        Gone = "GONE",
    }
);

states!(
    /// The state of an artifact's copy in one region's bucket.
    ReplicationStatus {
        /// Not begun.
        Pending = "PENDING",
        /// Under way.
        Copying = "COPYING",
        /// All there, and verified.
        Complete = "COMPLETE",
        /// Given up for now; tried again later.
        Failed = "FAILED",
    }
);

states!(
    /// A rollout's state; it always ends in one of the last four.
    RolloutStatus {
        /// Under way.
        Running = "RUNNING",
        /// Held by an operator or by its failure limit.
        Paused = "PAUSED",
        /// Every machine that it is for has the build active, within the failure limit.
        Succeeded = "SUCCEEDED",
        /// Too many machines failed or never reported by the deadline.
        Failed = "FAILED",
        /// Ended by an operator.
        Cancelled = "CANCELLED",
        /// A newer goal of the same app took its place.
        Superseded = "SUPERSEDED",
    }
);

impl RolloutStatus {
    /// Whether it never changes again.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        !matches!(self, Self::Running | Self::Paused)
    }
}

states!(
    /// What a machine does about one app's goal.
    MachineState {
        /// Knows the goal and waits (for room, for its turn, for a first peer).
        Waiting = "WAITING",
        /// Fetches pieces.
        Fetching = "FETCHING",
        /// Has the whole artifact, verified and synced; waits for its wave.
        Verified = "VERIFIED",
        /// Switches over, starts, checks.
        Activating = "ACTIVATING",
        /// Runs it: success.
        Active = "ACTIVE",
        /// Could not fetch or activate it: failure.
        Failed = "FAILED",
        /// Could not activate it and runs again what it ran before: failure.
        RolledBack = "ROLLED_BACK",
        /// Did not report by the deadline: failure. Never reported by a machine itself.
        Unreachable = "UNREACHABLE",
    }
);

impl MachineState {
    /// Whether it is the good end.
    #[must_use]
    pub fn is_success(self) -> bool {
        self == Self::Active
    }

    /// Whether it is one of the bad ends.
    #[must_use]
    pub fn is_failure(self) -> bool {
        matches!(self, Self::Failed | Self::RolledBack | Self::Unreachable)
    }
}
