//! What goes wrong and when, and which machines are chosen for it.

use rand::RngExt;
use rand_pcg::Pcg32;

use super::{
    Static,
    message::What,
    shard::{Conditions, Shard},
};
use crate::setup::{BUCKET_NICS, Fault, Setup, When};

/// What a run has in store for one machine.
#[derive(Debug, Clone)]
pub(super) struct Fate {
    /// Which part of its line works.
    pub(super) rate: f64,
    pub(super) corrupt: bool,
    /// It is off when the run begins.
    pub(super) late: bool,
    /// When it dies and comes back, in nanoseconds.
    dies: Vec<(u64, u64)>,
}

impl Fate {
    pub(super) fn healthy(&self) -> bool {
        self.rate >= 1.0 && !self.corrupt && !self.late && self.dies.is_empty()
    }

    pub(super) fn deaths(&self) -> impl Iterator<Item = (u64, What)> {
        self.dies.iter().flat_map(|(dies, back)| [(*dies, What::Die), (*back, What::Revive)])
    }
}

fn ns(seconds: f64) -> u64 {
    (seconds * 1e9).round() as u64
}

/// Each machine's fate, by the faults that choose machines.
pub(super) fn fates(setup: &Setup, rng: &mut Pcg32) -> Vec<Fate> {
    let unharmed = Fate { rate: 1.0, corrupt: false, late: false, dies: Vec::new() };
    let mut fates = vec![unharmed; setup.nodes as usize];
    for fault in &setup.faults {
        match fault {
            Fault::Stragglers { share, rate } => {
                chosen(setup, *share, rng).for_each(|at| fates[at].rate = *rate);
            }
            Fault::Corrupt { share } => {
                chosen(setup, *share, rng).for_each(|at| fates[at].corrupt = true);
            }
            Fault::Late { share, .. } => {
                chosen(setup, *share, rng).for_each(|at| fates[at].late = true);
            }
            Fault::Churn { per_minute, down_s, until_s } => {
                let a_second = per_minute * f64::from(setup.nodes) / 60.0;
                let mut at_s = 0.0;
                loop {
                    let even: f64 = rng.random();
                    at_s += -(1.0 - even).ln() / a_second;
                    if at_s > *until_s || !at_s.is_finite() {
                        break;
                    }
                    let fate = &mut fates[rng.random_range(0..setup.nodes) as usize];
                    if fate.dies.last().is_none_or(|(_, back)| *back < ns(at_s)) {
                        fate.dies.push((ns(at_s), ns(at_s + down_s)));
                    }
                }
            }
            _ => {}
        }
    }
    fates
}

fn chosen(setup: &Setup, share: f64, rng: &mut Pcg32) -> impl Iterator<Item = usize> {
    let wanted = (f64::from(setup.nodes) * share).round() as usize;
    let mut all: Vec<usize> = (0..setup.nodes as usize).collect();
    let wanted = wanted.min(all.len());
    for at in 0..wanted {
        let other = rng.random_range(at..all.len());
        all.swap(at, other);
    }
    all.truncate(wanted);
    all.into_iter()
}

#[derive(Debug, Clone, Copy)]
enum Change {
    Publish(u16),
    RegionsLost(u32),
    BucketFails { for_s: f64 },
    BucketWorks,
    BucketRate { rate: f64, for_s: f64 },
    BucketFull,
    CutZone { zone: u32, for_s: f64 },
    Healed,
    LateArrive,
}

/// What is still to come. Every shard keeps the same list, and takes the same things off it.
pub(super) struct Triggers {
    waiting: Vec<(When, Change)>,
    /// When each artifact's goal was published.
    pub(super) started_s: Vec<f64>,
}

