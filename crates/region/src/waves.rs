//! What this process has opened of each rollout, kept in a small file: a process that starts again goes on from
//! there, and no machine is told of a wave that such a process would not remember.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    path::Path,
    time::Instant,
};

use shoal_client::types::WaveOpened;
use shoal_proto::{AppName, Revision, codec, goal::Goal, region::OpenWave};
use shoal_rollout::{ALL_PERMILLE, Waves};

use crate::machines::millis;

/// The longest file of open waves, in bytes: room for 50,000 apps.
const FILE_MAX_BYTES: usize = 16 << 20;

/// One app's newest rollout.
pub(crate) struct Rollout {
    revision: Revision,
    pub(crate) waves: Waves,
    /// How much of what is open is on the disk, in thousandths: what machines may be told.
    kept_permille: u16,
    /// How much of it a coordinator was told.
    told_permille: u16,
    /// When the last of it opened; none when that was before this process's start.
    opened: Option<Instant>,
    /// Whether it goes in waves: there is nothing to tell of one that is all open from its beginning.
    has_waves: bool,
    pub(crate) since: Instant,
    pub(crate) looked: Option<Instant>,
}

impl Rollout {
    fn new(revision: Revision, open_permille: u16, now: Instant) -> Self {
        let waves = Waves::new(open_permille);
        let kept_permille = waves.open_permille();
        Self {
            revision,
            waves,
            kept_permille,
            told_permille: 0,
            opened: None,
            has_waves: false,
            since: now,
            looked: None,
        }
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
        if rollout.revision == goal.revision {
            rollout.has_waves = !goal.plan.rollback && !goal.plan.waves_permille.is_empty();
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
    pub(crate) fn kept(&mut self, open: &[OpenWave], now: Instant) {
        for wave in open {
            if let Some(rollout) = self.0.get_mut(&wave.app)
                && rollout.revision == wave.revision
                && rollout.kept_permille < wave.open_permille
            {
                rollout.kept_permille = wave.open_permille;
                rollout.opened = Some(now);
            }
        }
    }

    /// The waves that no coordinator was told of, at most so many.
    pub(crate) fn untold(&self, limit: usize, now: Instant) -> Vec<WaveOpened> {
        let untold = self.0.iter().filter(|(_, rollout)| {
            rollout.has_waves && rollout.kept_permille > rollout.told_permille
        });
        let wave = |(app, rollout): (&AppName, &Rollout)| WaveOpened {
            app: app.clone(),
            revision: rollout.revision,
            open_permille: rollout.kept_permille,
            age_ms: rollout.opened.map_or(0, |at| millis(now.saturating_duration_since(at))),
        };
        untold.take(limit).map(wave).collect()
    }

    /// A coordinator was told of `waves`.
    pub(crate) fn told(&mut self, waves: &[WaveOpened]) {
        for wave in waves {
            if let Some(rollout) = self.0.get_mut(&wave.app)
                && rollout.revision == wave.revision
            {
                rollout.told_permille = rollout.told_permille.max(wave.open_permille);
            }
        }
    }
}
