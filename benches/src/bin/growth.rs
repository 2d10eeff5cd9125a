//! How wall time and CPU grow with the artifact and with the swarm: the benchmark `swarm` at several sizes and with several
//! leechers, and a picture of it.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use serde::{Deserialize, Serialize};
use shoal_benches::{
    ballast, deployment,
    namespaces::ended,
    plot::{Curve, Panel, svg},
    program, run,
};

/// Runs `swarm` at growing sizes with one leecher, and with growing numbers of leechers at one size, and draws both.
#[derive(Parser)]
#[command(max_term_width = 100)]
struct Args {
    /// The sizes for one leecher.
    #[arg(long, value_delimiter = ',', default_value = "64MiB,256MiB,1GiB,4GiB,10GiB")]
    sizes: Vec<bytesize::ByteSize>,
    /// The numbers of leechers.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32")]
    leechers: Vec<usize>,
    /// The size for these.
    #[arg(long, default_value = "256MiB")]
    size: bytesize::ByteSize,
    /// The largest UDP payload of the path.
    #[arg(long, default_value_t = 8_972)]
    mtu: u32,
    /// How many deployments each; medians are drawn.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Where files lie, in memory as long as they fit there.
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Where files lie that do not fit there.
    #[arg(long, default_value = "/var/tmp")]
    large_dir: PathBuf,
    /// The benchmark `swarm`; by default the one beside this one.
    #[arg(long, value_name = "PATH")]
    swarm: Option<PathBuf>,
    /// Where the picture goes.
    #[arg(long, default_value = "benches/growth.svg")]
    plot: PathBuf,
    /// Where the figures go, a JSON object a line; the picture is drawn from them.
    #[arg(long, default_value = "benches/history/growth.jsonl")]
    figures: PathBuf,
    /// Draw the figures that are there, and measure nothing.
    #[arg(long)]
    draw: bool,
}

/// What `swarm` says of one case.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Case {
    leechers: usize,
    size_bytes: u64,
    mtu: u32,
    wall_s: f64,
    cpu_s_per_gb: f64,
    raw_quinn_cpu_s_per_gb: f64,
    seed_upload_ratio: f64,
    rss_anon_peak_bytes_max: u64,
    verified: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    ended(work(&args).map(|()| ExitCode::SUCCESS))
}

fn work(args: &Args) -> anyhow::Result<()> {
    if !args.draw {
        let cases = measure(args)?;
        let mut out = String::new();
        for case in &cases {
            out += &format!("{}\n", serde_json::to_string(case)?);
        }
        fs::write(&args.figures, out)
            .with_context(|| format!("cannot write {}", args.figures.display()))?;
    }
    let text = fs::read_to_string(&args.figures)
        .with_context(|| format!("cannot read {}", args.figures.display()))?;
    let cases = text.lines().map(serde_json::from_str).collect::<Result<Vec<Case>, _>>();
    let cases = cases.with_context(|| format!("{} is no such file", args.figures.display()))?;
    draw(&cases, &args.plot)
}

fn measure(args: &Args) -> anyhow::Result<Vec<Case>> {
    ensure!(!args.sizes.is_empty() && !args.leechers.is_empty(), "give sizes and leechers");
    // Before hours of work.
    File::options()
        .append(true)
        .create(true)
        .open(&args.plot)
        .with_context(|| format!("cannot write {}", args.plot.display()))?;
    let swarm = program(args.swarm.as_deref(), "swarm")?;
    let by_size = args.sizes.iter().map(|size| (1, size.as_u64()));
    let by_leechers = args.leechers.iter().map(|leechers| (*leechers, args.size.as_u64()));
    let mut cases = Vec::new();
    for (leechers, size_bytes) in by_size.chain(by_leechers) {
        cases.push(one(args, &swarm, leechers, size_bytes)?);
    }
    Ok(cases)
}

fn one(args: &Args, swarm: &Path, leechers: usize, size_bytes: u64) -> anyhow::Result<Case> {
    // A fourth is left to the machine.
    let room = ballast::room(&args.dir)? / 4 * 3;
    let fits = |rounds| size_bytes * deployment::copies(leechers, rounds) < room;
    // One round of what takes minutes is as good as three of what takes a second.
    let (dir, rounds) = match args.rounds {
        rounds if fits(rounds) => (&args.dir, rounds),
        _ if fits(1) => (&args.dir, 1),
        _ => (&args.large_dir, 1),
    };
    let mut command = Command::new(swarm);
    command.args([
        "--json",
        "--leechers",
        &leechers.to_string(),
        "--size",
        &size_bytes.to_string(),
    ]);
    command.args(["--mtu", &args.mtu.to_string(), "--rounds", &rounds.to_string(), "--dir"]);
    let (_, printed) = run(command.arg(dir))?;
    let case: Case = serde_json::from_str(&printed).context("swarm printed something else")?;
    ensure!(case.verified == leechers, "{} of {leechers} leechers verified", case.verified);
    let mut out = std::io::stdout();
    writeln!(
        out,
        "{leechers:>2} leechers {:>6} MiB  {:>7.2} s  {:>5.2} CPU s/GB (bare quinn {:.2})  seed {:.2}  {} MiB at most",
        size_bytes >> 20,
        case.wall_s,
        case.cpu_s_per_gb,
        case.raw_quinn_cpu_s_per_gb,
        case.seed_upload_ratio,
        case.rss_anon_peak_bytes_max >> 20
    )?;
    out.flush()?;
    Ok(case)
}

fn draw(cases: &[Case], plot: &Path) -> anyhow::Result<()> {
    // The first cases are those of one leecher, of growing size; then the size stays.
    let size = cases.last().context("there are no figures")?.size_bytes;
    let split = cases.iter().rposition(|case| case.size_bytes != size).map_or(0, |at| at + 1);
    let (sizes, leechers) = cases.split_at(split);
    let mib = |case: &Case| (case.size_bytes >> 20) as f64;
    let count = |case: &Case| case.leechers as f64;
    let panels = [
        panel("wall, s, by MiB (one leecher)", sizes, mib, |case| case.wall_s, None),
        panel("CPU s/GB by MiB (one leecher)", sizes, mib, |c| c.cpu_s_per_gb, Some(bare)),
        panel(
            &format!("wall, s, by leechers ({} MiB)", size >> 20),
            leechers,
            count,
            |case| case.wall_s,
            None,
        ),
        panel(
            &format!("CPU s/GB by leechers ({} MiB)", size >> 20),
            leechers,
            count,
            |case| case.cpu_s_per_gb,
            Some(bare),
        ),
    ];
    fs::write(plot, svg(&panels)).with_context(|| format!("cannot write {}", plot.display()))
}

fn bare(case: &Case) -> f64 {
    case.raw_quinn_cpu_s_per_gb
}

type Number = fn(&Case) -> f64;

fn panel(
    title: &str,
    cases: &[Case],
    x: impl Fn(&Case) -> f64,
    y: Number,
    bar: Option<Number>,
) -> Panel {
    let curve = |name: &str, y: Number| Curve {
        name: name.into(),
        points: cases.iter().map(|case| (x(case), y(case))).collect(),
    };
    let mut curves = vec![curve("Shoal", y)];
    curves.extend(bar.map(|bar| curve("bare quinn", bar)));
    Panel { title: title.into(), curves }
}
