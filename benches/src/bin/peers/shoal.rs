//! Shoal itself, by what the benchmark `swarm` measures.

use std::path::Path;

use shoal_benches::{cluster::Cluster, deployment, net::CONTROL};

use crate::{
    case::Setting,
    report::Outcome,
    run::{self, Ground},
};

/// Starts a cluster, and deploys the file to the seed, and then, on the clock, to all.
pub(crate) fn measure(
    shoal: &Path,
    ground: &Ground<'_>,
    setting: Setting,
) -> anyhow::Result<Outcome> {
    let lined = ground.seed()?.namespace().is_some();
    let control = if lined { CONTROL } else { "127.0.0.1" };
    let mut cluster = Cluster::create(shoal, ground.dir, control)?;
    deployment::start(&mut cluster, shoal, ground.machines, "")?;
    let meter = || Ok(run::line_bytes(ground)?.unwrap_or(0));
    let round =
        deployment::round(&mut cluster, ground.machines, ground.file, Some(ground.ballast), meter)?;
    let size = setting.size_bytes as f64;
    Ok(Outcome {
        wall_s: round.wall_s,
        cpu_s_per_gb: round.cpu_s / (round.delivered_bytes as f64 / 1e9),
        seed_upload_copies: round.seed_upload_ratio,
        seed_line_copies: lined.then_some(round.wire_bytes as f64 / size),
        seed_peak_bytes: round.rss_anon_peak_bytes_seed,
        leecher_peak_bytes: round.rss_anon_peak_bytes_leecher,
    })
}
