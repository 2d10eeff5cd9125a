//! How machines are joined: the connections that stand before a run, and the trunks of racks and zones.

use rand::RngExt;
use rand_pcg::Pcg32;

use super::{ANY_ZONE_ONE_IN, REGIONS, Static, message::Actor, services::Trunk, triggers::Fate};

/// Connections between agents at rest: each machine has picked half of its neighbours, most of them in its zone.
pub(super) fn standing(world: &Static, fates: &[Fate], rng: &mut Pcg32) -> Vec<Vec<Actor>> {
    let (nodes, zones) = (world.setup.nodes, world.setup.zones);
    let each = (world.config.neighbours_target / 2) as u32;
    let mut graph: Vec<Vec<Actor>> = vec![Vec::new(); nodes as usize];
    for node in (0..nodes).filter(|node| !fates[*node as usize].late) {
        for pick in 0..each.min(nodes - 1) {
            /// Picks that may hit a neighbour before it is given up: then nearly all are neighbours.
            const TRIES: u32 = 64;
            let stranger = (0..TRIES).find_map(|_| {
                let mut other = rng.random_range(0..nodes);
                if pick % ANY_ZONE_ONE_IN != 0 {
                    other = other - other % zones + node % zones;
                }
                let known = graph[node as usize].contains(&other);
                let fits = other < nodes && other != node && !known;
                (fits && !fates[other as usize].late).then_some(other)
            });
            if let Some(other) = stranger {
                graph[node as usize].push(other);
                graph[other as usize].push(node);
            }
        }
    }
    graph.iter_mut().for_each(|others| others.sort_unstable());
    graph
}

/// The trunks, in the order of their numbers: out of each rack and into it, then out of each zone and into it.
pub(super) fn trunks(world: &Static) -> Vec<Trunk> {
    let setup = &world.setup;
    let racks = setup.zones * setup.racks * 2;
    (0..racks + setup.zones * 2)
        .map(|at| {
            let rate = if at < racks { setup.rack_bps } else { setup.zone_bps };
            // One that never fills is never on a way.
            Trunk::new(world.trunk(at), rate.unwrap_or(u64::MAX))
        })
        .collect()
}

impl Static {
    fn trunk(&self, at: u32) -> Actor {
        self.setup.nodes + REGIONS as Actor + 1 + at
    }

    /// The trunks on the way from one machine to another that can fill, in order. Services are on none.
    fn way(&self, from: Actor, to: Actor) -> impl Iterator<Item = Actor> + use<> {
        let setup = &self.setup;
        let racks = setup.zones * setup.racks * 2;
        let machines = from.max(to) < setup.nodes;
        let rack = machines && setup.rack_bps.is_some() && self.rack(from) != self.rack(to);
        let zone = machines && setup.zone_bps.is_some() && self.zone(from) != self.zone(to);
        let out = |on: bool, at: u32| on.then(|| self.trunk(at * 2));
        let into = |on: bool, at: u32| on.then(|| self.trunk(at * 2 + 1));
        let (from_rack, to_rack) = (out(rack, self.rack(from)), into(rack, self.rack(to)));
        let zone_at = |machine| racks / 2 + self.zone(machine);
        let (from_zone, to_zone) =
            if zone { (out(zone, zone_at(from)), into(zone, zone_at(to))) } else { (None, None) };
        [from_rack, from_zone, to_zone, to_rack].into_iter().flatten()
    }

    /// Where what a machine sends to another goes first.
    pub(super) fn first_hop(&self, from: Actor, to: Actor) -> Actor {
        self.way(from, to).next().unwrap_or(to)
    }

    /// Where it goes after a trunk.
    pub(super) fn next_hop(&self, trunk: Actor, from: Actor, to: Actor) -> Actor {
        self.way(from, to).skip_while(|hop| *hop != trunk).nth(1).unwrap_or(to)
    }
}
