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
use tokio::sync::{Mutex, watch};
use tokio_util::task::AbortOnDropHandle;

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
    machine: Arc<Machine>,
    place: SharedPlace,
    goals: watch::Receiver<Arc<Goal>>,
    state: AppState,
    /// What was last kept on the disk of what is reported.
    kept: Option<(Revision, MachineState)>,
    /// Keeps the active build's program running, whatever else this task does meanwhile.
    keeper: Option<AbortOnDropHandle<()>>,
}

impl AppTask {
    pub(crate) fn new(
        machine: Arc<Machine>,
        place: SharedPlace,
        goals: watch::Receiver<Arc<Goal>>,
        state: AppState,
    ) -> Self {
        Self { machine, place, goals, state, kept: None, keeper: None }
    }

    pub(crate) async fn run(mut self) {
        self.machine.reports.resume(&self.place.app, self.state.sequence);
        self.keep_running(None);
        loop {
            let goal = self.goals.borrow_and_update().clone();
            self.note_wanted(&goal);
            let newer = self.goals.clone();
            let activating = self.machine.activating(&goal.app);
            tokio::select! {
                () = self.pursue(&goal) => {
                    // An error says that the agent is stopping: there is nothing more to wait for.
                    if self.goals.changed().await.is_err() {
                        return std::future::pending().await;
                    }
                }
                () = superseded(newer, &activating) => self.abandon(&goal).await,
            }
        }
    }

    /// Brings the app to `goal`, or to the finding that it cannot be.
    async fn pursue(&mut self, goal: &Goal) {
        if let Some((revision, went_back, reason)) = self.state.failed.clone()
            && revision == goal.revision
        {
            let state = if went_back { MachineState::RolledBack } else { MachineState::Failed };
            return self.report(goal, state, Some(reason), None);
        }
        let active =
            self.state.active.as_ref().is_some_and(|active| active.revision == goal.revision);
        if active && self.is_whole(goal.artifact).await {
            self.seed(goal).await;
            return self.report(goal, MachineState::Active, None, None);
        }
        match self.obtain(goal).await {
            // It was active before, and its file had been damaged: nothing has to be switched.
            Ok(_) if active => self.report(goal, MachineState::Active, None, None),
            Ok(file) => {
                self.wave(goal).await;
                self.activate(goal, file).await;
            }
            Err(Hopeless(reason)) => {
                self.state.failed = Some((goal.revision, false, reason.clone()));
                self.report(goal, MachineState::Failed, Some(reason), None);
            }
        }
    }

