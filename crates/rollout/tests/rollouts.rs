//! Whole rollouts of small and large fleets, stepped second by second.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use shoal_proto::{
    goal::RolloutPlan,
    state::{MachineState, RolloutStatus},
};
use shoal_rollout::{ALL_PERMILLE, Counts, Machine, Waves, outcome, settled, thresholds};

fn plan(waves: &[u16]) -> RolloutPlan {
    RolloutPlan { waves_permille: waves.to_vec(), ..RolloutPlan::default() }
}

fn fleet(ranks: &[u16]) -> Vec<Machine> {
    ranks.iter().map(|rank| Machine { rank: *rank, state: MachineState::Verified }).collect()
}

/// Lets every machine that may activate end in what `how` says.
fn activate(machines: &mut [Machine], open: u16, how: impl Fn(u16) -> MachineState) -> usize {
    let may = |m: &&mut Machine| m.rank < open && m.state == MachineState::Verified;
    machines.iter_mut().filter(may).map(|machine| machine.state = how(machine.rank)).count()
}

#[test]
fn a_small_wave_is_at_least_one_machine() {
    // 1 % of eight machines is the one of the lowest rank.
    let ranks = [700, 20, 350, 801, 402, 955, 512, 66];
    assert_eq!(thresholds(&plan(&[10, 100, 500]), ranks), [21, 67, 403, ALL_PERMILLE]);
    assert_eq!(thresholds(&plan(&[]), ranks), [ALL_PERMILLE]);
    assert_eq!(thresholds(&plan(&[1_000]), ranks), [ALL_PERMILLE]);
    assert_eq!(thresholds(&plan(&[10, 20]), [5]), [ALL_PERMILLE], "one machine, one wave");
    assert_eq!(thresholds(&plan(&[10, 20]), []), [ALL_PERMILLE]);
    assert_eq!(thresholds(&plan(&[10, 20]), [5, 5, 5]), [ALL_PERMILLE], "equal ranks");
    assert_eq!(thresholds(&plan(&[10, 20]), [5, 5, 9, 9, 12]), [6, 10, ALL_PERMILLE]);
    let rollback = RolloutPlan { rollback: true, ..plan(&[10, 100]) };
    assert_eq!(thresholds(&rollback, ranks), [ALL_PERMILLE]);
}

#[test]
fn waves_open_one_by_one_after_their_bake() {
    let plan = RolloutPlan { bake_s: 10, ..plan(&[10, 500]) };
    let mut machines = fleet(&[700, 20, 350, 801]);
    let mut waves = Waves::new(0);
    assert_eq!(waves.step(&plan, &machines, 0), 21);
    assert_eq!(waves.step(&plan, &machines, 500), 21, "nobody has activated");
    activate(&mut machines, 21, |_| MachineState::Active);
    assert_eq!(waves.step(&plan, &machines, 501), 21, "the bake begins");
    assert_eq!(waves.step(&plan, &machines, 510), 21);
    assert_eq!(waves.step(&plan, &machines, 511), 351);
    activate(&mut machines, 351, |_| MachineState::Active);
    waves.step(&plan, &machines, 512);
    assert_eq!(waves.step(&plan, &machines, 522), ALL_PERMILLE);
}

#[test]
fn a_bake_that_turns_bad_begins_anew() {
    let plan = RolloutPlan { bake_s: 10, max_failed_permille: 500, ..plan(&[10]) };
    let mut machines = fleet(&[1, 500, 600, 700]);
    let mut waves = Waves::new(0);
    waves.step(&plan, &machines, 0);
    machines[0].state = MachineState::Active;
    waves.step(&plan, &machines, 1);
    machines[0].state = MachineState::RolledBack;
    assert_eq!(waves.step(&plan, &machines, 50), 2);
    machines[0].state = MachineState::Active;
    assert_eq!(waves.step(&plan, &machines, 51), 2);
    assert_eq!(waves.step(&plan, &machines, 61), ALL_PERMILLE);
}

#[test]
fn a_rollback_and_a_plan_without_waves_open_all_at_once() {
    let rollback = RolloutPlan { rollback: true, bake_s: 99, ..plan(&[10, 100]) };
    assert_eq!(Waves::new(0).step(&rollback, &fleet(&[1, 2, 3]), 0), ALL_PERMILLE);
    assert_eq!(Waves::new(0).step(&plan(&[]), &fleet(&[]), 0), ALL_PERMILLE);
    assert_eq!(Waves::new(0).step(&plan(&[10]), &fleet(&[]), 0), 0, "nobody is known yet");
}

#[test]
fn failures_above_the_limit_halt_and_fail() {
    let plan = RolloutPlan { max_failed_permille: 100, ..plan(&[200]) };
    let mut machines = fleet(&[0, 100, 200, 300, 400, 500, 600, 700, 800, 900]);
    let mut waves = Waves::new(0);
    let open = waves.step(&plan, &machines, 0);
    assert_eq!(open, 101);
    // One of ten may fail, and the other of its wave carries it on.
    machines[0].state = MachineState::RolledBack;
    machines[1].state = MachineState::Active;
    assert_eq!(waves.step(&plan, &machines, 1), ALL_PERMILLE);
    let mut waves = Waves::new(open);
    machines[1].state = MachineState::Failed;
    assert_eq!(waves.step(&plan, &machines, 10_000), open);
    let counts = Counts::of(machines.iter().map(|machine| machine.state));
    assert!(counts.is_halted(&plan));
    assert_eq!(outcome(&plan, &counts, 1), RolloutStatus::Failed);
}

