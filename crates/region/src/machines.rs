//! The machines that this process answers: what each last said, how far its rollouts may go, and what the
//! coordinator has not been told yet.
//!
//! A machine keeps to one region process while it answers, so each process governs the rollouts of its own
//! machines: their ranks are spread evenly, and each process opens the same parts of its share.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Mutex,
    time::{Duration, Instant},
};

use shoal_client::types::{MachineSeen, MachineStateSeen, RegionReports};
use shoal_proto::{
    AppName, MachineName, Revision,
    goal::Goal,
    region::{MachineInfo, MachineReport, OpenWave, reports_digest, rollout_rank},
    state::MachineState,
};
use shoal_rollout::{Machine as Ranked, Waves};

/// The most machines that one region process knows; more are refused.
pub(crate) const MACHINES_MAX: usize = 200_000;

/// The most apps that one machine may report on.
const APPS_PER_MACHINE_MAX: usize = 1_000;

/// The most rows that go to the coordinator in one batch.
const BATCH_ROWS_MAX: usize = 5_000;

/// How often the coordinator is told that a machine is still there.
const SEEN_INTERVAL: Duration = Duration::from_secs(30);

/// A machine that was not heard of for this long no longer counts in waves.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);

/// How often the waves of an app are looked at.
const WAVES_INTERVAL: Duration = Duration::from_millis(250);

struct Entry {
    info: MachineInfo,
    heard: Instant,
    /// When the coordinator was last given it.
    told: Option<Instant>,
    reports: BTreeMap<AppName, Kept>,
}

struct Kept {
    report: MachineReport,
    /// When it arrived: with the report's age it says when the state came about.
    arrived: Instant,
    /// Whether the coordinator keeps it.
    told: bool,
}

struct Rollout {
    revision: Revision,
    waves: Waves,
    since: Instant,
    looked: Option<Instant>,
}

#[derive(Default)]
struct State {
    machines: HashMap<MachineName, Entry>,
    rollouts: BTreeMap<AppName, Rollout>,
    /// Machines with something that the coordinator has not been told.
    dirty: std::collections::BTreeSet<MachineName>,
}

/// All of them.
#[derive(Default)]
pub(crate) struct Machines {
    state: Mutex<State>,
    pub(crate) changed: tokio::sync::Notify,
}

impl Machines {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// How many machines are known.
    pub(crate) fn count(&self) -> usize {
        self.lock().machines.len()
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
        let known = reports_digest(
            entry
                .reports
                .iter()
                .map(|(app, kept)| (app, kept.report.revision, kept.report.sequence)),
        );
        let again = known != digest;
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
            let newer = entry.reports.get(&report.app).is_none_or(|kept| {
                (report.revision, report.sequence) > (kept.report.revision, kept.report.sequence)
            });
            let room = entry.reports.len() < APPS_PER_MACHINE_MAX
                || entry.reports.contains_key(&report.app);
            if newer && room {
                entry
                    .reports
                    .insert(report.app.clone(), Kept { report, arrived: now, told: false });
            }
        }
        state.dirty.insert(name);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// How far the rollout of `goal` may go on this process's machines.
    pub(crate) fn open_wave(&self, goal: &Goal, halted: bool, now: Instant) -> OpenWave {
        let mut state = self.lock();
        let State { machines, rollouts, .. } = &mut *state;
        let fresh =
            || Rollout { revision: goal.revision, waves: Waves::new(0), since: now, looked: None };
        let rollout = rollouts.entry(goal.app.clone()).or_insert_with(fresh);
        if rollout.revision != goal.revision {
            *rollout = fresh();
        }
        let due = rollout.looked.is_none_or(|at| now.duration_since(at) >= WAVES_INTERVAL);
        if due && !halted {
            rollout.looked = Some(now);
            let ranked: Vec<Ranked> = machines
                .values()
                .filter(|entry| now.duration_since(entry.heard) < FORGOTTEN_AFTER)
                .filter(|entry| goal.selector.matches(&entry.info.labels))
                .map(|entry| Ranked {
                    rank: rollout_rank(&entry.info.addr.machine, &goal.artifact),
                    state: entry
                        .reports
                        .get(&goal.app)
                        .filter(|kept| kept.report.revision == goal.revision)
                        .map_or(MachineState::Waiting, |kept| kept.report.state),
                })
                .collect();
            let elapsed_s = now.duration_since(rollout.since).as_secs();
            rollout.waves.step(&goal.plan, &ranked, elapsed_s);
        }
        OpenWave {
            app: goal.app.clone(),
            revision: goal.revision,
            open_permille: rollout.waves.open_permille(),
        }
    }

