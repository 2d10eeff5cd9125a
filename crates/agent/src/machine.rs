//! What all of this machine's apps share: the store, the engine, the region, and what stays on the disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use shoal_pki::Role;
use shoal_process::Membership;
use shoal_proto::{
    AppName, ArtifactId, MachineName,
    goal::Goal,
    peer::{PeerAddr, StreamReply, StreamRequest},
    region::{MachineInfo, RegionReply, RegionRequest},
    state::MachineState,
};
use shoal_store::Store;
use shoal_transport::{Connection, Endpoint};
use tokio::sync::{Mutex as AsyncMutex, watch};

use crate::{
    app::Waves, config::Config, engine::Engine, goals::Goals, metrics::Metrics,
    neighbours::Neighbours, origin::Origin, regions::Regions, reports::Reports, throttle::Throttle,
    trust::Standing,
};

/// How many neighbours are asked for an index before the region is.
const INDEX_PEERS: usize = 4;

/// How long a neighbour may take to answer with an index.
const INDEX_TIMEOUT: Duration = Duration::from_secs(5);

/// Everything that an app's task needs.
pub(crate) struct Machine {
    pub(crate) name: MachineName,
    pub(crate) info: MachineInfo,
    pub(crate) config: Config,
    pub(crate) store: Store,
    pub(crate) engine: Engine,
    pub(crate) endpoint: Endpoint,
    pub(crate) regions: Regions,
    pub(crate) origin: Origin,
    pub(crate) goals: Arc<Goals>,
    pub(crate) neighbours: Arc<Neighbours>,
    pub(crate) reports: Reports,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) waves: watch::Sender<Waves>,
    pub(crate) retention: Retention,
    /// One lock an app, held while it activates: a half-switched app helps nobody.
    pub(crate) activating: Mutex<BTreeMap<AppName, Arc<AsyncMutex<()>>>>,
    /// Somebody waits for a wave, in a fleet of about so many: the region is to be asked soon.
    pub(crate) wave_wanted: watch::Sender<u32>,
    pub(crate) throttle: Arc<Throttle>,
    /// How many imports are under way: nothing is swept meanwhile, for their artifacts are nobody's yet.
    pub(crate) importing: AtomicUsize,
    /// This machine's certificate, and whom it believes.
    pub(crate) membership: Arc<Membership>,
    pub(crate) standing: Standing,
}

/// Which artifacts must stay on the disk.
pub(crate) struct Retention {
    wanted: Mutex<BTreeMap<AppName, Vec<ArtifactId>>>,
    /// One empty file an imported artifact, named by its id.
    imported: PathBuf,
}

