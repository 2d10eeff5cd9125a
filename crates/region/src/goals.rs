//! The region's goals: signed plain files, so that they can be served with the coordinator away.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use anyhow::Context as _;
use shoal_goals::{Entry, FileStore, Put};
use shoal_pki::Credentials;
use shoal_proto::{
    AppName, Revision,
    goal::{Goal, SignedGoal},
};

/// A goal and the signed bytes that prove it.
#[derive(Debug, Clone)]
pub(crate) struct KnownGoal {
    pub(crate) goal: Arc<Goal>,
    pub(crate) signed: SignedGoal,
}

/// What became of a goal that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// New: kept on the disk.
    Taken,
    /// Known already, or older than what is known.
    Old,
    /// Not to be believed, and why.
    Refused(String),
    /// Good, but it could not be put on the disk, and why: to be offered again.
    NotKept(String),
}

/// The newest goal of each app.
pub(crate) struct Goals {
    files: FileStore,
    credentials: Credentials,
    known: RwLock<BTreeMap<AppName, KnownGoal>>,
    /// Revisions whose rollouts are paused or ended badly; none until a coordinator has said so.
    halted: Mutex<Option<BTreeSet<(AppName, Revision)>>>,
}

impl Goals {
    /// Reads the goals in `dir`; a file that is not a valid goal is set aside and said in the log.
    pub(crate) fn open(dir: PathBuf, credentials: Credentials) -> anyhow::Result<Self> {
        let trust = credentials.trust();
        let mut known = BTreeMap::new();
        let text = dir.display().to_string();
        let check = |entry: &Entry| {
            trust.open_goal(&entry.signed).map(drop).map_err(|error| error.to_string())
        };
        let files = FileStore::open(dir, shoal_process::write_atomic, check)
            .with_context(|| format!("cannot read the goals in {text}"))?;
        for Entry { app, signed, .. } in files.list_now().entries {
            let goal = Arc::new(trust.open_goal(&signed)?);
            known.insert(app, KnownGoal { goal, signed });
        }
        Ok(Self { files, credentials, known: RwLock::new(known), halted: Mutex::default() })
    }

    /// The embedded store that they are in: what is not valid never gets there.
    pub(crate) fn files(&self) -> &FileStore {
        &self.files
    }

    /// Takes a goal from anywhere, if it is valid and newer; it is on disk before it is served.
    pub(crate) fn accept(&self, signed: &SignedGoal) -> Accepted {
        let trust = self.credentials.trust();
        let goal = match trust.open_goal(signed) {
            Ok(goal) => Arc::new(goal),
            Err(error) => return Accepted::Refused(error.to_string()),
        };
        let (app, revision) = (goal.app.clone(), goal.revision);
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let entry = Entry { app: app.clone(), revision, signed: signed.clone() };
        match self.files.put_now(&entry) {
            Ok(Put::Written) => {}
            // The same goal by a later key: the one that it was signed with is about to go.
            Ok(Put::Stale(stored))
                if stored.signed.goal == signed.goal
                    && trust.is_later_key(signed.key_id, stored.signed.key_id) =>
            {
                if let Err(error) = self.files.put_over(&entry) {
                    return Accepted::NotKept(error.to_string());
                }
                tracing::debug!(%app, %revision, key = signed.key_id, "the goal is signed anew");
            }
            Ok(Put::Known | Put::Stale(_)) => return Accepted::Old,
            Err(error) => return Accepted::NotKept(error.to_string()),
        }
        tracing::info!(%app, %revision, artifact = %goal.artifact, "goal");
        known.insert(app, KnownGoal { goal, signed: signed.clone() });
        Accepted::Taken
    }

    /// Every goal, by app.
    pub(crate) fn all(&self) -> Vec<KnownGoal> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.values().cloned().collect()
    }

    /// The highest epoch of all goals; 0 without any.
    pub(crate) fn highest_epoch(&self) -> u32 {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.values().map(|known| known.goal.revision.epoch).max().unwrap_or_default()
    }

    fn halted(&self) -> MutexGuard<'_, Option<BTreeSet<(AppName, Revision)>>> {
        self.halted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the set of halted revisions.
    pub(crate) fn set_halted(&self, halted: impl IntoIterator<Item = (AppName, Revision)>) {
        let now: BTreeSet<_> = halted.into_iter().collect();
        let before = self.halted().replace(now.clone()).unwrap_or_default();
        for (app, revision) in now.difference(&before) {
            tracing::info!(%app, %revision, "halted: no further wave opens");
        }
        for (app, revision) in before.difference(&now) {
            tracing::info!(%app, %revision, "no longer halted");
        }
    }

    /// Whether a rollout must open no further wave: so must all before the first answer of a coordinator.
    pub(crate) fn is_halted(&self, app: &AppName, revision: Revision) -> bool {
        self.halted().as_ref().is_none_or(|halted| halted.contains(&(app.clone(), revision)))
    }
}
