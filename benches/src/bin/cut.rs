//! Hashing and encoding a file by `shoal_store::cut`, beside `b3sum` and `zstd -1 -T0` on the same file.
//!
//! Each is a process of its own, run in turn, round after round; the file is read once before, so that all find
//! it in the page cache. `cut` does what the other two do together, and is compared with their sum.

use std::{
    collections::BTreeMap,
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;
use clap::Parser;
use serde::{Deserialize, Serialize};
use shoal_benches::{Cost, installed, median, peak_rss_bytes, run, settle};
use shoal_proto::manifest::PieceSize;
use shoal_store::{CutOptions, cut};

/// Compares cutting a file with b3sum and zstd on the same file.
#[derive(Parser)]
struct Args {
    /// The file; without one, a file of --size-mib is made, half random, half a mix that compresses.
    #[arg(long)]
    file: Option<PathBuf>,
    /// The length of the file to make, in MiB.
    #[arg(long, default_value_t = 1024)]
    size_mib: u64,
    /// How many rounds.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// The zstd level, of all.
    #[arg(long, default_value_t = 1)]
    level: i32,
    /// The piece size in KiB; without one, the default for the file's length.
    #[arg(long)]
    piece_kib: Option<u64>,
    /// Threads of cut; without one, cut's own default.
    #[arg(long)]
    threads: Option<usize>,
    /// Where to write; without one, the system's directory for temporary files.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Cut --file into --dir once and say how it went: what each round runs.
    #[arg(long, hide = true)]
    once: bool,
}

/// What one cut says of itself.
#[derive(Serialize, Deserialize)]
struct Once {
    artifact: String,
    encoded_bytes: u64,
    peak_rss_bytes: u64,
}

#[derive(Serialize)]
struct Report {
    size_bytes: u64,
    encoded_bytes: u64,
    zstd_bytes: Option<u64>,
    cores: usize,
    rounds: usize,
    medians: BTreeMap<&'static str, Cost>,
    /// What b3sum and zstd take together, by what cut takes; above 1, cut is faster.
    speed_to_both_wall: Option<f64>,
    speed_to_both_cpu: Option<f64>,
    cut_peak_rss_bytes: u64,
    /// Whether b3sum and cut name the same artifact.
    same_hash: Option<bool>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let options = CutOptions {
        piece_size: args
            .piece_kib
            .map(|kib| PieceSize::from_bytes(kib << 10).context("no such piece size"))
            .transpose()?,
        level: args.level,
        threads: args.threads,
    };
    if args.once {
        return once(&args, &options);
    }
    let base = args.dir.clone().unwrap_or_else(env::temp_dir);
    let dir = tempfile::tempdir_in(base)?;
    let file = match &args.file {
        Some(file) => file.clone(),
        None => make(&dir.path().join("file"), args.size_mib)?,
    };
    std::io::copy(&mut fs::File::open(&file)?, &mut std::io::sink())?;
    let report = compare(&args, &file, dir.path())?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

fn once(args: &Args, options: &CutOptions) -> anyhow::Result<()> {
    let (file, dir) = args.file.as_deref().zip(args.dir.as_deref()).context("--file and --dir")?;
    let cut = cut(file, dir, options, |_| {})?;
    let said = Once {
        artifact: cut.index.manifest.artifact.to_string(),
        encoded_bytes: cut.index.encoded_bytes(),
        peak_rss_bytes: peak_rss_bytes()?,
    };
    println!("{}", serde_json::to_string(&said)?);
    Ok(())
}

/// A file that is like an artifact: of every 8 MiB, half is random and half is numbered lines.
fn make(path: &Path, size_mib: u64) -> anyhow::Result<PathBuf> {
    let mut file = std::io::BufWriter::new(fs::File::create(path)?);
    let mut random = vec![0; 4 << 20];
    let mut stream = blake3::Hasher::new().finalize_xof();
    let mut left = size_mib << 20;
    while left > 0 {
        stream.fill(&mut random);
        let words = random.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], 0, 0]));
        let mut text = Vec::with_capacity(random.len() + 64);
        for word in words {
            if text.len() >= random.len() {
                break;
            }
            writeln!(text, "call {word:08x} at {} in module {}", word % 977, word % 31)?;
        }
        for half in [&random[..], &text[..random.len()]] {
            let len = left.min(half.len() as u64);
            file.write_all(&half[..len as usize])?;
            left -= len;
        }
    }
    file.into_inner()?.sync_all()?;
    Ok(path.to_owned())
}

