//! iroh-blobs, by a program of our own: `benches/peers/iroh`.

use crate::{run::Ground, talk::Talkers};

/// Starts a swarm.
pub(crate) fn start(ground: &Ground<'_>) -> anyhow::Result<Talkers> {
    let list = ground.dir.join("list");
    let peers = ground.peers().into_iter().enumerate();
    let peers: Vec<String> = peers.map(|(number, at)| format!("{number}={at}")).collect();
    let seed = ground.seed()?.name.clone();
    // Its leechers have stores of blobs, and no file; it looks itself whether all of them are there.
    Talkers::start(ground, None, None, |machine| {
        let mut command = ground.command(machine);
        let number = ground.machines.iter().position(|one| one.name == machine.name);
        command.args(["--number", &number.unwrap_or_default().to_string()]);
        command.args(["--listen", &machine.at(0)]);
        command.arg("--store").arg(ground.own_dir(machine)?).arg("--list").arg(&list);
        for peer in &peers {
            command.args(["--peer", peer]);
        }
        if machine.name == seed {
            command.arg("--file").arg(ground.file);
        }
        Ok(command)
    })
}
