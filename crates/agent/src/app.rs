//! One app on this machine: from its goal to the build that runs, in one task.
//!
//! The task pursues the newest goal. While it waits or fetches, a newer goal takes over at once; from the
//! moment that it activates, it first brings that to an end, for a half-switched app helps nobody.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use shoal_proto::{
    ArtifactId, Revision,
    goal::{Activation, Goal},
    region::{FetchProgress, rollout_rank},
    state::MachineState,
};
use shoal_store::{Artifact, StoreError};
use tokio::sync::watch;

use crate::{
    activate::{AppState, Build, SharedPlace},
    machine::Machine,
    program::Program,
    regions::spread,
};

/// How long to wait before something transient is tried again, at first and at most.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(15);

/// How often a fetch's progress is told: every millisecond for each machine of the fleet, within these
/// bounds, so that a region hears of about 1,000 a second.
const PROGRESS_MIN: Duration = Duration::from_millis(500);
const PROGRESS_MAX: Duration = Duration::from_secs(30);

/// How long to wait before a program that has ended is started again, at first and at most.
const RESTART_MIN: Duration = Duration::from_secs(1);
const RESTART_MAX: Duration = Duration::from_secs(60);

/// A program that ran this long did well: the next restart waits [`RESTART_MIN`] again.
const RAN_WELL: Duration = Duration::from_secs(60);

/// Why an app cannot get to its goal, for good.
struct Hopeless(String);

/// Runs one app until the agent stops.
pub(crate) struct AppTask {
    pub(crate) machine: Arc<Machine>,
    pub(crate) place: SharedPlace,
    pub(crate) goals: watch::Receiver<Arc<Goal>>,
    pub(crate) state: AppState,
}

impl AppTask {
    pub(crate) async fn run(mut self) {
        self.machine.reports.resume(&self.place.app, self.state.sequence);
        loop {
            let goal = self.goals.borrow_and_update().clone();
            self.note_wanted(&goal);
            if let Some((revision, went_back, reason)) = self.state.failed.clone()
                && revision == goal.revision
            {
                let state = if went_back { MachineState::RolledBack } else { MachineState::Failed };
                self.report(&goal, state, Some(reason), None);
                self.hold(None).await;
                continue;
            }
            if self.state.active.as_ref().is_some_and(|active| active.revision == goal.revision) {
                self.seed(&goal).await;
                self.report(&goal, MachineState::Active, None, None);
                self.hold(None).await;
                continue;
            }
            let mut newer = self.goals.clone();
            let verified = tokio::select! {
                verified = self.obtain(&goal) => verified,
                _ = newer.changed() => {
                    self.abandon(&goal).await;
                    continue;
                }
            };
            match verified {
                Ok(file) => {
                    let program = self.activate(&goal, file).await;
                    self.hold(program).await;
                }
                Err(Hopeless(reason)) => {
                    self.state.failed = Some((goal.revision, false, reason.clone()));
                    self.report(&goal, MachineState::Failed, Some(reason), None);
                    self.hold(None).await;
                }
            }
        }
    }

    fn report(
        &mut self,
        goal: &Goal,
        state: MachineState,
        reason: Option<String>,
        progress: Option<FetchProgress>,
    ) {
        let reports = &self.machine.reports;
        self.state.sequence =
            reports.set(&goal.app, goal.revision, goal.artifact, state, reason, progress);
        self.machine.count_states();
        if let Err(error) = self.state.save(&self.place) {
            tracing::warn!(app = %goal.app, %error, "cannot keep the app's state");
        }
    }

    /// Tells the retention what this app needs on the disk.
    fn note_wanted(&self, goal: &Goal) {
        let mut wanted = vec![goal.artifact];
        wanted.extend(self.state.active.as_ref().map(|active| active.artifact));
        wanted.extend(&self.state.history);
        self.machine.retention.want(&goal.app, wanted);
    }

    /// A newer goal came before this one was verified.
    async fn abandon(&self, goal: &Goal) {
        let next = self.goals.borrow().clone();
        if next.artifact != goal.artifact {
            tracing::info!(app = %goal.app, revision = %goal.revision, newer = %next.revision, "superseded");
            self.note_wanted(&next);
            self.machine.sweep().await;
        }
    }

