//! Who takes part in which swarm, so that machines can be told of each other.

use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use rand::RngExt as _;
use shoal_proto::{ArtifactId, NodeId, peer::PeerAddr};

/// A machine that has not announced itself for this long is told to nobody.
const EXPIRES_AFTER: Duration = Duration::from_secs(600);

/// The most artifacts with a register; the one that was longest unused makes room.
const ARTIFACTS_MAX: usize = 256;

/// The most machines in one register; others find the swarm, but are not told of.
const MACHINES_MAX: usize = 100_000;

/// Of every so many introduced machines, one is of another zone where there is one, so that no zone is alone.
const OTHER_ZONE_EVERY: usize = 4;

/// How many places are looked at for each machine that is wanted.
const LOOKS_PER_WANTED: usize = 4;

struct Entry {
    addr: PeerAddr,
    complete: bool,
    at: Instant,
}

struct Register {
    entries: Vec<Entry>,
    by_node: HashMap<NodeId, usize>,
    used: Instant,
}

/// The registers of all artifacts.
#[derive(Default)]
pub(crate) struct Introductions(Mutex<HashMap<ArtifactId, Register>>);

impl Introductions {
    /// Makes `me` known as one that has or fetches `artifact`, and names up to `want` others.
    pub(crate) fn introduce(
        &self,
        me: PeerAddr,
        artifact: ArtifactId,
        complete: bool,
        want: usize,
        now: Instant,
    ) -> Vec<PeerAddr> {
        let mut registers = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !registers.contains_key(&artifact) && registers.len() >= ARTIFACTS_MAX {
            let oldest = registers.iter().min_by_key(|(_, register)| register.used);
            if let Some(oldest) = oldest.map(|(artifact, _)| *artifact) {
                registers.remove(&oldest);
            }
        }
        let register = registers.entry(artifact).or_insert_with(|| Register {
            entries: Vec::new(),
            by_node: HashMap::new(),
            used: now,
        });
        register.used = now;
        let chosen = register.choose(&me, want, now);
        register.enter(me, complete, now);
        chosen
    }
}

impl Introductions {
    /// Tells nobody of a machine any more.
    pub(crate) fn forget(&self, node: &NodeId) {
        let mut registers = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for register in registers.values_mut() {
            if let Some(at) = register.by_node.get(node).copied() {
                register.remove(at);
            }
        }
    }
}

impl Register {
    fn enter(&mut self, addr: PeerAddr, complete: bool, now: Instant) {
        match self.by_node.get(&addr.node) {
            Some(at) => {
                if let Some(entry) = self.entries.get_mut(*at) {
                    *entry = Entry { complete: complete || entry.complete, addr, at: now };
                }
            }
            None => {
                if self.entries.len() < MACHINES_MAX {
                    self.by_node.insert(addr.node, self.entries.len());
                    self.entries.push(Entry { addr, complete, at: now });
                }
            }
        }
    }

    fn remove(&mut self, at: usize) {
        let gone = self.entries.swap_remove(at);
        self.by_node.remove(&gone.addr.node);
        if let Some(moved) = self.entries.get(at) {
            self.by_node.insert(moved.addr.node, at);
        }
    }

    /// Random machines: mostly of the asker's zone, some of others, and a whole one if there is any near.
    fn choose(&mut self, me: &PeerAddr, want: usize, now: Instant) -> Vec<PeerAddr> {
        let (mut near, mut far) = (Vec::new(), Vec::new());
        let mut rng = rand::rng();
        // From a random place on: neighbours in the register are no neighbours in any other way.
        let mut looks = (want * LOOKS_PER_WANTED).min(self.entries.len());
        let mut at =
            if self.entries.is_empty() { 0 } else { rng.random_range(0..self.entries.len()) };
        while looks > 0 && !self.entries.is_empty() {
            looks -= 1;
            at %= self.entries.len();
            let entry = &self.entries[at];
            if now.duration_since(entry.at) > EXPIRES_AFTER {
                self.remove(at);
                continue;
            }
            if entry.addr.node != me.node {
                let pool = if entry.addr.zone == me.zone { &mut near } else { &mut far };
                pool.push((!entry.complete, entry.addr.clone()));
            }
            at += 1;
        }
        near.sort_by_key(|(incomplete, _)| *incomplete);
        far.sort_by_key(|(incomplete, _)| *incomplete);
        let far_share = want.div_ceil(OTHER_ZONE_EVERY).min(far.len());
        let near_share = (want - far_share).min(near.len());
        let far_share = (want - near_share).min(far.len());
        let (near, far) = (near.into_iter().take(near_share), far.into_iter().take(far_share));
        near.chain(far).map(|(_, addr)| addr).collect()
    }
}

#[cfg(test)]
mod tests {
    use shoal_proto::MachineName;

    use super::*;

    fn addr(number: u8, zone: &str) -> PeerAddr {
        let data = "127.0.0.1:1".parse().unwrap();
        PeerAddr {
            node: NodeId([number; 32]),
            machine: MachineName::new(format!("m{number}")).unwrap(),
            zone: zone.into(),
            data,
            gossip: data,
        }
    }

    #[test]
    fn machines_are_told_of_each_other_but_not_of_themselves_or_the_long_gone() {
        let introductions = Introductions::default();
        let start = Instant::now();
        let artifact = ArtifactId::EMPTY;
        let meet = |number, zone, at| {
            introductions.introduce(addr(number, zone), artifact, false, 8, start + at)
        };
        assert!(meet(1, "a", Duration::ZERO).is_empty());
        assert_eq!(meet(2, "a", Duration::from_secs(400)), [addr(1, "a")]);
        assert_eq!(meet(1, "a", Duration::from_secs(400)), [addr(2, "a")]);
        assert!(meet(3, "a", Duration::from_secs(2_000)).is_empty());
        let other = ArtifactId([1; 32]);
        assert!(introductions.introduce(addr(4, "a"), other, false, 8, start).is_empty());
    }

    #[test]
    fn nobody_is_told_of_a_machine_that_was_forgotten() {
        let introductions = Introductions::default();
        let now = Instant::now();
        for number in 1..4 {
            introductions.introduce(addr(number, "a"), ArtifactId::EMPTY, false, 0, now);
        }
        introductions.forget(&NodeId([2; 32]));
        introductions.forget(&NodeId([9; 32]));
        let mut told = introductions.introduce(addr(4, "a"), ArtifactId::EMPTY, false, 8, now);
        told.sort();
        assert_eq!(told, [addr(1, "a"), addr(3, "a")]);
    }

    #[test]
    fn most_are_of_the_same_zone_and_some_are_not() {
        let introductions = Introductions::default();
        let now = Instant::now();
        for number in 0..80 {
            let zone = if number % 2 == 0 { "a" } else { "b" };
            introductions.introduce(addr(number, zone), ArtifactId::EMPTY, false, 0, now);
        }
        let told = introductions.introduce(addr(200, "a"), ArtifactId::EMPTY, false, 16, now);
        assert_eq!(told.len(), 16);
        let near = told.iter().filter(|addr| addr.zone == "a").count();
        assert_eq!(near, 12);
    }
}
