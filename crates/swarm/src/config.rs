//! Every number that the policy uses, with its unit and its reason.

use core::time::Duration;

/// The policy's numbers. The defaults are what the agent and the simulator use.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Pieces that a machine asks for by itself at one time, over all swarms: as many as a peer serves, so that on
    /// average every place of the fleet is taken...
    pub requests_wanted: usize,
    /// ...but no more while so many peers have its requests, or answered BUSY and will offer a slot: at the start
    /// everybody lacks everything, and asking more of those few that hold something brings nothing...
    pub asks_max: usize,
    /// ...and those that may be on their way, with what it asked for because a peer offered a place. Hardly more: lines
    /// are shared evenly when all machines receive about as many pieces at once.
    pub requests_max: usize,
    /// Pieces that may be on their way from one peer. One to hide the round trip behind the other:
    /// more only loads seeds with what others could serve (measured 1.07 copies at 2, 1.89 at 32). Where a swarm has more
    /// neighbours than half of `requests_wanted` it is one from each: then others send meanwhile.
    pub requests_per_peer_max: u8,
    /// Uploads served at once; beyond it the answer is BUSY at once, so that the asker goes elsewhere. Many are served by
    /// ends that are shared by many: whatever one end is short of, the others make up for.
    pub upload_slots: usize,
    /// Uploads served at once by a machine that holds few pieces ([`Self::upload_start_pieces`]): then pieces multiply the
    /// sooner the sooner each is whole.
    pub upload_start_slots: usize,
    /// With this many pieces a machine serves all its slots.
    pub upload_start_pieces: u32,
    /// Uploads that a seed with no other around serves at once of pieces that it gave before: others can give those.
    pub repeats_max: usize,
    /// Uploads of one peer: what our own policy asks for, and as much again for requests that crossed with
    /// their cancelling.
    pub uploads_per_peer_max: usize,
    /// An upload takes no slot any more when it has lasted this many times as long as others, and one that began later is
    /// sent...
    pub upload_stuck_factor: u32,
    /// ...but always before this: below it lies the waiting for a disk or a round trip.
    pub upload_stuck_min: Duration,
    /// Uploads that take no slot, at most: they hold memory.
    pub uploads_stuck_max: usize,
    /// Neighbours that are told of a free slot when an upload ends...
    pub offers_max: usize,
    /// ...as long as fewer uploads than this are served. More fill a line no better, and who was turned away hears of the other
    /// slots too.
    pub offers_until: usize,
    /// Candidates looked at for one pick: the rarest of a random sample is as good as the rarest of
    /// all, and costs the same at 65,536 pieces as at 640.
    pub pick_scan: u32,

    /// When a request of a swarm without any measured piece time counts as late.
    pub late_first: Duration,
    /// A request is never late before this: below it lies scheduling noise.
    pub late_min: Duration,
    /// A request is always late after this.
    pub late_max: Duration,
    /// A request is given up after this many times its lateness...
    pub give_up_factor: u32,
    /// ...but not before this: a peer that is slow is better than none.
    pub give_up_min: Duration,
    /// ...and always after this: 16 MiB in it is 1.1 Mbit/s, below which a peer is no use.
    pub give_up_max: Duration,
    /// Requests that one piece may have at once: the late one and its replacement, in the endgame too.
    pub copies_per_piece_max: usize,

    /// Back-off after the first BUSY, doubled by each further one up to twice of what a piece takes, jittered: half of
    /// what a piece takes, and at least this. Whoever said BUSY offers a slot when it has one.
    pub busy_backoff_min: Duration,
    /// The longest back-off after BUSY.
    pub busy_backoff_max: Duration,
    /// Back-off after the first failed or given up request, doubled by each further one.
    pub failed_backoff_min: Duration,
    /// The longest back-off after failures.
    pub failed_backoff_max: Duration,
    /// Corrupt pieces after which a peer is banned: one can be a bad disk block, three are a habit.
    pub corrupt_max: u8,

    /// HAVE messages go out after this many pieces...
    pub have_batch: usize,
    /// ...or so many piece times after the first one as `tell` says, but not before this...
    pub have_delay_min: Duration,
    /// ...and not after this.
    pub have_delay_max: Duration,
    /// What we hold is told again in full this often to neighbours that are not complete: heals
    /// whatever was lost, for some bytes a second.
    pub reannounce: Duration,

    /// Neighbours to have in each swarm: 92-96 % of the optimum at 20-40 in an ideal model.
    pub neighbours_target: usize,
    /// Neighbours kept track of in each swarm, at most, and never more than 128; bounds memory. Others
    /// may still ask us.
    pub neighbours_max: usize,
    /// Peers kept track of in all, at most.
    pub peers_max: usize,
    /// A swarm that starts calls for more neighbours only after about this, if there are connections enough: those at
    /// their other ends need so long to say whether they take part.
    pub want_peers_first: Duration,
    /// First pause between two calls for more neighbours, doubled by each further one, jittered.
    pub want_peers_min: Duration,
    /// The longest pause between two calls for more neighbours.
    pub want_peers_max: Duration,
    /// The same for a swarm that is only served: often enough to be found again after the region
    /// processes were restarted, seldom enough with hundreds of artifacts on a machine.
    pub want_peers_seed: Duration,

    /// Lease questions that may be open, over all swarms.
    pub lease_asks_max: usize,
    /// Pieces leased and not yet read, over all swarms: enough to read on while the next lease is
    /// asked for, few enough that a machine that dies holds up little.
    pub leased_max: u32,
    /// Reads of the bucket at once, over all swarms.
    pub origin_reads_max: usize,
    /// Pieces in one read: one ranged request fetches them together.
    pub origin_read_pieces: u32,
    /// After this a piece that is being read from the bucket may be asked from peers as well.
    pub origin_late: Duration,
    /// Pause after a failed read of the bucket, doubled by each further one, jittered.
    pub origin_backoff_min: Duration,
    /// The longest pause after failed reads of the bucket.
    pub origin_backoff_max: Duration,
    /// After this a block that a region process called held is asked about again, if neighbours have
    /// still not got it: the holder may have died.
    pub all_held_recheck: Duration,
    /// Pause after a lease question that nobody answered, doubled by each further one, jittered.
    pub lease_failed_backoff_min: Duration,
    /// The longest pause after unanswered lease questions.
    pub lease_failed_backoff_max: Duration,

    /// A machine that asked for a lease in vain begins to read by itself after this long without
    /// progress: it knows that the region processes are silent.
    pub fallback_after_failed: Duration,
    /// Any other machine begins after this: the first pieces of a large, slow swarm need some time.
    pub fallback_after: Duration,
    /// Then the part of the pieces that it may read by itself doubles every time this passes without
    /// progress: slow enough that a piece read by one machine is heard of by the others before.
    pub fallback_step: Duration,
}