fn compare(args: &Args, file: &Path, dir: &Path) -> anyhow::Result<Report> {
    let (has_b3sum, has_zstd) = (installed("b3sum")?, installed("zstd")?);
    if !has_b3sum {
        eprintln!("b3sum is not installed (cargo install b3sum): left out");
    }
    if !has_zstd {
        eprintln!("zstd is not installed (apt-get install zstd): left out");
    }
    let mut costs: BTreeMap<&'static str, Vec<Cost>> = BTreeMap::new();
    let (mut said, mut b3sum_hash, mut zstd_bytes) = (None::<Once>, None, None);
    for _ in 0..args.rounds {
        if has_b3sum {
            let (cost, printed) = run(Command::new("b3sum").arg("--no-names").arg(file))?;
            costs.entry("b3sum").or_default().push(cost);
            b3sum_hash = Some(printed.trim().to_owned());
        }
        if has_zstd {
            let out = dir.join("out.zst");
            let mut zstd = Command::new("zstd");
            zstd.arg(format!("-{}", args.level)).args(["-T0", "-q", "-f", "-o"]).arg(&out);
            costs.entry("zstd").or_default().push(run(zstd.arg(file))?.0);
            zstd_bytes = Some(fs::metadata(&out)?.len());
            fs::remove_file(&out)?;
            settle(dir)?;
        }
        let out = dir.join("out");
        let mut cut = Command::new(env::current_exe()?);
        cut.arg("--once").arg("--file").arg(file).arg("--dir").arg(&out);
        cut.args(["--level", &args.level.to_string()]);
        if let Some(kib) = args.piece_kib {
            cut.args(["--piece-kib", &kib.to_string()]);
        }
        if let Some(threads) = args.threads {
            cut.args(["--threads", &threads.to_string()]);
        }
        let (cost, printed) = run(&mut cut)?;
        costs.entry("cut").or_default().push(cost);
        said = Some(serde_json::from_str(&printed)?);
        fs::remove_dir_all(&out)?;
        settle(dir)?;
    }
    let said = said.context("no rounds")?;
    let medians: BTreeMap<_, _> =
        costs.iter().filter_map(|(name, costs)| Some((*name, median(costs)?))).collect();
    let of = |name: &str| medians.get(name).copied();
    let both = of("b3sum").zip(of("zstd")).zip(of("cut"));
    let speed = |pick: fn(Cost) -> f64| {
        both.map(|((b3sum, zstd), cut)| (pick(b3sum) + pick(zstd)) / pick(cut))
    };
    Ok(Report {
        size_bytes: fs::metadata(file)?.len(),
        encoded_bytes: said.encoded_bytes,
        zstd_bytes,
        cores: std::thread::available_parallelism()?.get(),
        rounds: args.rounds,
        speed_to_both_wall: speed(|cost| cost.wall_s),
        speed_to_both_cpu: speed(|cost| cost.cpu_s),
        medians,
        cut_peak_rss_bytes: said.peak_rss_bytes,
        same_hash: b3sum_hash.map(|hash| hash == said.artifact),
    })
}

fn print(report: &Report) {
    let gb = report.size_bytes as f64 / 1e9;
    let share = |bytes: u64| 100.0 * bytes as f64 / report.size_bytes.max(1) as f64;
    println!("{gb:.2} GB, {} cores, medians of {} rounds", report.cores, report.rounds);
    for (name, cost) in &report.medians {
        let Cost { wall_s, cpu_s } = cost;
        println!(
            "{name:>6}  {wall_s:7.3} s  {:6.2} GB/s  {cpu_s:7.2} CPU s  {:5.2} CPU s/GB",
            gb / wall_s,
            cpu_s / gb
        );
    }
    print!("cut leaves {:.1} %", share(report.encoded_bytes));
    if let Some(bytes) = report.zstd_bytes {
        print!(", zstd {:.1} %", share(bytes));
    }
    println!("; cut held at most {:.0} MiB", report.cut_peak_rss_bytes as f64 / f64::from(1 << 20));
    if let Some((wall, cpu)) = report.speed_to_both_wall.zip(report.speed_to_both_cpu) {
        println!(
            "cut runs at {:.0} % of b3sum and zstd one after the other ({:.0} % by CPU time)",
            100.0 * wall,
            100.0 * cpu
        );
    }
    if report.same_hash == Some(false) {
        println!("cut and b3sum DISAGREE on the hash");
    }
}
