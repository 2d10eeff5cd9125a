//! The machines' labels in memory: how many machines a goal is for, without reading them all each time.
//!
//! The database numbers every change of a machine's labels; this follows the numbers, so that several
//! coordinators on one database all see every machine.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use shoal_proto::{
    MachineName, RegionName,
    goal::{Labels, Selector},
};
use shoal_queue::{MachineCursor, Queue, QueueError, Targets};
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
    /// [`Queue::machines_forgotten`] at the last time that all were read.
    forgotten: i64,
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
        let mut state = self.state.lock().await;
        // Those that were forgotten are in no number of a change: all are read again.
        let forgotten = queue.machines_forgotten().await?;
        if state.forgotten != forgotten {
            *state = State { forgotten, ..State::default() };
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