#[test]
fn what_another_region_process_opened_stays_open() {
    let plan = plan(&[10, 100, 500]);
    let machines = fleet(&[700, 20, 350, 801, 402, 955, 512, 66]);
    let mut waves = Waves::new(0);
    waves.heard(67);
    assert_eq!(waves.step(&plan, &machines, 0), 67);
    waves.heard(21);
    assert_eq!(waves.open_permille(), 67);
    assert_eq!(Waves::new(u16::MAX).open_permille(), ALL_PERMILLE);
}

#[test]
fn a_rollout_ends_by_its_deadline() {
    let plan = RolloutPlan { deadline_s: 60, max_failed_permille: 250, ..RolloutPlan::default() };
    let counts = |machines, active, failed| Counts { machines, active, failed };
    assert_eq!(outcome(&plan, &counts(4, 3, 0), 59), RolloutStatus::Running);
    assert_eq!(outcome(&plan, &counts(4, 3, 0), 60), RolloutStatus::Succeeded, "one unreachable");
    assert_eq!(outcome(&plan, &counts(4, 2, 0), 60), RolloutStatus::Failed, "two unreachable");
    assert_eq!(outcome(&plan, &counts(4, 3, 1), 1), RolloutStatus::Succeeded);
    assert_eq!(outcome(&plan, &counts(4, 4, 0), 1), RolloutStatus::Succeeded);
    assert_eq!(outcome(&plan, &counts(0, 0, 0), 1), RolloutStatus::Running);
    assert_eq!(outcome(&plan, &counts(0, 0, 0), 60), RolloutStatus::Failed, "for nobody");
    let lax = RolloutPlan { max_failed_permille: 1_000, ..plan.clone() };
    assert_eq!(outcome(&lax, &counts(2, 0, 2), 1), RolloutStatus::Failed, "nobody succeeded");
    assert_eq!(settled(&plan, MachineState::Fetching, 59), MachineState::Fetching);
    assert_eq!(settled(&plan, MachineState::Fetching, 60), MachineState::Unreachable);
    assert_eq!(settled(&plan, MachineState::Active, 60), MachineState::Active);
    assert_eq!(settled(&plan, MachineState::RolledBack, 60), MachineState::RolledBack);
}

#[test]
fn regions_add_up() {
    let one = Counts { machines: 3, active: 2, failed: 1 };
    let sum: Counts = [one, one, Counts::default()].into_iter().sum();
    assert_eq!(sum, Counts { machines: 6, active: 4, failed: 2 });
    assert_eq!(Counts { machines: 1, active: 2, failed: 3 }.pending(), 0, "counts that contradict");
}

proptest! {
    #[test]
    fn every_wave_adds_a_machine(
        ranks in prop::collection::vec(0..1_000u16, 0..60),
        waves in prop::collection::vec(0..1_100u16, 0..8),
    ) {
        let all = thresholds(&plan(&waves), ranks.iter().copied());
        prop_assert_eq!(all.last(), Some(&ALL_PERMILLE));
        let mut before = 0;
        for threshold in all {
            prop_assert!(threshold > before || ranks.is_empty());
            let added = ranks.iter().filter(|rank| (before..threshold).contains(*rank)).count();
            prop_assert!(added >= 1 || ranks.is_empty(), "{before}..{threshold} adds nobody");
            before = threshold;
        }
    }

    #[test]
    fn rollouts_never_skip_a_bad_wave_and_always_end(
        ranks in prop::collection::vec(0..1_000u16, 1..40),
        mut waves in prop::collection::vec(1..1_000u16, 0..6),
        bake_s in 0..20u32,
        max_failed_permille in 0..1_000u16,
        bad in any::<u64>(),
        silent in any::<u64>(),
    ) {
        waves.sort_unstable();
        let plan = RolloutPlan {
            bake_s, max_failed_permille, deadline_s: 400, ..plan(&waves)
        };
        let bit = |bits: u64, rank: u16| bits >> (rank % 64) & bits.rotate_left(13) >> (rank % 64) & 1 == 1;
        let mut machines = fleet(&ranks);
        let (mut state, mut open) = (Waves::new(0), 0);
        let mut ended = None;
        for second in 0..=400 {
            let halted = Counts::of(machines.iter().map(|m| m.state)).is_halted(&plan);
            let newest = (state, open);
            let now = state.step(&plan, &machines, second);
            prop_assert!(now >= open, "never closed");
            if now > open && open > 0 {
                prop_assert!(!halted, "opened above the limit");
                let success = |m: &&Machine| m.rank < newest.1 && m.state == MachineState::Active;
                prop_assert!(machines.iter().any(|m| success(&m)), "opened without a success");
                prop_assert!(machines.iter().any(|m| (open..now).contains(&m.rank)) || now == ALL_PERMILLE);
            }
            open = now;
            activate(&mut machines, open, |rank| match (bit(silent, rank), bit(bad, rank)) {
                (true, _) => MachineState::Activating,
                (_, true) => MachineState::RolledBack,
                _ => MachineState::Active,
            });
            let counts = Counts::of(machines.iter().map(|m| m.state));
            let status = outcome(&plan, &counts, second);
            if status != RolloutStatus::Running {
                prop_assert!(ended.is_none_or(|before| before == status), "an end that changed");
                ended = Some(status);
                if status == RolloutStatus::Succeeded {
                    prop_assert!(counts.active > 0);
                }
            }
        }
        prop_assert!(ended.is_some(), "by the deadline");
    }
}
