//! libtorrent, by its Python module: `benches/peers/libtorrent_peer.py` is a peer.

use std::fs;

use crate::{
    run::Ground,
    talk::Talkers,
    torrent::{self, Tracker},
};

const PEER: &str = include_str!("../../../peers/libtorrent_peer.py");

/// Starts a swarm.
pub(crate) fn start(ground: &Ground<'_>) -> anyhow::Result<Talkers> {
    let script = ground.dir.join("libtorrent_peer.py");
    fs::write(&script, PEER)?;
    let at = ground.tracker();
    let torrent = ground.dir.join("torrent");
    fs::write(&torrent, torrent::metainfo(ground.file, &at)?)?;
    let tracker = Tracker::start(&at, &ground.peers())?;
    let seed = ground.seed()?.name.clone();
    Talkers::start(ground, Some(ground.file_name()?.into()), Some(tracker), |machine| {
        let mut command = ground.command(machine);
        command.arg(&script).arg("--torrent").arg(&torrent).args(["--listen", &machine.at(0)]);
        if machine.name == seed {
            command.arg("--seed").arg("--dir").arg(ground.source()?);
        } else {
            command.arg("--dir").arg(ground.own_dir(machine)?);
        }
        Ok(command)
    })
}
