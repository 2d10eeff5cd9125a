//! The machines that this process answers: what each last said, how far its rollouts may go, and what the
//! coordinator has not been told yet.
//!
//! A machine keeps to one region process while it answers, so each process governs the rollouts of its own
//! machines: their ranks are spread evenly, and each process opens the same parts of its share.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    sync::Mutex,
    time::{Duration, Instant},
};

use shoal_client::types::{MachineSeen, MachineStateSeen, RegionReports};
use shoal_proto::{
    AppName, MachineName, NodeId,
    goal::Goal,
    region::{MachineInfo, MachineReport, OpenWave, reports_digest, rollout_rank},
    state::MachineState,
};
use shoal_rollout::{ALL_PERMILLE, Machine as Ranked};

use crate::waves::Rollouts;

/// The most machines that one region process knows; when none of them was long not heard of, more are refused.
pub(crate) const MACHINES_MAX: usize = 200_000;

/// The most apps that one machine may report on.
const APPS_PER_MACHINE_MAX: usize = 1_000;

/// The most rows that go to the coordinator in one batch.
const BATCH_ROWS_MAX: usize = 5_000;

/// The most waves that go with one batch.
const BATCH_WAVES_MAX: usize = 500;

/// How often the coordinator is told that a machine is still there.
const SEEN_INTERVAL: Duration = Duration::from_secs(30);

/// A machine that was not heard of for this long no longer counts in waves, and makes room for others.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);

/// How often the waves of an app are looked at.
const WAVES_INTERVAL: Duration = Duration::from_millis(250);

/// How often the machines are searched for some that make room.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// How often a machine is asked in a row to tell all its states before those that it does not name are dropped.
const ASKED_MAX: u32 = 2;

struct Entry {
    info: MachineInfo,
    heard: Instant,
    /// When the coordinator was last given it.
    told: Option<Instant>,
    reports: BTreeMap<AppName, Kept>,
    /// How often in a row it was asked to tell all its states, and when last.
    asked: u32,
    asked_at: Option<Instant>,
}

impl Entry {
    /// Its state for `goal`.
    fn state(&self, goal: &Goal) -> MachineState {
        let kept = self.reports.get(&goal.app);
        let kept = kept.filter(|kept| kept.report.revision == goal.revision);
        kept.map_or(MachineState::Waiting, |kept| kept.report.state)
    }

    /// The digest of the states that `is_of` chooses.
    fn digest(&self, is_of: impl Fn(&Kept) -> bool) -> u64 {
        let chosen = self.reports.iter().filter(|(_, kept)| is_of(kept));
        reports_digest(chosen.map(|(app, kept)| (app, kept.report.revision, kept.report.sequence)))
    }

    /// Whether the machine must tell all its states, by the `digest` of what it believes is known here.
    ///
    /// An app that it has left is never named again, and would keep the digests apart for ever. So a
    /// machine that was asked [`ASKED_MAX`] times, and whose digest is that of the states it has named since
    /// it was last asked, has no others: they are dropped, once the coordinator has them.
    fn is_to_tell(&mut self, digest: u64, now: Instant) -> bool {
        if self.digest(|_| true) != digest && self.asked >= ASKED_MAX {
            let asked_at = self.asked_at;
            let is_named = |kept: &Kept| asked_at.is_none_or(|at| kept.named >= at);
            if self.digest(is_named) == digest {
                self.reports.retain(|_, kept| is_named(kept) || !kept.told);
            }
        }
        if self.digest(|_| true) == digest {
            self.asked = 0;
            return false;
        }
        self.asked = self.asked.saturating_add(1);
        self.asked_at = Some(now);
        true
    }
}

struct Kept {
    report: MachineReport,
    /// When it arrived: with the report's age it says when the state came about.
    arrived: Instant,
    /// When the machine last named the app, with news or without.
    named: Instant,
    /// Whether the coordinator keeps it.
    told: bool,
}

#[derive(Default)]
struct State {
    machines: HashMap<MachineName, Entry>,
    rollouts: Rollouts,
    /// Machines with something that the coordinator has not been told.
    dirty: BTreeSet<MachineName>,
    /// When the first machine came.
    began: Option<Instant>,
    /// When machines that make room were last searched for.
    swept: Option<Instant>,
}

/// All of them.
pub(crate) struct Machines {
    state: Mutex<State>,
    /// Where it is kept what is open.
    path: PathBuf,
    /// Held while that file is written, so that an older one never replaces a newer one.
    keeping: Mutex<()>,
    /// How long machines must have been coming before those that came are taken for all.
    settle: Duration,
    pub(crate) changed: tokio::sync::Notify,
}

