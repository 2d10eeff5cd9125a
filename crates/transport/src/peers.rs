//! Which connection is the pair's: the rules, without sockets.
//!
//! There is at most one slot a peer: dialling, or connected. A *dial* begins by taking the slot. A *claim*
//! by a peer that dialled is judged by [`Peers::claim`]:
//!
//! | the slot | lesser peer claims | greater peer claims |
//! |---|---|---|
//! | empty, or its connection is closed | taken | taken |
//! | dialling | taken; the callers of the dial get it | waits for the dial's end |
//! | connected, dialled by the peer | taken over: the peer has lost the old one | the same |
//! | connected, dialled here | taken over: the peer has lost the old one | duplicate, unless old |
//!
//! A peer that holds a connection does not dial, hence "has lost". The one exception is a greater
//! peer whose dial crossed with ours: ours is kept. That can only be while ours is young, so an old
//! connection gives way to any claim.

use std::{collections::HashMap, time::Duration};

use shoal_proto::{NodeId, peer::CloseReason};
use tokio::sync::watch;

use crate::{
    config::{WINDOW_MAX_BYTES, WINDOW_MIN_BYTES},
    connection::Connection,
    error::ConnectError,
};

/// How a dial ended.
pub(crate) type Outcome = Result<Connection, ConnectError>;

/// Resolves to the outcome of somebody's dial.
pub(crate) type Waiter = watch::Receiver<Option<Outcome>>;

enum Slot {
    Dialling { attempt: u64, outcome: watch::Sender<Option<Outcome>> },
    Connected(Connection),
}

/// What to do for a caller who wants a connection.
pub(crate) enum Want {
    /// Here it is.
    Have(Connection),
    /// Somebody is dialling.
    Join(Waiter),
    /// Dial under this attempt's number. The waiter resolves when the slot is decided, be it by this dial
    /// or by the peer's.
    Dial(u64, Waiter),
    /// There is no more room.
    Full,
}

/// What to do with a peer's claim.
pub(crate) enum Claim {
    /// It is the pair's connection now.
    Taken,
    /// Ask again once the dial is decided.
    Wait(Waiter),
    /// Close it with this reason.
    Close(CloseReason),
}

/// The slots.
pub(crate) struct Peers {
    me: NodeId,
    max_connections: usize,
    receive_budget_bytes: u64,
    /// How long a dial may take from its begin to its end, at both ends together.
    crossing: Duration,
    slots: HashMap<NodeId, Slot>,
    connected: usize,
    attempts: u64,
    window_bytes: u64,
}

impl Peers {
    pub(crate) fn new(
        me: NodeId,
        max_connections: usize,
        receive_budget_bytes: u64,
        crossing: Duration,
    ) -> Self {
        Self {
            me,
            max_connections,
            receive_budget_bytes,
            crossing,
            slots: HashMap::new(),
            connected: 0,
            attempts: 0,
            window_bytes: 0,
        }
    }

    /// The connection to `node`, if it is up.
    pub(crate) fn get(&self, node: &NodeId) -> Option<&Connection> {
        match self.slots.get(node) {
            Some(Slot::Connected(connection)) if !connection.is_closed() => Some(connection),
            _ => None,
        }
    }