    async fn is_whole(&self, artifact: ArtifactId) -> bool {
        let machine = self.machine.clone();
        let held = blocking(move || machine.store.get(&artifact)).await;
        matches!(held, Ok(Some(held)) if held.is_complete())
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
        // Progress alone is not worth a sync: a restart jumps over the sequences that it used.
        if self.kept == Some((goal.revision, state)) {
            return;
        }
        self.machine.count_states();
        match tokio::task::block_in_place(|| self.state.save(&self.place)) {
            Ok(()) => self.kept = Some((goal.revision, state)),
            Err(error) => {
                tracing::warn!(app = %goal.app, %error, "cannot keep the app's state");
            }
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

    /// Gets the goal's artifact whole onto the disk.
    async fn obtain(&mut self, goal: &Goal) -> Result<PathBuf, Hopeless> {
        self.report(goal, MachineState::Waiting, None, None);
        let mut pause = RETRY_MIN;
        let mut said = String::new();
        let file = loop {
            match self.fetch(goal).await {
                Ok(file) => break file,
                Err(FetchError::Hopeless(reason)) => return Err(Hopeless(reason)),
                Err(FetchError::Transient(reason)) => {
                    if said != reason {
                        tracing::warn!(app = %goal.app, revision = %goal.revision, reason, "the fetch waits");
                        said.clone_from(&reason);
                    }
                    self.report(goal, MachineState::Waiting, Some(reason), None);
                    self.machine.sweep().await;
                    tokio::time::sleep(spread(pause)).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
            }
        };
        self.report(goal, MachineState::Verified, None, None);
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
        match finished {
            Ok(file) => Ok(file),
            Err(error) => {
                // The store may have found that pieces are not there after all: begin again from what it has.
                self.machine.engine.leave(goal.artifact).await;
                Err(FetchError::Transient(format!("cannot finish the file: {error}")))
            }
        }
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
        // The same artifact by another encoding, in the middle of its fetch: that one is retired.
        self.machine.engine.leave(goal.artifact).await;
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
        self.machine.ask_for_wave(goal.machines_estimate);
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

    async fn activate(&mut self, goal: &Goal, file: PathBuf) {
        // From here on a newer goal waits: see `superseded`.
        let _activating = self.machine.activating(&goal.app).lock_owned().await;
        self.report(goal, MachineState::Activating, None, None);
        self.keeper = None;
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
                self.keep_running(program);
                self.note_wanted(goal);
                self.report(goal, MachineState::Active, None, None);
                self.machine.sweep().await;
            }
            Err(reason) => self.go_back(goal, reason).await,
        }
    }

    async fn go_back(&mut self, goal: &Goal, reason: String) {
        tracing::warn!(app = %goal.app, revision = %goal.revision, %reason, "activation failed");
        let mut failed = (goal.revision, false, reason.clone());
        if let Some(before) = self.state.active.clone() {
            let machine = self.machine.clone();
            let old = blocking(move || machine.store.get(&before.artifact)).await;
            let result = match old {
                Ok(Some(old)) if old.is_complete() => {
                    self.place.activate(&before, &old.path()).await
                }
                _ => Err("the build before is no longer on the disk".into()),
            };
            match result {
                Ok(program) => {
                    failed.1 = true;
                    self.keep_running(program);
                }
                Err(error) => failed.2 = format!("{reason}; and going back failed: {error}"),
            }
        }
        let state = if failed.1 { MachineState::RolledBack } else { MachineState::Failed };
        let reason = failed.2.clone();
        self.state.failed = Some(failed);
        self.report(goal, state, Some(reason), None);
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

    /// From now on the active build's program is started again when it ends badly.
    fn keep_running(&mut self, program: Option<Program>) {
        let active = self.state.active.clone();
        self.keeper = active
            .filter(|build| matches!(build.activation, Activation::Run { .. }))
            .map(|build| {
                let (machine, place) = (self.machine.clone(), self.place.clone());
                AbortOnDropHandle::new(tokio::spawn(supervise(machine, place, build, program)))
            });
    }
}

/// Waits for a newer goal, and then until the activation that is under way has come to its end.
async fn superseded(mut newer: watch::Receiver<Arc<Goal>>, activating: &Mutex<()>) {
    if newer.changed().await.is_err() {
        return std::future::pending().await;
    }
    let _free = activating.lock().await;
}

/// Starts `build`'s program again whenever it ends badly; one that ends well has done its work.
async fn supervise(
    machine: Arc<Machine>,
    place: SharedPlace,
    build: Build,
    program: Option<Program>,
) {
    let patience = Duration::from_secs(machine.config.stop_timeout_s);
    let mut program = program.or_else(|| Program::adopt(&place.run_dir));
    let mut pause = RESTART_MIN;
    loop {
        if let Some(running) = program.take() {
            let since = Instant::now();
            let ended = running.ended().await;
            if ended.is_success() {
                return;
            }
            tracing::warn!(app = %place.app, %ended, "to be started again");
            // What it left in its group may still hold its ports.
            running.stop(patience).await;
            if since.elapsed() > RAN_WELL {
                pause = RESTART_MIN;
            }
            tokio::time::sleep(spread(pause)).await;
            pause = (pause * 2).min(RESTART_MAX);
        }
        let (store, artifact) = (machine.store.clone(), build.artifact);
        let file = blocking(move || store.get(&artifact)).await;
        let started = match file {
            Ok(Some(file)) if file.is_complete() => place.spawn(&build, &file.path()).await,
            _ => Err("its file is not whole".into()),
        };
        match started {
            Ok(started) => program = Some(started),
            Err(reason) => {
                tracing::error!(app = %place.app, %reason, "cannot start the program");
                tokio::time::sleep(spread(pause)).await;
                pause = (pause * 2).min(RESTART_MAX);
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