impl Retention {
    pub(crate) fn open(imported: PathBuf) -> std::io::Result<Self> {
        std::fs::create_dir_all(&imported)?;
        Ok(Self { wanted: Mutex::default(), imported })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<AppName, Vec<ArtifactId>>> {
        self.wanted.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Replaces what `app` needs.
    pub(crate) fn want(&self, app: &AppName, artifacts: Vec<ArtifactId>) {
        self.lock().insert(app.clone(), artifacts);
    }

    /// Keeps an imported artifact until it is removed by hand.
    pub(crate) fn keep_imported(&self, artifact: &ArtifactId) -> std::io::Result<()> {
        shoal_process::write_atomic(&self.imported.join(artifact.to_string()), b"")
    }

    /// The artifacts that were imported.
    pub(crate) fn imported(&self) -> BTreeSet<ArtifactId> {
        let entries = std::fs::read_dir(&self.imported).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    /// Runs `remove` unless somebody needs `artifact`; nobody can come to need it meanwhile.
    fn unless_wanted<T>(&self, artifact: &ArtifactId, remove: impl FnOnce() -> T) -> Option<T> {
        let wanted = self.lock();
        let needed = wanted.values().flatten().any(|id| id == artifact);
        (!needed && !self.imported().contains(artifact)).then(remove)
    }

    fn is_wanted(&self, artifact: &ArtifactId) -> bool {
        self.unless_wanted(artifact, || ()).is_none()
    }
}

impl Machine {
    /// Removes the artifacts that no app needs any more.
    pub(crate) async fn sweep(self: &Arc<Self>) {
        let machine = self.clone();
        let listed = tokio::task::spawn_blocking(move || machine.store.list()).await;
        let Ok(listed) = listed else { return };
        for artifact in listed.into_iter().map(|summary| summary.artifact) {
            if self.importing.load(Ordering::Acquire) > 0 || self.retention.is_wanted(&artifact) {
                continue;
            }
            self.engine.leave(artifact).await;
            let machine = self.clone();
            let removed = tokio::task::spawn_blocking(move || {
                machine.retention.unless_wanted(&artifact, || machine.store.remove(&artifact))
            });
            match removed.await {
                Ok(Some(Ok(_))) => tracing::info!(%artifact, "removed from the disk"),
                Ok(Some(Err(error))) => {
                    tracing::warn!(%artifact, %error, "cannot remove an artifact");
                }
                Ok(None) => {}
                Err(_) => return,
            }
        }
    }

    /// The lock that an app holds while it activates.
    pub(crate) fn activating(&self, app: &AppName) -> Arc<AsyncMutex<()>> {
        let mut all = self.activating.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        all.entry(app.clone()).or_default().clone()
    }

    /// Has the region asked soon about open waves.
    pub(crate) fn ask_for_wave(&self, fleet: u32) {
        self.wave_wanted.send_replace(fleet);
    }

    /// The index of a goal's encoding: from neighbours, else from the region, else from its bucket.
    pub(crate) async fn index(&self, goal: &Goal) -> Result<Vec<u8>, String> {
        let right =
            |bytes: &[u8]| shoal_pieces::open_index(bytes, &goal.artifact, &goal.encoding).is_ok();
        for connection in self.likely_holders(goal).await {
            let request = StreamRequest::Index { artifact: goal.artifact, encoding: goal.encoding };
            let asked = tokio::time::timeout(INDEX_TIMEOUT, connection.request(request)).await;
            if let Ok(Ok((StreamReply::Index(bytes), _))) = asked
                && right(&bytes)
            {
                return Ok(bytes);
            }
        }
        let request = RegionRequest::Index { artifact: goal.artifact, encoding: goal.encoding };
        if let Ok(RegionReply::Index(bytes)) = self.regions.ask(&request).await
            && right(&bytes)
        {
            return Ok(bytes);
        }
        let Some(bucket) = self.origin.bucket() else {
            let why = "this machine reads no bucket by itself";
            return Err(format!(
                "no neighbour and no region process has the artifact's index; {why}"
            ));
        };
        match bucket.index(&goal.artifact, &goal.encoding).await {
            Ok(Some(bytes)) if right(&bytes) => Ok(bytes.to_vec()),
            Ok(Some(_)) => Err("the index in the region's bucket is corrupt".into()),
            Ok(None) => Err("no neighbour and no bucket has the artifact's index yet".into()),
            Err(error) => Err(format!("cannot read the artifact's index: {error}")),
        }
    }

    /// Connected neighbours, first those that the region names for the artifact.
    async fn likely_holders(&self, goal: &Goal) -> Vec<Connection> {
        let me = &self.info.addr;
        let mut holders = Vec::new();
        if let Ok(named) =
            self.regions.introduce(me, goal.artifact, false, INDEX_PEERS as u16).await
        {
            let dials = named.iter().filter(|addr| addr.node != me.node).take(INDEX_PEERS).map(
                |addr: &PeerAddr| {
                    tokio::time::timeout(INDEX_TIMEOUT, self.endpoint.connect(addr.data, addr.node))
                },
            );
            let dialled = futures::future::join_all(dials).await;
            holders.extend(dialled.into_iter().flatten().flatten());
        } else {
            let agents = self.endpoint.connections().into_iter();
            holders
                .extend(agents.filter(|peer| peer.member().role == Role::Agent).take(INDEX_PEERS));
        }
        holders
    }

    /// Sets the gauge of apps by state.
    pub(crate) fn count_states(&self) {
        let counts = self.reports.states();
        for state in MachineState::ALL {
            let count = counts.get(state).copied().unwrap_or(0);
            self.metrics.apps.with_label_values(&[state.as_str()]).set(count);
        }
    }
}