    /// The next batch for the coordinator; none when it knows everything.
    pub(crate) fn batch(&self, now: Instant) -> Option<RegionReports> {
        let state = self.lock();
        let mut batch = RegionReports::default();
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
                age_ms: millis(now.duration_since(entry.heard)),
            });
            for kept in entry.reports.values().filter(|kept| !kept.told) {
                let waited = millis(now.duration_since(kept.arrived));
                let age_ms = kept.report.age_ms.saturating_add(waited);
                let report = MachineReport { age_ms, ..kept.report.clone() };
                batch.reports.push(MachineStateSeen { machine: name.clone(), report });
            }
        }
        (!batch.machines.is_empty()).then_some(batch)
    }

    /// The coordinator keeps a batch.
    pub(crate) fn told(&self, batch: &RegionReports, now: Instant) {
        let mut state = self.lock();
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
    fn enter(&mut self, info: MachineInfo, now: Instant) -> Result<&mut Entry, String> {
        let name = info.addr.machine.clone();
        if !self.machines.contains_key(&name) && self.machines.len() >= MACHINES_MAX {
            return Err(format!("this region process knows {MACHINES_MAX} machines already"));
        }
        let entry = self.machines.entry(name).or_insert_with(|| Entry {
            info: info.clone(),
            heard: now,
            told: None,
            reports: BTreeMap::new(),
        });
        if entry.info != info {
            entry.info = info;
            entry.told = None;
        }
        entry.heard = now;
        Ok(entry)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use shoal_proto::{
        ArtifactId, EncodingId, NodeId, RegionName,
        goal::{Activation, Labels, RolloutPlan, Selector},
        manifest::PieceSize,
        peer::PeerAddr,
        region::FetchProgress,
    };

    use super::*;

    fn info(name: &str) -> MachineInfo {
        let data = "127.0.0.1:1".parse().unwrap();
        MachineInfo {
            addr: PeerAddr {
                node: NodeId([1; 32]),
                machine: MachineName::new(name).unwrap(),
                zone: "a".into(),
                data,
                gossip: data,
            },
            labels: Labels::new(),
            version: "1".into(),
        }
    }

    fn report(sequence: u64, state: MachineState) -> MachineReport {
        MachineReport {
            app: AppName::new("web").unwrap(),
            revision: Revision { epoch: 0, number: 1 },
            artifact: ArtifactId::EMPTY,
            state,
            reason: None,
            progress: FetchProgress::default(),
            sequence,
            age_ms: 5,
        }
    }

    fn goal(waves_permille: Vec<u16>) -> Goal {
        Goal {
            cluster: "c".into(),
            app: AppName::new("web").unwrap(),
            revision: Revision { epoch: 0, number: 1 },
            selector: Selector::default(),
            regions: vec![RegionName::new("r").unwrap()],
            artifact: ArtifactId::EMPTY,
            size_bytes: 0,
            piece_size: PieceSize::MIN,
            encoding: EncodingId([0; 32]),
            file_mode: 0o755,
            activation: Activation::None,
            health: None,
            plan: RolloutPlan { waves_permille, ..RolloutPlan::default() },
            priority: 0,
            machines_estimate: 2,
            issued_at_ms: 0,
        }
    }

    #[test]
    fn nothing_is_forgotten_before_the_coordinator_keeps_it() {
        let machines = Machines::default();
        let now = Instant::now();
        machines.reported(info("m1"), vec![report(1, MachineState::Fetching)], now).unwrap();
        let first = machines.batch(now + Duration::from_millis(20)).unwrap();
        assert_eq!(first.reports[0].report.age_ms, 25);
        machines.reported(info("m1"), vec![report(2, MachineState::Active)], now).unwrap();
        machines.told(&first, now);
        let second = machines.batch(now).expect("the newer report is still to be told");
        assert_eq!(second.reports[0].report.state, MachineState::Active);
        machines.reported(info("m1"), vec![report(1, MachineState::Fetching)], now).unwrap();
        machines.told(&second, now);
        assert!(
            machines.batch(now).is_none_or(|batch| batch.reports.is_empty()),
            "older is not newer"
        );
    }

    #[test]
    fn a_machine_tells_again_what_this_process_does_not_know() {
        let machines = Machines::default();
        let now = Instant::now();
        let states = [(&AppName::new("web").unwrap(), Revision { epoch: 0, number: 1 }, 7)];
        let digest = reports_digest(states);
        assert!(machines.polled(info("m1"), digest, now).unwrap());
        machines.reported(info("m1"), vec![report(7, MachineState::Active)], now).unwrap();
        assert!(!machines.polled(info("m1"), digest, now).unwrap());
    }

    #[test]
    fn waves_open_by_this_process_s_machines_and_stay_where_they_are_when_halted() {
        let machines = Machines::default();
        let start = Instant::now();
        for at in 0..10 {
            machines.polled(info(&format!("m{at}")), 0, start).unwrap();
        }
        let goal = goal(vec![100, 500]);
        let open = |halted, at| {
            machines.open_wave(&goal, halted, start + Duration::from_secs(at)).open_permille
        };
        let first = open(false, 1);
        assert!(first > 0 && first < 1_000);
        assert_eq!(open(false, 2), first, "no success, no next wave");
        let is_first = |at: &usize| {
            let name = MachineName::new(format!("m{at}")).unwrap();
            rollout_rank(&name, &goal.artifact) < first
        };
        let chosen: Vec<usize> = (0..10).filter(is_first).collect();
        assert_eq!(chosen.len(), 1);
        let name = format!("m{}", chosen[0]);
        machines.reported(info(&name), vec![report(1, MachineState::Active)], start).unwrap();
        assert_eq!(open(true, 3), first, "halted");
        assert!(open(false, 4) > first);
    }
}
