//! How a rollout ends.

use shoal_proto::{
    goal::RolloutPlan,
    state::{MachineState, RolloutStatus},
};

/// How the machines of a rollout stand, of one region or of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Machines that it is for and that are known.
    pub machines: u32,
    /// Those that run the build.
    pub active: u32,
    /// Those that failed, went back or could not be reached.
    pub failed: u32,
}

impl Counts {
    /// Counts machines by their states.
    #[must_use]
    pub fn of(states: impl IntoIterator<Item = MachineState>) -> Self {
        let mut counts = Self::default();
        for state in states {
            counts.machines += 1;
            counts.active += u32::from(state.is_success());
            counts.failed += u32::from(state.is_failure());
        }
        counts
    }

    /// Machines that are neither active nor failed yet.
    #[must_use]
    pub fn pending(&self) -> u32 {
        self.machines.saturating_sub(self.active.saturating_add(self.failed))
    }

    /// The most machines that may fail: the plan's part of all known ones, rounded down.
    #[must_use]
    pub fn failed_max(&self, plan: &RolloutPlan) -> u32 {
        let part = u64::from(self.machines) * u64::from(plan.max_failed_permille.min(1_000));
        (part / 1_000) as u32
    }

    /// Whether more machines failed than may: nothing more is opened.
    #[must_use]
    pub fn is_halted(&self, plan: &RolloutPlan) -> bool {
        self.failed > self.failed_max(plan)
    }
}

impl core::ops::Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            machines: self.machines.saturating_add(other.machines),
            active: self.active.saturating_add(other.active),
            failed: self.failed.saturating_add(other.failed),
        }
    }
}

impl core::iter::Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |sum, next| sum + next)
    }
}

/// A machine's state as the rollout counts it: one that has not ended by the deadline is UNREACHABLE.
#[must_use]
pub fn settled(plan: &RolloutPlan, state: MachineState, elapsed_s: u64) -> MachineState {
    let ended = state.is_success() || state.is_failure();
    if !ended && elapsed_s >= u64::from(plan.deadline_s) {
        MachineState::Unreachable
    } else {
        state
    }
}

/// The state of a rollout that began `elapsed_s` seconds ago: RUNNING, SUCCEEDED or FAILED.
///
/// - FAILED as soon as more machines failed than the plan allows: no later report could mend it.
/// - SUCCEEDED once all machines ended, at least one of them well.
/// - By the deadline the machines that have not ended count as failed, and it is one or the other.
/// - Without any machine it waits for one until the deadline, then it is FAILED: a selector that
///   matches nothing is a mistake that somebody should see.
#[must_use]
pub fn outcome(plan: &RolloutPlan, counts: &Counts, elapsed_s: u64) -> RolloutStatus {
    let late = elapsed_s >= u64::from(plan.deadline_s);
    let counts =
        if late { Counts { failed: counts.failed + counts.pending(), ..*counts } } else { *counts };
    if counts.is_halted(plan) {
        RolloutStatus::Failed
    } else if counts.machines > 0 && counts.pending() == 0 {
        if counts.active > 0 { RolloutStatus::Succeeded } else { RolloutStatus::Failed }
    } else if late {
        RolloutStatus::Failed
    } else {
        RolloutStatus::Running
    }
}
