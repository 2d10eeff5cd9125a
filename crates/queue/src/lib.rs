//! The coordinator's database: the job queue, and all that is recorded beside it.
//!
//! One [`Queue`] holds the connections. What it keeps, a module each:
//!
//! - **apps**, whose definition is their owner's JSON;
//! - **jobs** and their **attempts**: [`Queue::submit`] puts one at the end of its priority, or joins the one that builds
//!   the same commit; [`Queue::claim`] takes the first, [`Queue::heartbeat`] keeps it, [`Queue::finish`] ends it. Every
//!   transition is compare-and-set on (job, attempt, lease): whoever was declared dead changes nothing any more. What
//!   fails again and again waits longer each time ([`Backoff`]) until [`Queue::release_due`];
//! - **workers**: the newest process of a name has it ([`Queue::worker_seen`]); one that is drained, or all of them while the
//!   queue is paused, take nothing;
//! - the **reaper**: [`Watch`] finds jobs whose heartbeat stands still, [`ReapLimit`] says how many of them are believed
//!   at once, [`Queue::reap`] gives them on in their old place, or fails them after their last attempt;
//! - **artifacts** and their **replication**: copies to be made are taken by one coordinator at a time
//!   ([`Queue::take_copy`]);
//! - their **inspection** for as long as they live ([`Queue::next_inspection`]), and their **retention**: which stay
//!   ([`Queue::retain`]), and the removal of the others' objects, which never meets an upload of the same
//!   ([`Queue::take_removals`]);
//! - **goals** and **rollouts**: [`Queue::set_goal`] gives the next revision, has it signed, starts its rollout,
//!   ends the one before and writes the audit row in one transaction, or does none of it; a goal store outside of the
//!   database is told from an **outbox** that is part of it ([`Queue::outbox`]);
//! - **regions** and **machines**: [`Queue::keep_reports`] takes a region's batch whole, and an older
//!   report never replaces a newer one;
//! - **tokens** of the API, as hashes; **requests** that may come again, and what each has made;
//! - **events**: what happened is written in the change's transaction without a number ([`Queue::number_events`] gives
//!   that, so that no claim waits for another one), and read by a cursor ([`Queue::events_after`]);
//! - **trust**: the numbered bundles ([`Queue::change_trust`], [`Queue::revoke`]), who has which key, and the tokens by which
//!   new machines **join** ([`Queue::use_join_token`]);
//! - the **audit** log: a row for each change, in the change's transaction.
//!
//! What belongs together is one transaction, and what is acknowledged is on the disk: a job's end with its
//! artifact and its copies, a revision with its goal and rollout. Time is passed in (`now_ms`,
//! milliseconds since the Unix epoch), and so are random leases.
//!
//! The queries are the SQL that SQLite and PostgreSQL share, over sqlx's `Any`; what differs is in one
//! small module, `dialect`. On SQLite there is one writing connection and a few that read: writers queue in memory,
//! readers never wait for them, heartbeats share commits, and no caller meets a locked database. On PostgreSQL several
//! coordinators share the database: rows that are to be changed are locked, waiting jobs that another one is taking
//! are passed by, a [`Duty`] says who does what only one shall do, and a [`Bell`] wakes those who wait elsewhere. The
//! tests in `tests/` are functions over a database's URL: both kinds run the same suite.

mod apps;
mod artifacts;
mod audit;
mod auto_deploy;
mod backoff;
mod beats;
mod bells;
mod claim;
mod db;
mod dialect;
mod duty;
mod error;
mod events;
mod finish;
mod goals;
mod hand;
mod history;
mod inspect;
mod jobs;
mod join;
mod machines;
mod outbox;
mod pages;
mod pushes;
mod reaper;
mod regions;
mod removal;
mod replication;
mod requests;
mod retention;
mod rollouts;
mod standing;
mod submit;
mod tokens;
mod trust;
mod unreachable;
mod waiting;
mod waves;
mod webhooks;
mod workers;

pub use apps::AppRow;
pub use artifacts::{Artifact, Copy, Deleted, Origin, Stored};
pub use audit::{Actor, AuditFilter, AuditRow};
pub use auto_deploy::{AutoDeploy, Suspension, Upcoming};
pub use backoff::Backoff;
pub use bells::Bell;
pub use db::Queue;
pub use dialect::sqlite_url;
pub use duty::Duty;
pub use error::{QueueError, Result};
pub use events::{Event, EventFilter, EventKind};
pub use finish::End;
pub use goals::{Choice, GOALS_MAX, GoalDraft, GoalsAfter, SealedGoal};
pub use history::HistoryRow;
pub use inspect::{Damaged, Inspection};
pub use jobs::{Attempt, Claimant, Job, Lease, REASON_MAX_BYTES};
pub use join::{JOIN_TOKENS_MAX, JoinGrant, JoinToken};
pub use machines::{Machine, MachineCursor, MachineLabels, MachineNumbers, MachineSeen, StateSeen};
pub use outbox::{OutboxDepth, OutboxGoal, StoreDifference};
pub use pages::Reports;
pub use pushes::{Push, PushSource, Taken};
pub use reaper::{Lost, ReapLimit, Watch};
pub use regions::Region;
pub use removal::Removal;
pub use replication::{CopyJob, CopyProgress, RegionCopies};
pub use requests::{Known, REQUESTS_MAX};
pub use retention::{Kept, Pin, Plan};
pub use rollouts::{Progress, RegionProgress, Rollout, Targets};
pub use standing::Standing;
pub use submit::{Ask, Submitted};
pub use tokens::{NewToken, TOKENS_MAX, Token};
pub use trust::{MemberSeen, TrustChange, TrustRow};
pub use unreachable::place;
pub use waiting::{Depth, Pause, Waiting};
pub use waves::WaveSeen;
pub use webhooks::{Attempted, Delivery, DeliveryStatus, Due, NewWebhook, Webhook};
pub use workers::{Drain, Worker};