impl Machines {
    /// No machines yet; what was open of their rollouts is in the file at `path`.
    pub(crate) fn open(path: PathBuf, settle: Duration) -> Self {
        let rollouts = Rollouts::read(&path, Instant::now());
        Self {
            state: Mutex::new(State { rollouts, ..State::default() }),
            path,
            keeping: Mutex::default(),
            settle,
            changed: tokio::sync::Notify::new(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// How many machines are known.
    pub(crate) fn count(&self) -> usize {
        self.lock().machines.len()
    }

    /// Forgets the machines of revoked keys: no wave counts them, and the coordinator is told no more of them.
    pub(crate) fn forget(&self, is_revoked: &dyn Fn(&NodeId) -> bool) {
        let mut state = self.lock();
        let State { machines, dirty, .. } = &mut *state;
        machines.retain(|name, entry| {
            let gone = is_revoked(&entry.info.addr.node);
            if gone {
                dirty.remove(name);
            }
            !gone
        });
    }

    /// How many machines wait to be told of.
    pub(crate) fn backlog(&self) -> usize {
        self.lock().dirty.len()
    }

    /// A machine polled; returns whether its reports are to be told again, or an error when there is no room.
    pub(crate) fn polled(
        &self,
        info: MachineInfo,
        digest: u64,
        now: Instant,
    ) -> Result<bool, String> {
        let mut state = self.lock();
        let name = info.addr.machine.clone();
        let entry = state.enter(info, now)?;
        let again = entry.is_to_tell(digest, now);
        let told = entry.told;
        if told.is_none_or(|told| now.duration_since(told) >= SEEN_INTERVAL) {
            state.dirty.insert(name);
            drop(state);
            self.changed.notify_one();
        }
        Ok(again)
    }

    /// A machine reported; what it said is kept until the coordinator has it.
    pub(crate) fn reported(
        &self,
        info: MachineInfo,
        reports: Vec<MachineReport>,
        now: Instant,
    ) -> Result<(), String> {
        let mut state = self.lock();
        let name = info.addr.machine.clone();
        let entry = state.enter(info, now)?;
        for report in reports {
            if let Some(kept) = entry.reports.get_mut(&report.app) {
                kept.named = now;
            }
            let newer = entry.reports.get(&report.app).is_none_or(|kept| {
                (report.revision, report.sequence) > (kept.report.revision, kept.report.sequence)
            });
            let room = entry.reports.len() < APPS_PER_MACHINE_MAX
                || entry.reports.contains_key(&report.app);
            if newer && room {
                let kept = Kept { arrived: now, named: now, told: false, report };
                entry.reports.insert(kept.report.app.clone(), kept);
            }
        }
        state.dirty.insert(name);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// How far `rollouts` (each with whether it is halted) may go on this process's machines, and whether
    /// `asker` waits for one of their waves.
    pub(crate) fn open_waves<'a>(
        &self,
        asker: &MachineName,
        rollouts: impl Iterator<Item = (&'a Goal, bool)>,
        now: Instant,
    ) -> (Vec<OpenWave>, bool) {
        let rollouts: Vec<_> = rollouts.collect();
        let mut state = self.lock();
        let settled =
            state.began.is_some_and(|began| now.saturating_duration_since(began) >= self.settle);
        let mut opened = false;
        for (goal, halted) in &rollouts {
            opened |= !halted && state.step(goal, settled, now);
        }
        if opened {
            drop(state);
            tokio::task::block_in_place(|| self.keep_waves());
            state = self.lock();
        }
        let mut waits = false;
        let mut waves = Vec::with_capacity(rollouts.len());
        for (goal, halted) in rollouts {
            let open_permille =
                state.rollouts.of(goal, now).map_or(0, |rollout| rollout.kept_permille());
            let ended = state.machines.get(asker).is_some_and(|entry| {
                use MachineState::{Active, Failed, RolledBack};
                matches!(entry.state(goal), Active | Failed | RolledBack)
            });
            waits |= !halted && !ended && open_permille < ALL_PERMILLE;
            let (app, revision) = (goal.app.clone(), goal.revision);
            waves.push(OpenWave { app, revision, open_permille });
        }
        (waves, waits)
    }

    /// Puts what is open on the disk: no machine is told of it before.
    fn keep_waves(&self) {
        let _turn = self.keeping.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(open) = self.lock().rollouts.unkept() else { return };
        match Rollouts::write(&self.path, &open) {
            Ok(()) => {
                self.lock().rollouts.kept(&open, Instant::now());
                // The coordinator is told of it.
                self.changed.notify_one();
            }
            Err(error) => {
                let path = self.path.display();
                tracing::error!(%path, %error, "a wave stays closed: cannot keep that it is open");
            }
        }
    }

    /// The next batch for the coordinator; none when it knows everything.
    pub(crate) fn batch(&self, now: Instant) -> Option<RegionReports> {
        let state = self.lock();
        let waves = state.rollouts.untold(BATCH_WAVES_MAX, now);
        let mut batch = RegionReports { waves, ..RegionReports::default() };
        for name in &state.dirty {
            let Some(entry) = state.machines.get(name) else { continue };
            if batch.reports.len() + batch.machines.len() >= BATCH_ROWS_MAX {
                break;
            }
            batch.machines.push(MachineSeen {
                name: name.clone(),
                zone: entry.info.addr.zone.clone(),
                labels: entry.info.labels.clone(),
                version: entry.info.version.clone(),
                address: entry.info.addr.data.to_string(),
                node: Some(entry.info.addr.node),
                age_ms: millis(now.duration_since(entry.heard)),
            });
            for kept in entry.reports.values().filter(|kept| !kept.told) {
                let waited = millis(now.duration_since(kept.arrived));
                let age_ms = kept.report.age_ms.saturating_add(waited);
                let report = MachineReport { age_ms, ..kept.report.clone() };
                batch.reports.push(MachineStateSeen { machine: name.clone(), report });
            }
        }
        (!batch.machines.is_empty() || !batch.waves.is_empty()).then_some(batch)
    }

    /// The coordinator keeps a batch.
    pub(crate) fn told(&self, batch: &RegionReports, now: Instant) {
        let mut state = self.lock();
        state.rollouts.told(&batch.waves);
        for told in &batch.reports {
            let kept = state
                .machines
                .get_mut(&told.machine)
                .and_then(|entry| entry.reports.get_mut(&told.report.app));
            if let Some(kept) = kept {
                kept.told |= (kept.report.revision, kept.report.sequence)
                    == (told.report.revision, told.report.sequence);
            }
        }
        for seen in &batch.machines {
            let clean = state.machines.get_mut(&seen.name).is_none_or(|entry| {
                entry.told = Some(now);
                entry.reports.values().all(|kept| kept.told)
            });
            if clean {
                state.dirty.remove(&seen.name);
            }
        }
    }
}

impl State {
    /// Looks whether the next wave of `goal` opens; returns whether something is open that is not kept.
    fn step(&mut self, goal: &Goal, settled: bool, now: Instant) -> bool {
        let Some(rollout) = self.rollouts.of(goal, now) else { return false };
        if rollout.looked.is_some_and(|at| now.duration_since(at) < WAVES_INTERVAL) {
            return false;
        }
        rollout.looked = Some(now);
        if rollout.is_closed() && (settled || goal.plan.rollback) {
            let ranked: Vec<Ranked> = self
                .machines
                .values()
                .filter(|entry| now.duration_since(entry.heard) < FORGOTTEN_AFTER)
                .filter(|entry| goal.selector.matches(&entry.info.labels))
                .map(|entry| Ranked {
                    rank: rollout_rank(&entry.info.addr.machine, &goal.artifact),
                    state: entry.state(goal),
                })
                .collect();
            let elapsed_s = now.duration_since(rollout.since).as_secs();
            rollout.waves.step(&goal.plan, &ranked, elapsed_s);
        }
        rollout.is_unkept()
    }

    fn enter(&mut self, info: MachineInfo, now: Instant) -> Result<&mut Entry, String> {
        let name = info.addr.machine.clone();
        self.began.get_or_insert(now);
        if !self.machines.contains_key(&name) && !self.has_room(MACHINES_MAX, now) {
            return Err(format!("this region process knows {MACHINES_MAX} machines already"));
        }
        let entry = self.machines.entry(name).or_insert_with(|| Entry {
            info: info.clone(),
            heard: now,
            told: None,
            reports: BTreeMap::new(),
            asked: 0,
            asked_at: None,
        });
        if entry.info != info {
            entry.info = info;
            entry.told = None;
        }
        entry.heard = now;
        Ok(entry)
    }

    /// Whether there is room for one more than `max` - 1 machines, if need be by forgetting those that are long
    /// gone and of which the coordinator knows all.
    fn has_room(&mut self, max: usize, now: Instant) -> bool {
        let is_due = self.swept.is_none_or(|at| now.duration_since(at) >= SWEEP_INTERVAL);
        if self.machines.len() >= max && is_due {
            self.swept = Some(now);
            let dirty = &self.dirty;
            self.machines.retain(|name, entry| {
                now.duration_since(entry.heard) < FORGOTTEN_AFTER || dirty.contains(name)
            });
        }
        self.machines.len() < max
    }
}

/// The two parts of a batch: its waves and its machines, or the halves of these; none when it is of one.
pub(crate) fn halves(batch: &RegionReports) -> Option<(RegionReports, RegionReports)> {
    if !batch.waves.is_empty() && !batch.machines.is_empty() {
        let waves = RegionReports { waves: batch.waves.clone(), ..RegionReports::default() };
        return Some((waves, RegionReports { waves: Vec::new(), ..batch.clone() }));
    }
    let (first, second) = batch.machines.split_at(batch.machines.len() / 2);
    if first.is_empty() {
        return None;
    }
    let names: BTreeSet<&MachineName> = first.iter().map(|seen| &seen.name).collect();
    let (of_first, of_second) =
        batch.reports.iter().cloned().partition(|report| names.contains(&report.machine));
    let half = |machines: &[MachineSeen], reports| {
        let machines = machines.to_vec();
        RegionReports { machines, reports, waves: Vec::new() }
    };
    Some((half(first, of_first), half(second, of_second)))
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