    /// Gets the goal's artifact whole onto the disk, and waits for its wave.
    async fn obtain(&mut self, goal: &Goal) -> Result<PathBuf, Hopeless> {
        self.report(goal, MachineState::Waiting, None, None);
        let mut pause = RETRY_MIN;
        let file = loop {
            match self.fetch(goal).await {
                Ok(file) => break file,
                Err(FetchError::Hopeless(reason)) => return Err(Hopeless(reason)),
                Err(FetchError::Transient(reason)) => {
                    self.report(goal, MachineState::Waiting, Some(reason), None);
                    self.machine.sweep().await;
                    tokio::time::sleep(spread(pause)).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
            }
        };
        self.report(goal, MachineState::Verified, None, None);
        self.wave(goal).await;
        Ok(file)
    }

    async fn fetch(&mut self, goal: &Goal) -> Result<PathBuf, FetchError> {
        let artifact = self.open(goal).await?;
        let fleet = goal.machines_estimate;
        let engine = &self.machine.engine;
        let mut status = engine.join(artifact.clone(), goal.priority, fleet).await;
        if !artifact.is_complete() {
            let every = Duration::from_millis(u64::from(fleet)).clamp(PROGRESS_MIN, PROGRESS_MAX);
            let mut told = None;
            loop {
                let now = status.borrow_and_update().clone();
                if now.complete {
                    self.report(goal, MachineState::Fetching, None, Some(now.progress));
                    break;
                }
                if told.is_none_or(|told: Instant| told.elapsed() >= every) {
                    told = Some(Instant::now());
                    let (reason, progress) = (now.trouble, Some(now.progress));
                    self.report(goal, MachineState::Fetching, reason, progress);
                }
                // The sleep tells of trouble also when no piece arrives.
                tokio::select! {
                    changed = status.changed() => if changed.is_err() {
                        return Err(FetchError::Transient("the agent is stopping".into()));
                    },
                    () = tokio::time::sleep(every) => {}
                }
            }
        }
        let mode = goal.file_mode;
        let finished = blocking(move || artifact.finish(mode)).await?;
        finished.map_err(|error| FetchError::Transient(format!("cannot finish the file: {error}")))
    }

    /// The artifact in the store, old or new.
    async fn open(&self, goal: &Goal) -> Result<Arc<Artifact>, FetchError> {
        let machine = self.machine.clone();
        let id = goal.artifact;
        // What is whole needs no index; what is not is gone on with by the goal's encoding.
        if let Some(artifact) = blocking(move || machine.store.get(&id)).await?
            && (artifact.is_complete() || artifact.encoding() == goal.encoding)
        {
            return Ok(artifact);
        }
        let index = self.machine.index(goal).await.map_err(FetchError::Transient)?;
        let index =
            shoal_pieces::open_index(&index, &goal.artifact, &goal.encoding).map_err(|error| {
                FetchError::Hopeless(format!("the artifact's index is wrong: {error}"))
            })?;
        let manifest = &index.manifest;
        if manifest.size_bytes != goal.size_bytes || manifest.piece_size != goal.piece_size {
            return Err(FetchError::Hopeless("the goal contradicts the artifact's index".into()));
        }
        let machine = self.machine.clone();
        blocking(move || machine.store.open_artifact(&index)).await?.map_err(|error| match error {
            StoreError::NoSpace { needed, free } => FetchError::Transient(format!(
                "the disk is full: {needed} bytes are needed and {free} are free; make room"
            )),
            error => FetchError::Transient(format!("cannot make room for the artifact: {error}")),
        })
    }

    /// Serves what this machine has of the goal's artifact.
    async fn seed(&self, goal: &Goal) {
        let machine = self.machine.clone();
        let id = goal.artifact;
        if let Ok(Some(artifact)) = blocking(move || machine.store.get(&id)).await {
            let (priority, fleet) = (goal.priority, goal.machines_estimate);
            self.machine.engine.join(artifact, priority, fleet).await;
        }
    }

    /// Waits until this machine may activate.
    async fn wave(&self, goal: &Goal) {
        if goal.plan.rollback || goal.plan.waves_permille.is_empty() {
            return;
        }
        let rank = rollout_rank(&self.machine.name, &goal.artifact);
        let mut waves = self.machine.waves.subscribe();
        loop {
            let open = waves.borrow_and_update().get(&goal.app).copied();
            if open.is_some_and(|(revision, open)| revision == goal.revision && rank < open) {
                return;
            }
            if waves.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    async fn activate(&mut self, goal: &Goal, file: PathBuf) -> Option<Program> {
        self.report(goal, MachineState::Activating, None, None);
        let build = Build::from(goal);
        match self.place.activate(&build, &file).await {
            Ok(program) => {
                if let Some(before) = self.state.active.replace(build) {
                    self.state.history.retain(|id| *id != before.artifact && *id != goal.artifact);
                    if before.artifact != goal.artifact {
                        self.state.history.insert(0, before.artifact);
                    }
                    self.trim_history().await;
                }
                self.state.failed = None;
                self.note_wanted(goal);
                self.report(goal, MachineState::Active, None, None);
                self.machine.sweep().await;
                program
            }
            Err(reason) => self.go_back(goal, reason).await,
        }
    }

    async fn go_back(&mut self, goal: &Goal, reason: String) -> Option<Program> {
        tracing::warn!(app = %goal.app, revision = %goal.revision, %reason, "activation failed");
        let mut failed = (goal.revision, false, reason.clone());
        let mut program = None;
        if let Some(before) = self.state.active.clone() {
            let machine = self.machine.clone();
            let old = blocking(move || machine.store.get(&before.artifact)).await;
            let result = match old {
                Ok(Some(old)) => self.place.activate(&before, &old.path()).await,
                _ => Err("the build before is no longer on the disk".into()),
            };
            match result {
                Ok(started) => {
                    failed.1 = true;
                    program = started;
                }
                Err(error) => failed.2 = format!("{reason}; and going back failed: {error}"),
            }
        }
        let state = if failed.1 { MachineState::RolledBack } else { MachineState::Failed };
        let reason = failed.2.clone();
        self.state.failed = Some(failed);
        self.report(goal, state, Some(reason), None);
        program
    }

    /// Drops the oldest builds beyond the configured number and bytes.
    async fn trim_history(&mut self) {
        let config = &self.machine.config;
        self.state.history.truncate(config.keep_builds);
        let machine = self.machine.clone();
        let Ok(stored) = blocking(move || machine.store.list()).await else { return };
        let mut left = self.machine.config.keep_builds_mib << 20;
        self.state.history.retain(|id| {
            let size = stored.iter().find(|stored| stored.artifact == *id);
            let size = size.map_or(0, |stored| stored.size_bytes);
            let fits = size <= left;
            left = left.saturating_sub(size);
            fits
        });
    }

    /// Keeps the active build's program running until a newer goal comes.
    async fn hold(&mut self, program: Option<Program>) {
        let mut newer = self.goals.clone();
        let active = self.state.active.clone();
        let kept = async {
            let Some(build) = active else { return std::future::pending().await };
            if !matches!(build.activation, Activation::Run { .. }) {
                return std::future::pending().await;
            }
            self.supervise(&build, program).await;
        };
        tokio::select! {
            () = kept => {}
            // An error says that the agent is stopping: there is nothing more to hold on for.
            changed = newer.changed() => if changed.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    async fn supervise(&self, build: &Build, program: Option<Program>) {
        let mut program = program.or_else(|| Program::adopt(&self.place.run_dir));
        let mut pause = RESTART_MIN;
        loop {
            if let Some(running) = program.take() {
                let since = Instant::now();
                let ended = running.ended().await;
                if ended.is_success() {
                    return std::future::pending().await;
                }
                tracing::warn!(app = %self.place.app, %ended, "started again");
                if since.elapsed() > RAN_WELL {
                    pause = RESTART_MIN;
                }
                tokio::time::sleep(spread(pause)).await;
                pause = (pause * 2).min(RESTART_MAX);
            }
            let machine = self.machine.clone();
            let artifact: ArtifactId = build.artifact;
            let file = blocking(move || machine.store.get(&artifact)).await;
            let started = match file {
                Ok(Some(file)) => self.place.spawn(build, &file.path()),
                _ => Err("its file is gone".into()),
            };
            match started {
                Ok(started) => program = Some(started),
                Err(reason) => {
                    tracing::error!(app = %self.place.app, %reason, "cannot start the program again");
                    tokio::time::sleep(spread(pause)).await;
                    pause = (pause * 2).min(RESTART_MAX);
                }
            }
        }
    }
}

/// Why a fetch did not come to its end.
enum FetchError {
    /// Trying again may help.
    Transient(String),
    /// It will not.
    Hopeless(String),
}

/// Runs blocking work aside.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, FetchError> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.map_err(|_| FetchError::Transient("the agent is stopping".into()))
}

/// The open wave of each app, as its region process says.
pub(crate) type Waves = std::collections::BTreeMap<shoal_proto::AppName, (Revision, u16)>;
