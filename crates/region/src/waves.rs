//! What this process has opened of each rollout, kept in a small file: a process that starts again goes on from
//! there, and no machine is told of a wave that such a process would not remember.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    path::Path,
    time::Instant,
};

use shoal_proto::{AppName, Revision, codec, goal::Goal, region::OpenWave};
use shoal_rollout::{ALL_PERMILLE, Waves};

/// The longest file of open waves, in bytes: room for 50,000 apps.
const FILE_MAX_BYTES: usize = 16 << 20;

/// One app's newest rollout.
pub(crate) struct Rollout {
    revision: Revision,
    pub(crate) waves: Waves,
    /// How much of what is open is on the disk, in thousandths: what machines may be told.
    kept_permille: u16,
    pub(crate) since: Instant,
    pub(crate) looked: Option<Instant>,
}

impl Rollout {
    fn new(revision: Revision, open_permille: u16, now: Instant) -> Self {
        let waves = Waves::new(open_permille);
        let kept_permille = waves.open_permille();
        Self { revision, waves, kept_permille, since: now, looked: None }
    }

    /// Whether there is a wave left to open.
    pub(crate) fn is_closed(&self) -> bool {
        self.waves.open_permille() < ALL_PERMILLE
    }

    /// Whether something is open that is not on the disk.
    pub(crate) fn is_unkept(&self) -> bool {
        self.waves.open_permille() > self.kept_permille
    }

    /// What machines may be told, in thousandths.
    pub(crate) fn kept_permille(&self) -> u16 {
        self.kept_permille
    }
}

/// The newest rollout of each app.
#[derive(Default)]
pub(crate) struct Rollouts(BTreeMap<AppName, Rollout>);

impl Rollouts {
    /// Reads what [`Self::write`] wrote; a file that is not whole is as good as none, and said in the log.
    pub(crate) fn read(path: &Path, now: Instant) -> Self {
        let read = std::fs::read(path)
            .and_then(|bytes| codec::decode(&bytes, FILE_MAX_BYTES).map_err(std::io::Error::other));
        let open: Vec<OpenWave> = match read {
            Ok(open) => open,
            Err(error) => {
                if error.kind() != std::io::ErrorKind::NotFound {
                    tracing::warn!(path = %path.display(), %error, "what was open is not known");
                }
                Vec::new()
            }
        };
        let entry =
            |wave: OpenWave| (wave.app, Rollout::new(wave.revision, wave.open_permille, now));
        Self(open.into_iter().map(entry).collect())
    }

    /// Puts `open` on the disk.
    pub(crate) fn write(path: &Path, open: &[OpenWave]) -> std::io::Result<()> {
        let bytes = codec::encode(&open, FILE_MAX_BYTES).map_err(std::io::Error::other)?;
        shoal_process::write_atomic(path, &bytes)
    }

    /// The rollout of `goal`; none when a newer goal of its app has one.
    pub(crate) fn of(&mut self, goal: &Goal, now: Instant) -> Option<&mut Rollout> {
        let rollout = match self.0.entry(goal.app.clone()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Rollout::new(goal.revision, 0, now)),
        };
        if rollout.revision < goal.revision {
            *rollout = Rollout::new(goal.revision, 0, now);
        }
        (rollout.revision == goal.revision).then_some(rollout)
    }

    /// All that is open, if any of it is not on the disk.
    pub(crate) fn unkept(&self) -> Option<Vec<OpenWave>> {
        self.0.values().any(Rollout::is_unkept).then(|| {
            let open = self.0.iter().map(|(app, rollout)| OpenWave {
                app: app.clone(),
                revision: rollout.revision,
                open_permille: rollout.waves.open_permille(),
            });
            open.collect()
        })
    }

    /// `open` is on the disk.
    pub(crate) fn kept(&mut self, open: &[OpenWave]) {
        for wave in open {
            if let Some(rollout) = self.0.get_mut(&wave.app)
                && rollout.revision == wave.revision
            {
                rollout.kept_permille = rollout.kept_permille.max(wave.open_permille);
            }
        }
    }
}
