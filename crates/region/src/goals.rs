//! The region's goals: signed plain files, so that they can be served with the coordinator away.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, RwLock},
};

use anyhow::Context as _;
use shoal_pki::Trust;
use shoal_proto::{
    AppName, Revision, codec,
    goal::{GOAL_MAX_BYTES, Goal, SignedGoal},
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
    dir: PathBuf,
    trust: Trust,
    known: RwLock<BTreeMap<AppName, KnownGoal>>,
    /// Revisions whose rollouts are paused or ended badly; none until a coordinator has said so.
    halted: Mutex<Option<BTreeSet<(AppName, Revision)>>>,
}

impl Goals {
    /// Reads the goals in `dir`; a file that is not a valid goal is set aside and said in the log.
    pub(crate) fn open(dir: PathBuf, trust: Trust) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let mut known = BTreeMap::new();
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "goal") {
                continue;
            }
            let read = || -> anyhow::Result<KnownGoal> {
                let signed: SignedGoal = codec::decode(&std::fs::read(&path)?, GOAL_MAX_BYTES)?;
                Ok(KnownGoal { goal: Arc::new(trust.open_goal(&signed)?), signed })
            };
            match read() {
                Ok(goal) => {
                    known.insert(goal.goal.app.clone(), goal);
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), error = format!("{error:#}"), "goal file is not valid: set aside");
                    let _ = std::fs::rename(&path, path.with_extension("goal.invalid"));
                }
            }
        }
        Ok(Self { dir, trust, known: RwLock::new(known), halted: Mutex::default() })
    }

    /// Takes a goal from anywhere, if it is valid and newer; it is on disk before it is served.
    pub(crate) fn accept(&self, signed: &SignedGoal) -> Accepted {
        let goal = match self.trust.open_goal(signed) {
            Ok(goal) => Arc::new(goal),
            Err(error) => return Accepted::Refused(error.to_string()),
        };
        let mut known = self.known.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if known.get(&goal.app).is_some_and(|known| known.goal.revision >= goal.revision) {
            return Accepted::Old;
        }
        let path = self.dir.join(format!("{}.goal", goal.app));
        let kept = codec::encode(signed, GOAL_MAX_BYTES)
            .map_err(std::io::Error::other)
            .and_then(|bytes| shoal_process::write_atomic(&path, &bytes));
        if let Err(error) = kept {
            return Accepted::NotKept(format!("cannot keep it in {}: {error}", path.display()));
        }
        tracing::info!(app = %goal.app, revision = %goal.revision, artifact = %goal.artifact, "goal");
        known.insert(goal.app.clone(), KnownGoal { goal, signed: signed.clone() });
        Accepted::Taken
    }

    /// Every goal, by app.
    pub(crate) fn all(&self) -> Vec<KnownGoal> {
        let known = self.known.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        known.values().cloned().collect()
    }

    /// Replaces the set of halted revisions.
    pub(crate) fn set_halted(&self, halted: impl IntoIterator<Item = (AppName, Revision)>) {
        *self.halted.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
            Some(halted.into_iter().collect());
    }

    /// Whether a rollout must open no further wave: so must all before the first answer of a coordinator.
    pub(crate) fn is_halted(&self, app: &AppName, revision: Revision) -> bool {
        let halted = self.halted.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        halted.as_ref().is_none_or(|halted| halted.contains(&(app.clone(), revision)))
    }
}