impl Default for Config {
    fn default() -> Self {
        let ms = Duration::from_millis;
        Self {
            requests_wanted: 8,
            asks_max: 24,
            requests_max: 10,
            requests_per_peer_max: 2,
            upload_slots: 8,
            upload_start_slots: 2,
            upload_start_pieces: 4,
            repeats_max: 1,
            uploads_per_peer_max: 4,
            upload_stuck_factor: 8,
            upload_stuck_min: ms(1_000),
            uploads_stuck_max: 24,
            offers_max: 2,
            offers_until: 6,
            pick_scan: 32,
            late_first: ms(5_000),
            late_min: ms(200),
            late_max: ms(30_000),
            give_up_factor: 4,
            give_up_min: ms(10_000),
            give_up_max: ms(120_000),
            copies_per_piece_max: 2,
            busy_backoff_min: ms(50),
            busy_backoff_max: ms(2_000),
            failed_backoff_min: ms(250),
            failed_backoff_max: ms(15_000),
            corrupt_max: 3,
            have_batch: 32,
            have_delay_min: ms(2),
            have_delay_max: ms(4_000),
            reannounce: ms(5_000),
            neighbours_target: 32,
            neighbours_max: 96,
            peers_max: 1_024,
            want_peers_first: ms(250),
            want_peers_min: ms(1_000),
            want_peers_max: ms(60_000),
            want_peers_seed: ms(600_000),
            lease_asks_max: 2,
            leased_max: 32,
            origin_reads_max: 2,
            origin_read_pieces: 2,
            origin_late: ms(20_000),
            origin_backoff_min: ms(500),
            origin_backoff_max: ms(30_000),
            all_held_recheck: ms(10_000),
            lease_failed_backoff_min: ms(1_000),
            lease_failed_backoff_max: ms(30_000),
            fallback_after_failed: ms(3_000),
            fallback_after: ms(30_000),
            fallback_step: ms(3_000),
        }
    }
}
