//! The options of the world: flags and the `[world]` section of a scenario file are the same ones.

use serde::Deserialize;

use crate::{
    setup::Setup,
    units::{Rate, Size},
};

/// The most machines in one region: each takes some tens of kilobytes.
const NODES_MAX: u32 = 1_000_000;

/// The most regions in one run: each takes as long as the first.
const REGIONS_MAX: u32 = 100;

/// The most parts that a piece is sent in.
const PARTS_MAX: u32 = 64;

/// Racks are filled with about this many machines unless their number is given.
const MACHINES_PER_RACK: u32 = 40;

const NODES: u32 = 1_000;
const SIZE: Size = Size(10_000_000_000);
const NIC: Rate = Rate(10_000_000_000);
const PARTS: u32 = 2;
const SEED: u64 = 1;

/// What is simulated, apart from artifacts and faults. What is not given has a default.
#[derive(Debug, Clone, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Options {
    /// Machines in each region. [default: 1000]
    #[arg(long)]
    pub(crate) nodes: Option<u32>,
    /// Size of the artifact as stored, such as 10GB or 512MiB. [default: 10GB]
    #[arg(long)]
    pub(crate) size: Option<Size>,
    /// Each machine's line, each way, such as 10Gbps or 300MBps. [default: 10Gbps]
    #[arg(long, value_name = "RATE")]
    pub(crate) nic: Option<Rate>,
    /// Size of a piece, a power of two from 256KiB to 16MiB. [default: the agent's own choice]
    #[arg(long, value_name = "SIZE")]
    pub(crate) piece_size: Option<Size>,
    /// Zones that each region's machines are spread over. [default: 1]
    #[arg(long)]
    pub(crate) zones: Option<u32>,
    /// Racks in each zone. [default: one for about 40 machines]
    #[arg(long)]
    pub(crate) racks: Option<u32>,
    /// Each rack's line to its zone, each way. [default: it never fills]
    #[arg(long, value_name = "RATE")]
    pub(crate) rack_uplink: Option<Rate>,
    /// Each zone's line to the others, each way. [default: it never fills]
    #[arg(long, value_name = "RATE")]
    pub(crate) zone_uplink: Option<Rate>,
    /// Parts that a piece is sent in, 1 to 64: the more, the evener a line is shared, and the dearer the run. [default: 2]
    #[arg(long)]
    pub(crate) parts: Option<u32>,
    /// One seed gives one run. [default: 1]
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Regions, each with a bucket, region processes and machines of its own. They are simulated one after
    /// the other, the first with the seed and the others with seeds that follow from it. [default: 1]
    #[arg(long)]
    pub(crate) regions: Option<u32>,
}

impl Options {
    /// These, and where one is not given, the other's.
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            nodes: self.nodes.or(other.nodes),
            size: self.size.or(other.size),
            nic: self.nic.or(other.nic),
            piece_size: self.piece_size.or(other.piece_size),
            zones: self.zones.or(other.zones),
            racks: self.racks.or(other.racks),
            rack_uplink: self.rack_uplink.or(other.rack_uplink),
            zone_uplink: self.zone_uplink.or(other.zone_uplink),
            parts: self.parts.or(other.parts),
            seed: self.seed.or(other.seed),
            regions: self.regions.or(other.regions),
        }
    }

    /// The size of an artifact for which none is given.
    pub(crate) fn size(&self) -> Size {
        self.size.unwrap_or(SIZE)
    }

    /// How many regions.
    pub(crate) fn regions(&self) -> Result<u32, String> {
        within("regions", self.regions.unwrap_or(1), REGIONS_MAX)
    }

    /// A setup without artifacts and faults.
    pub(crate) fn setup(&self) -> Result<Setup, String> {
        let nodes = within("nodes", self.nodes.unwrap_or(NODES), NODES_MAX)?;
        let zones = self.zones.unwrap_or(1);
        if zones == 0 || zones > nodes {
            return Err(format!("zones is {zones}: give 1 to the number of nodes"));
        }
        let in_zone = nodes.div_ceil(zones);
        let racks = self.racks.unwrap_or_else(|| in_zone.div_ceil(MACHINES_PER_RACK));
        if racks == 0 || racks > in_zone {
            return Err(format!("racks is {racks}: give 1 to the number of machines in a zone"));
        }
        Ok(Setup {
            nodes,
            zones,
            racks,
            nic_bps: self.nic.unwrap_or(NIC).0,
            rack_bps: self.rack_uplink.map(|rate| rate.0),
            zone_bps: self.zone_uplink.map(|rate| rate.0),
            parts: within("parts", self.parts.unwrap_or(PARTS), PARTS_MAX)?,
            artifacts: Vec::new(),
            faults: Vec::new(),
            seed: self.seed.unwrap_or(SEED),
            threads: 1,
            stop_at_s: None,
            watch: None,
        })
    }
}

fn within(name: &str, given: u32, most: u32) -> Result<u32, String> {
    if (1..=most).contains(&given) {
        Ok(given)
    } else {
        Err(format!("{name} is {given}: give 1 to {most}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_goes_before_the_file_and_the_file_before_the_default() {
        let flags = Options { nodes: Some(7), ..Options::default() };
        let file = Options { nodes: Some(8), zones: Some(2), ..Options::default() };
        let setup = flags.or(file).setup().expect("a world");
        assert_eq!((setup.nodes, setup.zones, setup.nic_bps), (7, 2, NIC.0));
    }

    #[test]
    fn racks_hold_about_forty_machines() {
        let racks = |nodes, zones| {
            let options = Options { nodes: Some(nodes), zones: Some(zones), ..Options::default() };
            options.setup().expect("a world").racks
        };
        assert_eq!((racks(1, 1), racks(40, 1), racks(41, 1), racks(1_000, 3)), (1, 1, 2, 9));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let base = Options { nodes: Some(10), ..Options::default() };
        for wrong in [
            Options { nodes: Some(0), ..base.clone() },
            Options { nodes: Some(NODES_MAX + 1), ..base.clone() },
            Options { zones: Some(0), ..base.clone() },
            Options { zones: Some(11), ..base.clone() },
            Options { racks: Some(0), ..base.clone() },
            Options { zones: Some(2), racks: Some(6), ..base.clone() },
        ] {
            assert!(wrong.setup().is_err(), "{wrong:?}");
        }
        for regions in [0, REGIONS_MAX + 1] {
            let wrong = Options { regions: Some(regions), ..base.clone() };
            assert!(wrong.regions().is_err());
        }
    }
}