    /// All connections that are up.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Connection> {
        self.slots.values().filter_map(|slot| match slot {
            Slot::Connected(connection) if !connection.is_closed() => Some(connection),
            _ => None,
        })
    }

    /// Somebody wants a connection to `node`.
    pub(crate) fn want(&mut self, node: NodeId) -> Want {
        match self.slots.get(&node) {
            Some(Slot::Connected(connection)) if !connection.is_closed() => {
                return Want::Have(connection.clone());
            }
            Some(Slot::Dialling { outcome, .. }) => return Want::Join(outcome.subscribe()),
            _ => {}
        }
        self.vacate(&node);
        if self.connected >= self.max_connections {
            return Want::Full;
        }
        self.attempts += 1;
        let (outcome, waiter) = watch::channel(None);
        self.slots.insert(node, Slot::Dialling { attempt: self.attempts, outcome });
        Want::Dial(self.attempts, waiter)
    }

    /// A dial was welcomed; false when its slot has been decided otherwise meanwhile.
    pub(crate) fn dialled(&mut self, attempt: u64, connection: &Connection) -> bool {
        let node = connection.node();
        match self.slots.remove(&node) {
            Some(Slot::Dialling { attempt: mine, outcome }) if mine == attempt => {
                self.settle(connection.clone());
                outcome.send_replace(Some(Ok(connection.clone())));
                true
            }
            Some(slot) => {
                self.slots.insert(node, slot);
                false
            }
            None => false,
        }
    }

    /// A dial failed.
    pub(crate) fn dial_failed(&mut self, node: &NodeId, attempt: u64, error: ConnectError) {
        match self.slots.remove(node) {
            Some(Slot::Dialling { attempt: mine, outcome }) if mine == attempt => {
                outcome.send_replace(Some(Err(error)));
            }
            Some(slot) => drop(self.slots.insert(*node, slot)),
            None => {}
        }
    }

    /// A peer that dialled claims the pair.
    pub(crate) fn claim(&mut self, connection: &Connection) -> Claim {
        let node = connection.node();
        if node == self.me {
            return Claim::Close(CloseReason::WrongPeer);
        }
        if connection.is_closed() {
            // Its dialler gave it up while it waited; it must not push another one out.
            return Claim::Close(CloseReason::Duplicate);
        }
        let lesser = node < self.me;
        match self.slots.get(&node) {
            Some(Slot::Dialling { outcome, .. }) if !lesser => {
                return Claim::Wait(outcome.subscribe());
            }
            Some(Slot::Connected(held))
                if held.dialled() && !lesser && !held.is_closed() && held.age() < self.crossing =>
            {
                return Claim::Close(CloseReason::Duplicate);
            }
            _ => {}
        }
        let outcome = match self.vacate(&node) {
            Some(Slot::Dialling { outcome, .. }) => Some(outcome),
            Some(Slot::Connected(old)) => {
                old.close(CloseReason::Duplicate);
                None
            }
            None => None,
        };
        if self.connected >= self.max_connections {
            if let Some(outcome) = outcome {
                outcome.send_replace(Some(Err(ConnectError::Full)));
            }
            return Claim::Close(CloseReason::Full);
        }
        self.settle(connection.clone());
        if let Some(outcome) = outcome {
            outcome.send_replace(Some(Ok(connection.clone())));
        }
        Claim::Taken
    }

    /// A connection ended.
    pub(crate) fn closed(&mut self, connection: &Connection) {
        let node = connection.node();
        if matches!(self.slots.get(&node), Some(Slot::Connected(held)) if held == connection) {
            self.vacate(&node);
            self.share_window(None);
        }
    }

    /// Shares another receive budget from now on.
    pub(crate) fn set_receive_budget(&mut self, bytes: u64) {
        self.receive_budget_bytes = bytes;
        self.share_window(None);
    }

    fn settle(&mut self, connection: Connection) {
        let previous = self.slots.insert(connection.node(), Slot::Connected(connection.clone()));
        debug_assert!(previous.is_none());
        self.connected += 1;
        self.share_window(Some(&connection));
    }

    fn vacate(&mut self, node: &NodeId) -> Option<Slot> {
        let slot = self.slots.remove(node);
        if matches!(slot, Some(Slot::Connected(_))) {
            self.connected -= 1;
        }
        slot
    }

    /// Gives each connection its share of the receive budget. The count is rounded up to a power of two, so
    /// that not every newcomer changes everybody's share.
    fn share_window(&mut self, new: Option<&Connection>) {
        let share = window_bytes(self.receive_budget_bytes, self.connected);
        if share != self.window_bytes {
            self.window_bytes = share;
            self.all().for_each(|connection| connection.set_receive_window(share));
        } else if let Some(connection) = new {
            connection.set_receive_window(share);
        }
    }
}

/// One connection's share of the receive budget, in bytes.
fn window_bytes(budget: u64, connections: usize) -> u64 {
    let shares = connections.max(1).next_power_of_two() as u64;
    (budget / shares).clamp(WINDOW_MIN_BYTES, WINDOW_MAX_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receive_budget_is_shared() {
        let budget = 32 << 20;
        assert_eq!(window_bytes(budget, 0), WINDOW_MAX_BYTES);
        assert_eq!(window_bytes(budget, 1), WINDOW_MAX_BYTES);
        assert_eq!(window_bytes(budget, 40), 512 << 10);
        assert_eq!(window_bytes(budget, 100_000), WINDOW_MIN_BYTES);
        for connections in 1..=512 {
            assert!(window_bytes(budget, connections) * connections as u64 <= budget);
        }
    }
}
