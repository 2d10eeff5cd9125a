//! The goals that the agent knows: signed plain files, one an app, each checked again when it is read.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use anyhow::Context as _;
use shoal_pki::Credentials;
use shoal_proto::{
    AppName, RegionName, Revision, codec,
    goal::{GOAL_MAX_BYTES, Goal, Labels, SignedGoal},
    region::goals_digest,
};
use tokio::sync::watch;

/// The most apps that one machine follows; more goals are refused.
const APPS_MAX: usize = 1_000;

/// What became of a goal that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// New for this machine: kept, and everyone waiting is told.
    Taken,
    /// Known already, or older than what is known.
    Old,
    /// For other machines.
    NotForUs,
    /// Not to be believed, and why.
    Refused(String),
}

/// A goal and the signed bytes that prove it.
#[derive(Debug, Clone)]
pub(crate) struct KnownGoal {
    pub(crate) goal: Arc<Goal>,
    pub(crate) signed: SignedGoal,
}

/// All goals that concern this machine, the newest of each app.
pub(crate) struct Goals {
    dir: PathBuf,
    credentials: Credentials,
    region: RegionName,
    labels: Labels,
    known: Mutex<BTreeMap<AppName, KnownGoal>>,
    changed: watch::Sender<u64>,
}

impl Goals {
    /// Reads the goals in `dir`. A file that is not a valid goal is moved aside and said in the log.
    pub(crate) fn open(
        dir: PathBuf,
        credentials: Credentials,
        region: RegionName,
        labels: Labels,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&dir)
            .with_context(|| format!("cannot make the directory {}", dir.display()))?;
        let goals = Self {
            dir,
            credentials,
            region,
            labels,
            known: Mutex::default(),
            changed: watch::channel(0).0,
        };
        for entry in std::fs::read_dir(&goals.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "goal") {
                goals.load(&path);
            }
        }
        Ok(goals)
    }

    fn load(&self, path: &Path) {
        let read = || -> anyhow::Result<KnownGoal> {
            let signed: SignedGoal = codec::decode(&std::fs::read(path)?, GOAL_MAX_BYTES)?;
            let goal = Arc::new(self.credentials.trust().open_goal(&signed)?);
            Ok(KnownGoal { goal, signed })
        };
        match read() {
            Ok(known) => {
                self.lock().insert(known.goal.app.clone(), known);
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), error = format!("{error:#}"), "goal file is not valid: set aside");
                let _ = std::fs::rename(path, path.with_extension("goal.invalid"));
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<AppName, KnownGoal>> {
        self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Takes a goal from anywhere, if it is valid, for this machine, and newer than what is known; it is on
    /// disk before anyone acts on it.
    pub(crate) fn accept(&self, signed: &SignedGoal) -> Accepted {
        let trust = self.credentials.trust();
        let goal = match trust.open_goal(signed) {
            Ok(goal) => Arc::new(goal),
            Err(error) => return Accepted::Refused(error.to_string()),
        };
        let mut known = self.lock();
        if let Some(known) =
            known.get(&goal.app).filter(|known| known.goal.revision >= goal.revision)
        {
            // The same goal by a later key: the one that it was signed with is about to go.
            let again = known.signed.goal == signed.goal
                && trust.is_later_key(signed.key_id, known.signed.key_id);
            if !again {
                return Accepted::Old;
            }
        }
        if !goal.is_for(&self.region, &self.labels) {
            return Accepted::NotForUs;
        }
        if !known.contains_key(&goal.app) && known.len() >= APPS_MAX {
            return Accepted::Refused(format!("this machine follows {APPS_MAX} apps already"));
        }
        let path = self.dir.join(format!("{}.goal", goal.app));
        let kept = codec::encode(signed, GOAL_MAX_BYTES)
            .map_err(std::io::Error::other)
            .and_then(|bytes| shoal_process::write_atomic(&path, &bytes));
        if let Err(error) = kept {
            return Accepted::Refused(format!("cannot keep it in {}: {error}", path.display()));
        }
        known.insert(goal.app.clone(), KnownGoal { goal, signed: signed.clone() });
        drop(known);
        self.changed.send_modify(|version| *version += 1);
        Accepted::Taken
    }

    /// Every known goal, by app.
    pub(crate) fn all(&self) -> BTreeMap<AppName, KnownGoal> {
        self.lock().clone()
    }

    /// The revision known of each app.
    pub(crate) fn revisions(&self) -> Vec<(AppName, Revision)> {
        self.lock().iter().map(|(app, known)| (app.clone(), known.goal.revision)).collect()
    }

    /// The digest that a poll names.
    pub(crate) fn digest(&self) -> u64 {
        let (trust, known) = (self.credentials.trust(), self.lock());
        if known.values().any(|known| !trust.has_goal_key(known.signed.key_id)) {
            // Nobody's digest: the region tells all goals, signed with a key that counts.
            return 0;
        }
        goals_digest(known.iter().map(|(app, known)| (app, known.goal.revision)))
    }

    /// The largest fleet that a goal is for, about.
    pub(crate) fn largest_fleet(&self) -> u32 {
        self.lock().values().map(|known| known.goal.machines_estimate).max().unwrap_or_default()
    }

    /// A receiver that sees every change.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}
