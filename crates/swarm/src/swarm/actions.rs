//! What waits to be done. What all neighbours are told takes one place, however many they are.

use alloc::{collections::VecDeque, sync::Arc};

use shoal_proto::{Bitmap, PieceIndex};

use super::{
    neighbours::Slots,
    state::{State, States},
};
use crate::event::{Action, SwarmKey};

#[derive(Debug, Clone)]
enum Todo {
    Act(Action),
    /// One [`Action::AnnounceHave`] for each of these slots.
    TellHave {
        swarm: SwarmKey,
        pieces: Arc<[PieceIndex]>,
        to: Slots,
    },
    /// One [`Action::Announce`] for each of these slots.
    TellAll {
        swarm: SwarmKey,
        have: Arc<Bitmap>,
        to: Slots,
    },
}

impl Todo {
    /// Takes one action out; none when there is no more in it.
    fn next(&mut self, states: &States) -> Option<Action> {
        match self {
            Self::Act(_) => None,
            Self::TellHave { swarm, pieces, to } => {
                let peer = states.get(*swarm)?.take_slot(to)?;
                Some(Action::AnnounceHave { peer, swarm: *swarm, pieces: pieces.clone() })
            }
            Self::TellAll { swarm, have, to } => {
                let peer = states.get(*swarm)?.take_slot(to)?;
                Some(Action::Announce { peer, swarm: *swarm, have: have.clone() })
            }
        }
    }
}

/// The actions of an event, in order.
#[derive(Debug, Clone, Default)]
pub(super) struct Actions {
    queue: VecDeque<Todo>,
    /// How many of them are for several neighbours.
    wide: usize,
}

impl Actions {
    pub(super) fn push(&mut self, action: Action) {
        self.queue.push_back(Todo::Act(action));
    }

    pub(super) fn tell_have(&mut self, swarm: SwarmKey, pieces: Arc<[PieceIndex]>, to: Slots) {
        self.wide += 1;
        self.queue.push_back(Todo::TellHave { swarm, pieces, to });
    }

    pub(super) fn tell_all(&mut self, state: &State, to: Slots) {
        if to != 0 {
            self.wide += 1;
            let have = Arc::new(state.held.clone());
            self.queue.push_back(Todo::TellAll { swarm: state.key, have, to });
        }
    }

    pub(super) fn pop(&mut self, states: &States) -> Option<Action> {
        loop {
            let todo = self.queue.front_mut()?;
            if let Some(action) = todo.next(states) {
                return Some(action);
            }
            let done = self.queue.pop_front();
            if self.queue.is_empty() {
                // What the allocator got back last is in the cache, and goes to whoever asks next.
                self.queue = VecDeque::new();
            }
            match done {
                Some(Todo::Act(action)) => return Some(action),
                _ => self.wide -= 1,
            }
        }
    }

    /// Names the neighbours that are meant, before they may change.
    pub(super) fn settle(&mut self, states: &States) {
        if self.wide == 0 {
            return;
        }
        let mut queue = VecDeque::new();
        while let Some(action) = self.pop(states) {
            queue.push_back(Todo::Act(action));
        }
        self.queue = queue;
    }
}
