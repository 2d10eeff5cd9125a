//! What is counted.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// A snapshot of the counters. All but `peers`, `unverified` and `addresses` only rise.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct GossipStats {
            $($(#[$doc])* pub $name: u64),+
        }

        /// The counters themselves.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter),+
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> GossipStats {
                GossipStats { $($name: self.$name.get()),+ }
            }
        }
    };
}

counters!(
    /// Verified peers that are connected now.
    peers,
    /// Connected peers that are not verified (yet).
    unverified,
    /// Addresses in the book.
    addresses,
    /// Peers that were verified.
    verified,
    /// Peers whose certificate was refused.
    refused,
    /// Peers that were cut off because they showed no certificate in time.
    cut_off,
    /// Peers that were turned away because there was no room.
    turned_away,
    /// Connections that were dialed.
    dials,
    /// Dials that failed.
    dials_failed,
    /// Messages that were sound and new.
    received,
    /// Messages that were not of this release's form.
    malformed,
    /// Messages of an unknown version.
    unknown_version,
    /// Goals whose signature did not hold.
    bad_signature,
    /// Messages that were published.
    published,
    /// Messages that were published again within the duplicate cache's time: not sent.
    repeated,
    /// Messages that found no peer in time.
    unsent,
    /// Events that the process was too slow to take.
    events_dropped,
    /// Gossip of unverified peers that did not fit the gate.
    gate_dropped,
);

/// One counter.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, n: usize) {
        self.0.store(n as u64, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
