//! The machines' labels in memory: how many machines a goal is for, without reading them all each time.
//!
//! The database numbers every change of a machine's labels; this follows the numbers, so that several
//! coordinators on one database all see every machine.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Instant,
};

use shoal_proto::{
    MachineName, RegionName,
    goal::{Labels, Selector},
};
use shoal_queue::{MachineCursor, MachineNumbers, Queue, QueueError, Targets};
use tokio::sync::Mutex;

/// How many changed machines are read at once.
const PAGE: u32 = 5_000;

struct Known {
    region: RegionName,
    // Machines of a kind have many labels in common but never all (their own name): not shared.
    labels: Labels,
}

#[derive(Default)]
struct State {
    cursor: MachineCursor,
    /// What the database said of its machines before they were read the last time.
    numbers: MachineNumbers,
    /// When that was asked.
    asked: Option<Instant>,
    machines: HashMap<MachineName, Known>,
}

/// The machines' labels.
#[derive(Clone, Default)]
pub(crate) struct Registry {
    state: Arc<Mutex<State>>,
}

impl Registry {
    /// Takes in what changed. Returns how many machines are known.
    pub(crate) async fn refresh(&self, queue: &Queue) -> Result<usize, QueueError> {
        let wanted = Instant::now();
        let mut state = self.state.lock().await;
        // Somebody has looked meanwhile, later than it was wanted.
        if state.asked.is_some_and(|asked| asked >= wanted) {
            return Ok(state.machines.len());
        }
        let asked = Some(Instant::now());
        let numbers = queue.machine_numbers().await?;
        // Those that were forgotten are in no number of a change: all are read again.
        if state.numbers.forgotten != numbers.forgotten {
            *state = State::default();
        } else if state.numbers == numbers {
            state.asked = asked;
            return Ok(state.machines.len());
        }
        loop {
            let mut cursor = state.cursor.clone();
            let page = queue.machines_changed(&mut cursor, PAGE).await?;
            let last = page.len() < PAGE as usize;
            for machine in page {
                let known = Known { region: machine.region, labels: machine.labels };
                state.machines.insert(machine.name, known);
            }
            state.cursor = cursor;
            if last {
                (state.numbers, state.asked) = (numbers, asked);
                return Ok(state.machines.len());
            }
        }
    }

    /// How many machines of each region match.
    pub(crate) async fn targets(&self, selector: &Selector) -> Targets {
        let state = self.state.lock().await;
        let mut targets = Targets::new();
        for known in state.machines.values().filter(|known| selector.matches(&known.labels)) {
            *targets.entry(known.region.clone()).or_default() += 1;
        }
        targets
    }

    /// The machines that match, by region, but those of the regions in `without`.
    pub(crate) async fn matching(
        &self,
        selector: &Selector,
        without: &BTreeSet<RegionName>,
    ) -> BTreeMap<MachineName, RegionName> {
        let state = self.state.lock().await;
        let matching = state.machines.iter().filter(|(_, known)| {
            !without.contains(&known.region) && selector.matches(&known.labels)
        });
        matching.map(|(name, known)| (name.clone(), known.region.clone())).collect()
    }
}
