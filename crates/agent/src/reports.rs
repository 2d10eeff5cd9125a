//! What this machine has to say about each app: the present state, told until it is kept.

use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use shoal_proto::{
    AppName, ArtifactId, Revision,
    region::{FetchProgress, MachineReport, REASON_MAX_BYTES, reports_digest},
    state::MachineState,
};
use tokio::sync::Notify;

struct Entry {
    report: MachineReport,
    since: Instant,
    /// The sequence that a region process has said it keeps.
    kept: Option<u64>,
}

/// The present report of each app.
#[derive(Default)]
pub(crate) struct Reports {
    entries: Mutex<BTreeMap<AppName, Entry>>,
    changed: Notify,
}

/// How much a sequence jumps when it is read from disk after a restart: more than the progress reports
/// that can have gone out since it was written.
const RESTART_SEQUENCE_JUMP: u64 = 1 << 20;

impl Reports {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<AppName, Entry>> {
        self.entries.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes later reports of `app` follow those of an earlier life.
    ///
    /// A machine that was set up anew has no earlier sequence: it begins at the time of day, which is above what
    /// it counted before. A clock that is wrong costs no more than that.
    pub(crate) fn resume(&self, app: &AppName, sequence: u64) {
        let since_epoch = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        let now_ms = u64::try_from(since_epoch.as_millis()).unwrap_or(0);
        let report = MachineReport {
            app: app.clone(),
            revision: Revision::default(),
            artifact: ArtifactId::EMPTY,
            state: MachineState::Waiting,
            reason: None,
            progress: FetchProgress::default(),
            sequence: (sequence + RESTART_SEQUENCE_JUMP).max(now_ms),
            age_ms: 0,
        };
        // Revision 0 is no goal's: it is never sent, only counted from.
        self.lock().insert(app.clone(), Entry { report, since: Instant::now(), kept: None });
    }

    /// Sets the state of `app`; returns the report's sequence.
    pub(crate) fn set(
        &self,
        app: &AppName,
        revision: Revision,
        artifact: ArtifactId,
        state: MachineState,
        reason: Option<String>,
        progress: Option<FetchProgress>,
    ) -> u64 {
        let mut entries = self.lock();
        let before = entries.get(app);
        let sequence = before.map_or(0, |entry| entry.report.sequence) + 1;
        let same_goal = before.filter(|entry| entry.report.revision == revision);
        let progress =
            progress.or(same_goal.map(|entry| entry.report.progress)).unwrap_or_default();
        let since = same_goal
            .filter(|entry| entry.report.state == state)
            .map_or_else(Instant::now, |entry| entry.since);
        if same_goal.is_none_or(|entry| entry.report.state != state) {
            tracing::info!(%app, %revision, %state, reason = reason.as_deref(), "state");
        }
        let reason = reason.map(|mut reason| {
            let mut end = reason.len().min(REASON_MAX_BYTES);
            while !reason.is_char_boundary(end) {
                end -= 1;
            }
            reason.truncate(end);
            reason
        });
        let report = MachineReport {
            app: app.clone(),
            revision,
            artifact,
            state,
            reason,
            progress,
            sequence,
            age_ms: 0,
        };
        entries.insert(app.clone(), Entry { report, since, kept: None });
        drop(entries);
        self.changed.notify_one();
        sequence
    }

    /// The reports that no region process keeps yet, with their ages.
    pub(crate) fn pending(&self) -> Vec<MachineReport> {
        self.lock()
            .values()
            .filter(|entry| entry.kept != Some(entry.report.sequence))
            .filter(|entry| entry.report.revision != Revision::default())
            .map(|entry| MachineReport {
                age_ms: u64::try_from(entry.since.elapsed().as_millis()).unwrap_or(u64::MAX),
                ..entry.report.clone()
            })
            .collect()
    }

    /// A region process keeps these.
    pub(crate) fn kept(&self, reports: &[MachineReport]) {
        let mut entries = self.lock();
        for report in reports {
            if let Some(entry) = entries.get_mut(&report.app) {
                entry.kept = Some(report.sequence);
            }
        }
    }

    /// The region lost what it knew: all is to be told again.
    pub(crate) fn tell_again(&self) {
        self.lock().values_mut().for_each(|entry| entry.kept = None);
        self.changed.notify_one();
    }

    /// The digest that a poll names: of what the region should know.
    pub(crate) fn digest(&self) -> u64 {
        reports_digest(self.lock().values().filter_map(|entry| {
            let sequence = entry.kept?;
            Some((&entry.report.app, entry.report.revision, sequence))
        }))
    }

    /// How many apps are in each state.
    pub(crate) fn states(&self) -> BTreeMap<MachineState, i64> {
        let mut counts = BTreeMap::new();
        for entry in
            self.lock().values().filter(|entry| entry.report.revision != Revision::default())
        {
            *counts.entry(entry.report.state).or_default() += 1;
        }
        counts
    }

    /// Waits until something changed since the last wait, then a little longer for more.
    pub(crate) async fn changed(&self, gather: Duration) {
        self.changed.notified().await;
        tokio::time::sleep(gather).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_kept_is_no_longer_told() {
        let reports = Reports::default();
        let app = AppName::new("web").unwrap();
        let revision = Revision { epoch: 0, number: 1 };
        let set = |state| {
            reports.set(&app, revision, ArtifactId::EMPTY, state, None, None);
        };
        set(MachineState::Fetching);
        let told = reports.pending();
        set(MachineState::Verified);
        reports.kept(&told);
        let next = reports.pending();
        assert_eq!(next[0].state, MachineState::Verified, "a newer state is still to be told");
        assert!(next[0].sequence > told[0].sequence);
        reports.kept(&next);
        assert!(reports.pending().is_empty());
        let digest = reports.digest();
        reports.tell_again();
        assert_eq!(reports.pending().len(), 1);
        assert_ne!(reports.digest(), digest);
    }

    #[test]
    fn reports_of_a_new_life_follow_those_of_the_old() {
        let reports = Reports::default();
        let app = AppName::new("web").unwrap();
        reports.resume(&app, 7);
        assert!(reports.pending().is_empty());
        let revision = Revision { epoch: 0, number: 1 };
        let long = "é".repeat(REASON_MAX_BYTES);
        let state = MachineState::Failed;
        assert!(reports.set(&app, revision, ArtifactId::EMPTY, state, Some(long), None) > 7);
        assert!(reports.pending()[0].reason.as_ref().unwrap().len() <= REASON_MAX_BYTES);
    }
}
