//! Which machines of a region may activate by now.

use alloc::vec::Vec;

use shoal_proto::{goal::RolloutPlan, state::MachineState};

use crate::outcome::Counts;

/// The threshold under which every rank lies.
pub const ALL_PERMILLE: u16 = 1_000;

/// A known machine of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Its [`shoal_proto::region::rollout_rank`].
    pub rank: u16,
    /// Its newest state for this goal; [`MachineState::Waiting`] when it has not reported.
    pub state: MachineState,
}

/// The ranks below which each wave of `plan` lets machines activate, rising, the last one
/// [`ALL_PERMILLE`]. `ranks` are those of the known machines, in any order. Each threshold but the last
/// adds at least one known machine to the one before; where two waves cannot be told apart (fewer
/// machines than waves, or equal ranks), they are one.
#[must_use]
pub fn thresholds(plan: &RolloutPlan, ranks: impl IntoIterator<Item = u16>) -> Vec<u16> {
    let mut ranks: Vec<u16> = ranks.into_iter().collect();
    ranks.sort_unstable();
    let mut waves = Vec::new();
    if !plan.rollback {
        let mut added = 0;
        for permille in &plan.waves_permille {
            let part = (ranks.len() * usize::from((*permille).min(ALL_PERMILLE))).div_ceil(1_000);
            added = part.max(added + 1);
            if added >= ranks.len() {
                break;
            }
            let threshold = (ranks[added - 1] + 1).min(ALL_PERMILLE);
            // Machines of an equal rank come along, and the next wave counts from there.
            added = ranks.partition_point(|rank| *rank < threshold);
            if added >= ranks.len() {
                break;
            }
            waves.push(threshold);
        }
    }
    waves.push(ALL_PERMILLE);
    waves
}

/// What a region has opened of one rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Waves {
    open_permille: u16,
    previous_permille: u16,
    good_since_s: Option<u64>,
}

impl Waves {
    /// A rollout of which `open_permille` was open before: 0 for a new one, or what a kept or received
    /// statement says.
    #[must_use]
    pub fn new(open_permille: u16) -> Self {
        Self { open_permille: open_permille.min(ALL_PERMILLE), ..Self::default() }
    }

    /// Machines whose rank is below this may activate.
    #[must_use]
    pub fn open_permille(&self) -> u16 {
        self.open_permille
    }

    /// Takes over what another region process has opened; never closes anything.
    pub fn heard(&mut self, open_permille: u16) {
        let open_permille = open_permille.min(ALL_PERMILLE);
        if open_permille > self.open_permille {
            self.open(open_permille);
        }
    }

    fn open(&mut self, permille: u16) {
        *self = Self {
            open_permille: permille,
            previous_permille: self.open_permille,
            good_since_s: None,
        };
    }

    /// Decides, `elapsed_s` seconds after the rollout began, from the region's known machines; call it
    /// when a report came and about once a second. Returns what is open now.
    ///
    /// The next wave opens when the region is within its failure limit, at least one machine and at
    /// least half of the newest wave are ACTIVE, all that is still pending in open waves could fail
    /// without passing the limit, and all this has held for the plan's `bake_s`. A rollback and a plan
    /// without waves open everything at once.
    pub fn step(&mut self, plan: &RolloutPlan, machines: &[Machine], elapsed_s: u64) -> u16 {
        let all = Counts::of(machines.iter().map(|machine| machine.state));
        if plan.rollback || plan.waves_permille.is_empty() {
            self.heard(ALL_PERMILLE);
        } else if self.open_permille < ALL_PERMILLE && all.machines > 0 && !all.is_halted(plan) {
            if self.open_permille == 0 {
                self.open_next(plan, machines);
            } else if self.is_good(plan, machines, all) {
                let since = *self.good_since_s.get_or_insert(elapsed_s);
                if elapsed_s.saturating_sub(since) >= u64::from(plan.bake_s) {
                    self.open_next(plan, machines);
                }
            } else {
                self.good_since_s = None;
            }
        }
        self.open_permille
    }

    fn is_good(&self, plan: &RolloutPlan, machines: &[Machine], all: Counts) -> bool {
        let of = |from: u16| {
            let within = from..self.open_permille;
            let those = machines.iter().filter(move |machine| within.contains(&machine.rank));
            Counts::of(those.map(|machine| machine.state))
        };
        let open = of(0);
        let newest = match of(self.previous_permille) {
            // The wave's machines have left the region: what is open in all must do.
            none if none.machines == 0 => open,
            some => some,
        };
        newest.active >= 1
            && newest.active >= newest.machines.div_ceil(2)
            && all.failed + open.pending() <= all.failed_max(plan)
    }

    fn open_next(&mut self, plan: &RolloutPlan, machines: &[Machine]) {
        let all = thresholds(plan, machines.iter().map(|machine| machine.rank));
        // A threshold between machines that came since may add nobody: skip it.
        let adds = |threshold: &u16| {
            let within = self.open_permille..*threshold;
            *threshold == ALL_PERMILLE || machines.iter().any(|m| within.contains(&m.rank))
        };
        let next = all.into_iter().find(|next| *next > self.open_permille && adds(next));
        self.open(next.unwrap_or(ALL_PERMILLE));
    }
}
