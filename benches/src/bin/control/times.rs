//! What many calls took.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

/// What calls of one kind took, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Spread {
    pub(crate) count: usize,
    pub(crate) median_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) max_ms: f64,
}

impl Spread {
    pub(crate) fn of(mut all: Vec<Duration>) -> Self {
        all.sort_unstable();
        let at = |index: usize| all.get(index).map_or(0.0, |time| time.as_secs_f64() * 1_000.0);
        let last = all.len().saturating_sub(1);
        Self {
            count: all.len(),
            median_ms: at(all.len() / 2),
            p99_ms: at((all.len() * 99 / 100).min(last)),
            max_ms: at(last),
        }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { count, median_ms, p99_ms, max_ms } = self;
        write!(
            f,
            "median {median_ms:>7.1} ms  p99 {p99_ms:>7.1} ms  most {max_ms:>7.1} ms  of {count}"
        )
    }
}

/// What calls took, by their name.
#[derive(Debug, Default)]
pub(crate) struct Times(BTreeMap<&'static str, Vec<Duration>>);

impl Times {
    pub(crate) fn add(&mut self, name: &'static str, took: Duration) {
        self.0.entry(name).or_default().push(took);
    }

    pub(crate) fn merge(&mut self, other: Self) {
        for (name, all) in other.0 {
            self.0.entry(name).or_default().extend(all);
        }
    }

    pub(crate) fn spreads(self) -> BTreeMap<&'static str, Spread> {
        self.0.into_iter().map(|(name, all)| (name, Spread::of(all))).collect()
    }
}
