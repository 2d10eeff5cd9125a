//! Whole swarms in memory: they finish, whatever dies, and the bucket is read about once.
#![allow(clippy::unwrap_used)]

mod net;

use net::{Net, SWARM, Setup, millis, secs};
use shoal_proto::Bitmap;
use shoal_swarm::{Purpose, SwarmKey};

#[test]
fn one_seed_serves_little_more_than_one_copy_to_eight_leechers() {
    for seed in 0..5 {
        let mut setup = Setup::new(9, 256, seed);
        setup.regions = 0;
        let mut net = Net::new(setup);
        net.put(0, SWARM, Bitmap::full(256));
        net.start(millis(0), 0, SWARM, Purpose::Seed);
        for machine in 1..9 {
            let purpose =
                Purpose::Fetch { priority: 0, piece_bytes: 1 << 20, may_lease: false, fleet: 8 };
            net.start(millis(1), machine, SWARM, purpose);
        }
        net.run(secs(60));
        let copies = f64::from(net.uploaded(0)) / 256.0;
        println!("seed {seed}: {copies:.2} copies, {}", net.now);
        assert!(copies <= 1.3, "the seed served {copies} copies");
        // 256 pieces of 20 ms over one line: nothing beats 5.12 s.
        assert!(net.now < secs(8), "took {}", net.now);
    }
}

#[test]
fn fifty_machines_finish_and_read_the_bucket_once() {
    for seed in 0..2 {
        let mut setup = Setup::new(50, 200, seed);
        setup.zones = 3;
        let mut net = Net::new(setup);
        net.everybody_fetches();
        net.run(secs(60));
        println!("seed {seed}: {} in {}, {} events", net.origin_copies(), net.now, net.events);
        assert!(net.origin_copies() <= 1.1, "seed {seed}: {} copies", net.origin_copies());
        assert!(net.now < secs(12), "4 s is the bound, took {}", net.now);
    }
}

#[test]
fn small_fleets_finish_and_read_the_bucket_once() {
    for (machines, pieces) in [(1, 1), (1, 40), (2, 3), (4, 64), (8, 100)] {
        for seed in 0..4 {
            let mut net = Net::new(Setup::new(machines, pieces, seed));
            net.everybody_fetches();
            net.run(secs(60));
            let copies = net.origin_copies();
            assert!(copies <= 1.1, "{machines} machines, {pieces} pieces: {copies} copies");
        }
    }
}

#[test]
fn everything_goes_wrong_and_everybody_finishes() {
    for seed in 0..3 {
        let mut setup = Setup::new(50, 120, seed);
        setup.zones = 3;
        setup.loss = 0.02;
        let mut net = Net::new(setup);
        net.everybody_fetches();
        for machine in [7, 19, 31] {
            net.corrupts(machine);
        }
        for machine in 20..30 {
            let at = machine as u64 * 90;
            net.dies(millis(at), machine);
            if machine % 2 == 0 {
                net.reborn(millis(at + 1_500), machine);
            }
        }
        net.region_dies(millis(400), 0);
        net.run(secs(300));
        println!("seed {seed}: {} copies in {}", net.origin_copies(), net.now);
        assert!(net.origin_copies() <= 2.0, "seed {seed}: {} copies", net.origin_copies());
    }
}

#[test]
fn one_of_two_region_processes_dies() {
    for seed in 0..2 {
        let mut net = Net::new(Setup::new(50, 200, seed));
        net.everybody_fetches();
        net.region_dies(millis(300), (seed % 2) as usize);
        net.run(secs(60));
        println!("seed {seed}: {} copies in {}", net.origin_copies(), net.now);
        assert!(net.origin_copies() <= 1.6, "seed {seed}: {} copies", net.origin_copies());
    }
}

#[test]
fn all_region_processes_die() {
    // From the start, with the first pieces out, and in the middle of it.
    for (seed, at) in [(0, 0), (2, 8), (3, 12), (4, 500)] {
        let mut setup = Setup::new(50, 120, seed);
        // Few pieces are leased at a time, so that in the middle many are not.
        setup.config.leased_max = 1;
        let mut net = Net::new(setup);
        net.region_dies(millis(at), 0);
        net.region_dies(millis(at), 1);
        net.everybody_fetches();
        net.run(secs(180));
        println!("at {at} ms: {} copies in {}", net.origin_copies(), net.now);
        assert!(net.origin_copies() <= 2.0, "at {at} ms: {} copies", net.origin_copies());
        // Over 40 seeds: 4.8 in the mean, 9 at most.
        assert!(net.origin_most() <= 10, "one piece was read {} times", net.origin_most());
    }
}

