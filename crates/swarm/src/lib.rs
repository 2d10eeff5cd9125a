//! The swarm policy of one machine: which piece it fetches from which neighbour, what it reads from the
//! region's bucket, whom it serves, and what it tells its neighbours.
//!
//! The crate decides and does nothing. It has no sockets, files, clock, threads or random source of
//! its own. A driver says what happened, [`Swarm::handle`]`(now, `[`Event`]`)`, then does what it is told,
//! [`Swarm::poll_action`], and comes back with [`Event::Timeout`] at [`Swarm::next_timeout`]. The agent
//! drives it with real connections and files; `shoal-sim` drives the very same type on virtual
//! ones. One seed and one sequence of events give one sequence of actions: maps are ordered, hashes fixed.
//!
//! # The policy
//!
//! One [`Swarm`] is one machine with all its artifacts. Each piece of a fetch is in exactly one
//! [`PieceState`], and these rules move it:
//!
//! - **Asking peers** (`pick`). The rarest missing piece of a random sample, an even choice among equals;
//!   from a neighbour of our zone, the one that will have it here soonest. At most two requests to a peer, where there are few:
//!   one hides the other's round trip, more only load seeds. Where there are five or more each has one: many senders
//!   fill a line more evenly than few. Higher priorities first, and while such a fetch gains a lesser one has
//!   one piece on its way; among equal ones the fetch that got the fewest bytes since it began, counted from where the
//!   others were then, with what is on its way.
//! - **Across zones** (`pick`). What no neighbour of our zone has falls to few machines of the zone, by a hash of
//!   machine and piece: to about one at the start, to more the further the fetch is, to twice as many for its last
//!   pieces, and to ever more while nothing comes in. So each piece enters a zone about once, and none stays out.
//! - **Never waiting on one peer.** A request has a deadline from the piece times measured so far; a late
//!   one is joined by a second peer, and both go on. When nothing is left to ask for, slow requests are
//!   joined too (the endgame). The first to arrive wins, the other is cancelled. Peers that fail rest for a growing,
//!   jittered while; three corrupt pieces are a ban. One that answers nothing (a request was given up, or the first ones are
//!   late) is asked last, and what it says it holds keeps nobody from leasing it.
//! - **Serving** (`uploads`). Eight slots (two for who begins), no queue, and BUSY at once beyond them. Who has a free slot
//!   offers it: first to those that it turned away, then, while fewer than six are in use, in turn to neighbours that lack
//!   something. A machine asks for as many pieces as others serve, and takes offers for few more, so all lines carry about
//!   as many. A seed with no other around gives a piece to nobody else until all can know who has it: they choose at
//!   random, and know nothing of each other's choice. What it gave before it gives again when nobody asks for anything
//!   else, one at a time: neighbours have it too, and where all share two cores a seed is ready sooner than they. Who holds
//!   its first piece only is not asked but offers it: all its neighbours would ask at once. An upload that does not get on
//!   while others do takes no slot any more: who asks and does not read holds up nobody.
//! - **Telling** (`tell`). New pieces go out in batches, to neighbours that lack any of them: the first and the last ones at
//!   once, those in between after up to four piece times; everything again now and then. A machine that is told of
//!   a joiner for the first time answers with what it holds.
//! - **The bucket** (`origin`). Some machines ([`may_lease`]) ask for leases on pieces that no neighbour has; the
//!   region processes ([`lease_owners`]) give each out once by a [`LeaseBook`], few at first and in turns, so that the
//!   first pieces are whole soon and multiply from many machines. Where none answers, hashes
//!   and a threshold that grows while nothing comes in let a few machines read what no neighbour has, and in the
//!   end all. What a neighbour has is read only when none gave anything for two minutes.
//!
//! # What each rule is worth
//!
//! `shoal-sim`, 10 GB in pieces of 16 MiB at 10 Gbit/s, seed 1; efficiency is the fluid bound by the last machine's
//! time. Each row was measured against the policy as it then was.
//!
//! | rule | machines | without | with |
//! |---|---|---|---|
//! | a queue of 2 instead of 8 (and BUSY rests by the piece's time) | 300 | 0.862 | 0.927 |
//! | BUSY rests that end with a piece's time, not at 2 s: the last machine | 300 | 9.48 s | 8.63 s |
//! | leases in a growing window and in turns, not all at once | 300 | 0.927 | 0.961 |
//! | eight requests instead of six / seven | 1,000 | 0.924 / 0.945 | 0.952 |
//! | four slots instead of two / one, before the short queue | 300 | 0.81 / 0.66 | 0.86 |
//! | news after half a piece's time, not after 90 ms | 1,000 | 0.933 | 0.952 |
//! | slots that are offered, and eight without a queue | 1,000 | 0.952 | 0.961 |
//! | the same: messages a transfer | 1,000 | 25 | 9 |
//! | the same at 1 Gbit/s | 600 | 0.933 | 0.970 |
//! | news that waits the longer the more there is to do: HAVE messages a transfer | 1,000 | 15.8 | 4.4 |
//! | first news at once, and two slots for who begins: all lines are busy after | 1,000 | 0.44 s | 0.35 s |
//! | not asking who begins, and no more than 24 at once: events until 0.4 s | 8,000 | 18 M | 8.5 M |
//! | calling for neighbours only when those that are connected had time to join: memory in all | 1,000 | 42 MB | 21 MB |
//! | the same: events a transfer | 1,000 | 20.4 | 16.9 |
//! | the same: efficiency | 1,000 | 0.952 | 0.958 |
//! | looking at 32 missing pieces instead of 256, four seeds: efficiency | 1,000 | 0.9574 | 0.9581 |
//! | the rule on zones (three of them): copies that enter each zone | 1,000 | 13.3 | 1.5 |
//! | the same: efficiency | 1,000 | 0.950 | 0.952 |
//! | turns by bytes, not by requests, where pieces are unlike: the worst artifact of ten by its fair bound | 250 | 2.97 | 1.23 |
//! | more machines fetch from other zones by the square of what is held, not by what is held: copies that entered each zone | 2,000 | 1.64 | 1.34 |
//! | to 9 machines of a large zone in the end, not to 16: copies that entered each zone | 2,000 / 24,000 | 1.36 / 1.70 | 1.17 / 1.41 |
//! | to 8.5, not to 9 (7.5 added to the first one, not 8): copies that entered each zone | 100,000 | 2.02 | 1.93 |
//! | the same: efficiency | 100,000 | 0.929 | 0.920 |
//! | but to all of a small zone, of which some lie and some die: copies read from the bucket, mean of 60 seeds | 50 | 1.72 | 1.44 |
//! | a fetch stalls after 16 pieces' time, not 4 (three zones): copies that entered each zone after 3 s | 12,000 | 4.99 | 1.58 |
//! | a lone seed gives a piece to one neighbour at a time (one seed with a slow line, 256 pieces, `tests/lone_seed.rs`): copies it sent | 9 | 1.14 | 1.01 |
//! | the same until a quarter of its neighbours hold all, not until the first does (real agents on one machine, 1 GiB): copies it sent | 9 | 1.20 | 1.16 |
//! | nor anything again while it is asked for what nobody was given (the same agents, another hour): copies it sent | 9 | 1.34 | 1.23 |
//! | the same: CPU seconds a GB | 9 | 3.20 | 2.94 |
//! | one piece on its way while a more urgent fetch gains (24 MB beside 80 MB at 16 Mbit/s): the urgent one's last machine | 3 | 16.1 s | 13.9 s |
//! | one request to each of five neighbours or more, not two (three zones) | 8,000 | 0.938 | 0.950 |
//! | the same, real agents behind lines of 15 MB/s, 1 GiB, Ethernet's packets: the share of the line | 9 | 0.81 | 0.89 |
//! | no slot is offered while six are in use, pieces of 4 MiB: efficiency | 10,000 | 0.977 | 0.985 |
//! | the same: events a transfer | 10,000 | 11.0 | 9.4 |
//! | the same, pieces of 16 MiB: efficiency | 8,000 | 0.948 | 0.953 |
//! | twice as many machines fetch the last 64th of the pieces from other zones (three zones, pieces of 4 MiB) | 2,000 | 0.926 | 0.981 |
//! | what neighbours hold is not read without leases: copies read (`faults.toml`) | 1,000 | 3.44 | 1.02 |
//! | the threshold waits for our own reads, and for a bucket that fails: copies read (none of the region processes lives, 2 GB at 100 Mbit/s) | 300 | 36.9 | 8.3 |
//! | the same: the last machine | 300 | 596 s | 227 s |
//!
//! What follows: a fetch ends as long as the bucket or the peers together have every piece, whichever
//! region processes live; a machine that has everything goes on serving; and everything held in memory is
//! bounded by [`Config`] and the artifact's number of pieces (a bit for each piece and neighbour while it
//! fetches, nothing of that afterwards).
//!
//! # What the driver must keep to
//!
//! - A new [`PeerKey`] for each connection, a new [`UploadId`] for each question. Unknown and stale handles are
//!   ignored.
//! - [`Event::FetchEnded`] for each [`Action::Fetch`] that was not cancelled, and whose connection stands;
//!   [`Event::OriginEnded`] for each piece of an [`Action::FetchOrigin`]; one lease event for each
//!   [`Action::AskLease`]; [`Event::UploadEnded`] for each [`Action::Serve`] whose connection stands. Requests have time limits here,
//!   reads of the bucket and lease questions need theirs in the driver.
//! - "Verified" means verified and written. The policy believes it.
//! - A ban outlives the handle: the driver keeps it by the machine's identity.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod config;
mod event;
mod hash;
mod lease;
mod prefetch;
mod swarm;
mod time;

pub use config::Config;
pub use event::{Action, Event, Outcome, PeerKey, Purpose, RequestId, SwarmKey, UploadId};
pub use hash::{LEASERS_AIM, lease_owners, machine_hash, may_lease};
pub use lease::{
    HELD_SETTLES, LEASE_DURATION, LEASE_RETRY_MAX, LEASE_RETRY_MIN, LeaseAnswer, LeaseBook,
};
pub use prefetch::{prefetch, prefetch_all};
pub use swarm::{Load, PieceState, Progress, Swarm, Upcoming};
pub use time::Time;
