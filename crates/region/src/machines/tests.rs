use shoal_proto::{
    ArtifactId, EncodingId, NodeId, RegionName, Revision,
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

/// Machines of a process that has just started, with no settling, and what keeps its file.
fn machines() -> (Machines, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    (Machines::open(dir.path().join("waves.bin"), Duration::ZERO), dir)
}

fn open(machines: &Machines, goal: &Goal, halted: bool, now: Instant) -> u16 {
    let asker = MachineName::new("m1").unwrap();
    machines.open_waves(&asker, [(goal, halted)].into_iter(), now).0[0].open_permille
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
    let (machines, _dir) = machines();
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
    assert!(machines.batch(now).is_none_or(|batch| batch.reports.is_empty()), "older is not newer");
}

#[test]
fn a_machine_tells_again_what_this_process_does_not_know() {
    let (machines, _dir) = machines();
    let now = Instant::now();
    let states = [(&AppName::new("web").unwrap(), Revision { epoch: 0, number: 1 }, 7)];
    let digest = reports_digest(states);
    assert!(machines.polled(info("m1"), digest, now).unwrap());
    machines.reported(info("m1"), vec![report(7, MachineState::Active)], now).unwrap();
    assert!(!machines.polled(info("m1"), digest, now).unwrap());
}

#[test]
fn waves_open_by_this_process_s_machines_and_stay_where_they_are_when_halted() {
    let (machines, _dir) = machines();
    let start = Instant::now();
    for at in 0..10 {
        machines.polled(info(&format!("m{at}")), 0, start).unwrap();
    }
    let goal = goal(vec![100, 500]);
    let open = |halted, at| self::open(&machines, &goal, halted, start + Duration::from_secs(at));
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

#[test]
fn a_process_that_starts_again_goes_on_from_what_was_open() {
    let (before, dir) = machines();
    let (start, goal) = (Instant::now(), goal(vec![100, 500]));
    for at in 0..10 {
        before.polled(info(&format!("m{at}")), 0, start).unwrap();
    }
    let first = open(&before, &goal, false, start);
    assert!(first > 0 && first < ALL_PERMILLE);

    // Its first poller is the only machine that it knows, and is well: nothing more may open.
    let settle = Duration::from_secs(60);
    let after = Machines::open(dir.path().join("waves.bin"), settle);
    let active = vec![report(1, MachineState::Active)];
    let chosen = (0..10)
        .map(|at| format!("m{at}"))
        .find(|name| rollout_rank(&MachineName::new(name).unwrap(), &goal.artifact) < first);
    after.reported(info(&chosen.unwrap()), active, start).unwrap();
    assert_eq!(open(&after, &goal, false, start), first);
    assert_eq!(open(&after, &goal, false, start + settle / 2), first);
    assert!(open(&after, &goal, false, start + settle) > first);

    let without = tempfile::tempdir().unwrap();
    let without = Machines::open(without.path().join("waves.bin"), settle);
    without.polled(info("m1"), 0, start).unwrap();
    assert_eq!(open(&without, &goal, false, start), 0, "no record, no machines yet");
}

#[test]
fn a_wave_is_told_until_a_coordinator_keeps_it() {
    let (machines, dir) = machines();
    let start = Instant::now();
    for at in 0..10 {
        machines.polled(info(&format!("m{at}")), 0, start).unwrap();
    }
    let goal = goal(vec![100, 500]);
    let first = open(&machines, &goal, false, start);
    let later = Instant::now() + Duration::from_secs(1);
    let batch = machines.batch(later).unwrap();
    let [wave] = &batch.waves[..] else { panic!("{:?}", batch.waves) };
    assert_eq!((&wave.app, wave.revision), (&goal.app, goal.revision));
    assert!(wave.open_permille == first && wave.age_ms >= 1_000, "{wave:?}");
    // A batch that is refused is taken apart: the waves alone, then the machines.
    let (waves, rest) = halves(&batch).unwrap();
    assert!(waves.machines.is_empty() && waves.waves == batch.waves && rest.waves.is_empty());
    assert!(halves(&waves).is_none());
    // Machines that are told leave it to be told.
    machines.told(&rest, later);
    assert_eq!(machines.batch(later).unwrap().waves.len(), 1);
    machines.told(&waves, later);
    assert!(machines.batch(later).is_none());
    // The next one, and by a process that starts again: it does not know what was told.
    let chosen = (0..10)
        .map(|at| format!("m{at}"))
        .find(|name| rollout_rank(&MachineName::new(name).unwrap(), &goal.artifact) < first);
    let active = vec![report(1, MachineState::Active)];
    machines.reported(info(&chosen.unwrap()), active, start).unwrap();
    let next = open(&machines, &goal, false, start + WAVES_INTERVAL);
    let told = machines.batch(later).unwrap().waves;
    assert!(next > first && told.len() == 1 && told[0].open_permille == next, "{told:?}");
    let again = Machines::open(dir.path().join("waves.bin"), Duration::ZERO);
    assert!(again.batch(later).is_none(), "it has not seen the goal yet");
    again.polled(info("m1"), 0, start).unwrap();
    open(&again, &goal, false, start);
    assert_eq!(again.batch(later).unwrap().waves[0].open_permille, next);
}

#[test]
fn what_is_open_from_the_beginning_is_no_wave() {
    let (machines, _dir) = machines();
    let start = Instant::now();
    machines.polled(info("m1"), 0, start).unwrap();
    let back =
        Goal { plan: RolloutPlan { rollback: true, ..goal(vec![100]).plan }, ..goal(vec![]) };
    for goal in [goal(vec![]), Goal { revision: Revision { epoch: 0, number: 2 }, ..back }] {
        assert_eq!(open(&machines, &goal, false, start), ALL_PERMILLE);
        assert!(machines.batch(start).unwrap().waves.is_empty());
    }
}

#[test]
fn a_wave_that_cannot_be_kept_stays_closed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("later/waves.bin");
    let machines = Machines::open(path.clone(), Duration::ZERO);
    let (start, goal) = (Instant::now(), goal(vec![100, 500]));
    machines.polled(info("m1"), 0, start).unwrap();
    assert_eq!(open(&machines, &goal, false, start), 0);
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    assert_eq!(open(&machines, &goal, false, start + WAVES_INTERVAL), ALL_PERMILLE);
}

#[test]
fn only_who_waits_for_a_wave_is_to_ask_soon() {
    let (machines, _dir) = machines();
    let (start, goal) = (Instant::now(), goal(vec![100, 500]));
    for at in 0..10 {
        machines.polled(info(&format!("m{at}")), 0, start).unwrap();
    }
    let waits = |name: &str, halted| {
        let name = MachineName::new(name).unwrap();
        machines.open_waves(&name, [(&goal, halted)].into_iter(), start).1
    };
    assert!(waits("m1", false));
    assert!(!waits("m1", true), "halted");
    machines.reported(info("m1"), vec![report(1, MachineState::Failed)], start).unwrap();
    assert!(!waits("m1", false), "ended");
    assert!(waits("m2", false));
}

#[test]
fn what_a_machine_does_not_name_any_more_is_dropped_once_the_coordinator_has_it() {
    let (machines, _dir) = machines();
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let left =
        MachineReport { app: AppName::new("left").unwrap(), ..report(3, MachineState::Active) };
    let stays = report(7, MachineState::Active);
    machines.reported(info("m1"), vec![left, stays.clone()], at(0)).unwrap();
    let digest = reports_digest([(&stays.app, stays.revision, 7)]);
    for second in [1, 3, 5, 7] {
        assert!(machines.polled(info("m1"), digest, at(second)).unwrap());
        machines.reported(info("m1"), vec![stays.clone()], at(second + 1)).unwrap();
    }
    let batch = machines.batch(at(9)).unwrap();
    assert_eq!(batch.reports.len(), 2, "the coordinator was to be told of both");
    machines.told(&batch, at(9));
    assert!(!machines.polled(info("m1"), digest, at(9)).unwrap());
    assert!(!machines.polled(info("m1"), digest, at(11)).unwrap());
}

#[test]
fn a_batch_is_split_down_to_one_machine() {
    let (machines, _dir) = machines();
    let now = Instant::now();
    for name in ["m1", "m2", "m3"] {
        let active = vec![report(1, MachineState::Active)];
        machines.reported(info(name), active, now).unwrap();
    }
    let (first, second) = halves(&machines.batch(now).unwrap()).unwrap();
    assert_eq!((first.machines.len(), second.machines.len()), (1, 2));
    assert_eq!((first.reports.len(), second.reports.len()), (1, 2));
    assert_eq!(first.machines[0].name, first.reports[0].machine);
    assert!(halves(&first).is_none());
    machines.told(&first, now);
    assert_eq!(machines.backlog(), 2);
}

#[test]
fn the_long_gone_make_room_when_the_coordinator_knows_all_of_them() {
    let (machines, _dir) = machines();
    let start = Instant::now();
    machines.polled(info("m1"), 0, start).unwrap();
    let mut state = machines.lock();
    assert!(!state.has_room(1, start + SWEEP_INTERVAL));
    let later = start + FORGOTTEN_AFTER;
    assert!(!state.has_room(1, later), "the coordinator has not heard of it");
    state.dirty.clear();
    assert!(!state.has_room(1, later), "searched just now");
    assert!(state.has_room(1, later + SWEEP_INTERVAL));
}