#[test]
fn a_fleet_without_leasers_falls_back() {
    // The goal said 100,000 machines, and no region process lives: nobody may lease.
    let mut setup = Setup::new(5, 60, 1);
    setup.regions = 1;
    let mut net = Net::new(setup);
    net.region_dies(millis(0), 0);
    for machine in 0..5 {
        let purpose =
            Purpose::Fetch { priority: 0, piece_bytes: 1 << 20, may_lease: false, fleet: 100_000 };
        net.start(millis(1), machine, SWARM, purpose);
    }
    net.run(secs(600));
    assert!(net.origin_copies() <= 2.0, "{} copies", net.origin_copies());
}

#[test]
fn peers_finish_what_they_hold_together_without_region_and_bucket() {
    for seed in 0..4 {
        let mut setup = Setup::new(20, 90, seed);
        setup.regions = 0;
        setup.loss = 0.01;
        let mut net = Net::new(setup);
        for machine in 0..20 {
            let mut have = Bitmap::empty(90);
            (0..90).filter(|piece| piece % 20 == machine as u32).for_each(|piece| {
                have.insert(piece);
            });
            net.put(machine, SWARM, have);
            let purpose = net.fetch_purpose(machine, 0);
            net.start(millis(machine as u64), machine, SWARM, purpose);
        }
        net.run(secs(120));
    }
}

#[test]
fn the_bucket_dies_once_the_pieces_are_out() {
    let mut net = Net::new(Setup::new(30, 100, 3));
    net.everybody_fetches();
    net.run_until(secs(60), |net| net.origin_pieces >= 100);
    let now = net.now;
    net.bucket_dies(now + std::time::Duration::from_millis(300));
    net.region_dies(now, 0);
    net.region_dies(now, 1);
    net.run(secs(120));
}

#[test]
fn a_piece_that_only_a_neighbour_has_right_is_found() {
    // The bucket's piece 5 is corrupt, one late machine has it right.
    let mut net = Net::new(Setup::new(6, 30, 4));
    net.spoilt.insert(5);
    net.everybody_fetches();
    let mut have = Bitmap::empty(30);
    have.insert(5);
    net.put(3, SWARM, have);
    net.run(secs(120));
}

#[test]
fn a_machine_that_lost_its_holder_reads_it_again() {
    // The only machine with the pieces dies after the lease book has them as held.
    let mut net = Net::new(Setup::new(12, 40, 8));
    let purpose = net.fetch_purpose(0, 0);
    net.start(millis(0), 0, SWARM, purpose);
    net.run_until(secs(30), |net| net.completed(0, SWARM).is_some());
    let now = net.now;
    net.dies(now, 0);
    for machine in 1..12 {
        let purpose = net.fetch_purpose(machine, 0);
        net.start(now + std::time::Duration::from_millis(10), machine, SWARM, purpose);
    }
    net.run(now + std::time::Duration::from_secs(300));
    assert!(net.origin_copies() <= 3.0, "{} copies", net.origin_copies());
}

#[test]
fn several_artifacts_share_by_priority() {
    let (high, low, other) = (SwarmKey(1), SwarmKey(2), SwarmKey(3));
    let mut net = Net::new(Setup::new(12, 120, 5));
    for machine in 0..12 {
        for (key, priority) in [(low, 1), (other, 1), (high, 9)] {
            let purpose = net.fetch_purpose(machine, priority);
            net.start(millis(machine as u64), machine, key, purpose);
        }
    }
    net.run(secs(120));
    let mean = |key| {
        (0..12).map(|machine| net.completed(machine, key).unwrap().0).sum::<u64>() / 12_000_000
    };
    let (high, low, other) = (mean(high), mean(low), mean(other));
    println!("high {high} ms, low {low} ms, other {other} ms");
    assert!(high * 3 < low * 2, "high took {high} ms, low {low} ms");
    assert!(low.abs_diff(other) * 5 < low, "equal ones took {low} and {other} ms");
}

#[test]
fn late_joiners_and_resumed_machines_cost_no_origin() {
    let mut net = Net::new(Setup::new(30, 100, 6));
    for machine in 0..20 {
        let purpose = net.fetch_purpose(machine, 0);
        net.start(millis(0), machine, SWARM, purpose);
    }
    for machine in 20..30 {
        let purpose = net.fetch_purpose(machine, 0);
        net.start(secs(10), machine, SWARM, purpose);
    }
    net.dies(millis(900), 4);
    net.reborn(millis(2_000), 4);
    net.run(secs(60));
    assert!(net.origin_copies() <= 1.2, "{} copies", net.origin_copies());
}

#[test]
fn one_seed_gives_one_run() {
    let run = |seed| {
        let mut setup = Setup::new(20, 60, seed);
        setup.loss = 0.01;
        let mut net = Net::new(setup);
        net.everybody_fetches();
        net.run(secs(120));
        (net.now, net.events, net.origin_pieces)
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