impl Triggers {
    pub(super) fn new(world: &Static) -> Self {
        let setup = &world.setup;
        let goals = setup.artifacts.iter().enumerate();
        let goals = goals.map(|(at, artifact)| (artifact.start, Change::Publish(at as u16)));
        let faults = setup.faults.iter().filter_map(|fault| match *fault {
            Fault::RegionsLost { processes, at } => Some((at, Change::RegionsLost(processes))),
            Fault::BucketFails { from, for_s } => Some((from, Change::BucketFails { for_s })),
            Fault::BucketSlow { from, for_s, rate } => {
                Some((from, Change::BucketRate { rate, for_s }))
            }
            Fault::ZoneCut { zone, from, for_s } => Some((from, Change::CutZone { zone, for_s })),
            Fault::Late { at, .. } => Some((at, Change::LateArrive)),
            _ => None,
        });
        Self { waiting: goals.chain(faults).collect(), started_s: vec![0.0; setup.artifacts.len()] }
    }

    /// The next moment that is known, in nanoseconds.
    pub(super) fn next_ns(&self) -> Option<u64> {
        let known = self.waiting.iter().filter_map(|(when, _)| match when {
            When::Seconds(at) => Some(ns(*at)),
            When::Progress(_) => None,
        });
        known.min()
    }

    /// Lets happen what is due.
    pub(super) fn fire(&mut self, world: &Static, shard: &mut Shard, now: u64, held: u64) {
        if self.waiting.is_empty() {
            return;
        }
        let published = shard.out.conditions.published;
        let total: u64 = (0..world.members.len())
            .filter(|at| published >> at & 1 == 1)
            .map(|at| world.setup.artifacts[at].size_bytes * world.members[at].len() as u64)
            .sum();
        let progress = held as f64 / total.max(1) as f64;
        let due = |when: &When| match when {
            When::Seconds(at) => ns(*at) / super::WINDOW_NS <= now / super::WINDOW_NS,
            When::Progress(part) => total > 0 && progress >= *part,
        };
        let mut at = 0;
        while at < self.waiting.len() {
            if due(&self.waiting[at].0) {
                let (_, change) = self.waiting.remove(at);
                self.change(world, shard, now, change);
            } else {
                at += 1;
            }
        }
    }

    fn change(&mut self, world: &Static, shard: &mut Shard, now: u64, change: Change) {
        let now_s = now as f64 / 1e9;
        let full = world.setup.nic_bps * u64::from(BUCKET_NICS);
        let conditions: &mut Conditions = &mut shard.out.conditions;
        let mut later = |for_s: f64, change| {
            self.waiting.push((When::Seconds(now_s + for_s), change));
        };
        match change {
            Change::Publish(artifact) => {
                conditions.published |= 1 << artifact;
                self.started_s[usize::from(artifact)] = now_s;
                let alive = conditions.regions_alive;
                let region = shard.regions.iter_mut().zip(alive).find(|(_, alive)| *alive);
                if let Some((region, _)) = region {
                    region.publish(world, &mut shard.out, now, artifact);
                }
            }
            Change::RegionsLost(processes) => {
                conditions
                    .regions_alive
                    .iter_mut()
                    .take(processes as usize)
                    .for_each(|a| *a = false);
            }
            Change::BucketFails { for_s } => {
                conditions.bucket_fails = true;
                later(for_s, Change::BucketWorks);
            }
            Change::BucketWorks => conditions.bucket_fails = false,
            Change::BucketRate { rate, for_s } => {
                conditions.bucket_bps = ((full as f64) * rate).max(1.0) as u64;
                later(for_s, Change::BucketFull);
            }
            Change::BucketFull => conditions.bucket_bps = full,
            Change::CutZone { zone, for_s } => {
                conditions.cut_zone = Some(zone);
                later(for_s, Change::Healed);
                for machine in &mut shard.machines {
                    machine.cut(&mut shard.out, now);
                }
            }
            Change::Healed => conditions.cut_zone = None,
            Change::LateArrive => {
                for machine in &mut shard.machines {
                    machine.arrives(&mut shard.out, now);
                }
            }
        }
    }
}
