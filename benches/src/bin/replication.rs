//! Copies of one artifact into several regions' buckets at once, as the coordinator on duty makes them, beside as many plain
//! copies at once, in one run: bytes, seconds, CPU, and how much of the main bucket is read.

use std::{
    env, fs,
    path::PathBuf,
    process::{Child, Command, ExitCode, Stdio},
    time::Instant,
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use serde::Serialize;
use shoal_benches::{
    children_cpu_s, median_of, namespaces, net,
    net::{Line, Rate},
    process, program, random_file,
};
use shoal_origin::Bucket;
use shoal_proto::{ArtifactId, EncodingId};
use shoal_store::{Cut, CutOptions, cut, part_name};
use tokio::task::JoinSet;

/// Measures replication beside plain copies.
#[derive(Parser)]
#[command(max_term_width = 100)]
struct Args {
    /// How long the artifact is; its bytes do not compress.
    #[arg(long, default_value = "1GiB")]
    size: bytesize::ByteSize,
    /// Into how many regions.
    #[arg(long, default_value_t = 10)]
    regions: usize,
    /// How many rounds; medians are given.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Under what the buckets lie: a directory, or s3://BUCKET/PREFIX with its server in the environment, as
    /// `shoal-test-s3 COMMAND` sets it.
    #[arg(long, default_value = "/dev/shm")]
    base: String,
    /// A directory for the artifact itself and what plain copies put down on their way.
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Put an S3 server at the other end of a line of so many Mbit/s each way, and the buckets into it.
    #[arg(long, conflicts_with = "base")]
    link_mbit: Option<f64>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Set by the benchmark when it starts itself in its namespaces...
    #[arg(long, hide = true)]
    inside: bool,
    /// ...and at its end of the line.
    #[arg(long, hide = true)]
    behind: bool,
}

/// One way of copying in one round.
#[derive(Debug, Clone, Serialize)]
struct Round {
    way: &'static str,
    seconds: f64,
    cpu_s: f64,
    main_bytes: u64,
}

/// One way of copying, over all rounds.
#[derive(Debug, Serialize)]
struct Way {
    way: &'static str,
    bytes: u64,
    seconds: f64,
    mb_per_s: f64,
    cpu_s_per_gb: f64,
    /// Bytes read from the main bucket, by the artifact's; none where that is not counted.
    main_copies: Option<f64>,
    /// Its speed by that of the plain copies of the same run.
    by_plain: f64,
    /// The copies' bytes by what the line could carry meanwhile; none without a line.
    by_link: Option<f64>,
}

const SHARED: &str = "shoal";
const ALONE: &str = "shoal, each region reads for itself";
const PLAIN: &str = "plain copies";

/// The machine at the near end of the line, and its address.
const MACHINE: (&str, &str) = ("coordinator", "10.77.1.1");

/// How long a queue before the line is.
const QUEUE_S: f64 = 0.05;

struct Bench {
    args: Args,
    /// What the buckets lie under.
    base: String,
    work: tempfile::TempDir,
    cut: Cut,
    main: Bucket,
}

impl Bench {
    async fn new(args: Args) -> anyhow::Result<Self> {
        ensure!((1..=100).contains(&args.regions), "--regions is 1 to 100");
        ensure!((1..=100).contains(&args.rounds), "--rounds is 1 to 100");
        let work = tempfile::Builder::new().prefix("shoal-replication-").tempdir_in(&args.dir)?;
        let under = if args.behind { "s3://shoal" } else { args.base.as_str() };
        let base = match under.contains("://") {
            true => format!("{under}/{}", std::process::id()),
            false => format!(
                "{under}/{}",
                work.path().file_name().and_then(|n| n.to_str()).context("a name")?
            ),
        };
        let file = work.path().join("artifact");
        random_file(&file, args.size.as_u64())?;
        let parts = work.path().join("parts");
        fs::create_dir(&parts)?;
        let cut = cut(&file, &parts, &CutOptions::default(), |_| {})?;
        fs::remove_file(&file)?;
        let main = Bucket::open(&format!("{base}/main"))?;
        main.upload(&parts, &cut.index, &cut.index_bytes, &cut.encoding, |_| {}).await?;
        fs::remove_dir_all(&parts)?;
        Ok(Self { args, base, work, cut, main })
    }

    fn ids(&self) -> (ArtifactId, EncodingId) {
        (self.cut.index.manifest.artifact, self.cut.encoding)
    }

    fn bytes(&self) -> u64 {
        self.cut.index.parts.iter().map(|part| part.len).sum()
    }

    /// As the coordinator on duty does: a copy a region, all at once.
    async fn shoal(&self, way: &'static str, round: usize) -> anyhow::Result<Round> {
        shoal_origin::set_sharing(way == SHARED);
        let (artifact, encoding) = self.ids();
        let place = format!("{}/{}{round}", self.base, if way == SHARED { "s" } else { "a" });
        let buckets: Vec<Bucket> = (0..self.args.regions)
            .map(|region| Bucket::open(&format!("{place}/r{region}")))
            .collect::<Result<_, _>>()?;
        let before = (process::usage(std::process::id())?.cpu_s, shoal_origin::source_reads());
        let start = Instant::now();
        let mut copies = JoinSet::new();
        for bucket in buckets.clone() {
            let main = self.main.clone();
            copies
                .spawn(async move { bucket.copy_from(&main, &artifact, &encoding, |_| {}).await });
        }
        while let Some(copied) = copies.join_next().await {
            ensure!(copied??.bytes == self.bytes(), "not all of it was copied");
        }
        let seconds = start.elapsed().as_secs_f64();
        let cpu_s = process::usage(std::process::id())?.cpu_s - before.0;
        let main_bytes = shoal_origin::source_reads() - before.1;
        for bucket in &buckets {
            bucket.remove_index(&artifact, &encoding).await?;
            while !bucket.remove_parts(&artifact, &encoding, || true).await? {}
        }
        Ok(Round { way, seconds, cpu_s, main_bytes })
    }

    /// A process a region that copies object after object: `cp` and `sync`, or `curl` down and up.
    fn plain(&self, round: usize) -> anyhow::Result<Round> {
        let (artifact, encoding) = self.ids();
        let under = format!("artifacts/{artifact}/{encoding}");
        let objects: Vec<String> =
            (0..self.cut.index.parts.len() as u32).map(part_name).chain(["index".into()]).collect();
        let remote = self.base.strip_prefix("s3://");
        let before = children_cpu_s()?;
        let start = Instant::now();
        let mut running: Vec<Child> = Vec::new();
        for region in 0..self.args.regions {
            let to = format!("p{round}/r{region}");
            let script = match remote {
                None => format!(
                    "set -e; mkdir -p '{base}/{to}/{under}'; cd '{base}/main/{under}'; for o in {objects}; do \
                     cp $o '{base}/{to}/{under}/'; sync '{base}/{to}/{under}'/$o; done",
                    base = self.base,
                    objects = objects.join(" ")
                ),
                Some(path) => format!(
                    "set -e; s3() {{ curl -sSf --aws-sigv4 aws:amz:$AWS_REGION:s3 \
                     --user $AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY \
                     -H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' \"$@\"; }}; \
                     for o in {objects}; do s3 -o '{hold}' $AWS_ENDPOINT_URL/{path}/main/{under}/$o; \
                     s3 -T '{hold}' $AWS_ENDPOINT_URL/{path}/{to}/{under}/$o >/dev/null; done",
                    hold = self.work.path().join(format!("hold-{region}")).display(),
                    objects = objects.join(" ")
                ),
            };
            let mut command = Command::new("bash");
            running.push(command.arg("-c").arg(script).stdin(Stdio::null()).spawn()?);
        }
        for mut child in running {
            ensure!(child.wait()?.success(), "a plain copy failed");
        }
        let seconds = start.elapsed().as_secs_f64();
        let cpu_s = children_cpu_s()? - before;
        Ok(Round { way: PLAIN, seconds, cpu_s, main_bytes: 0 })
    }

    async fn clear_plain(&self, round: usize) -> anyhow::Result<()> {
        let (artifact, encoding) = self.ids();
        for region in 0..self.args.regions {
            let bucket = Bucket::open(&format!("{}/p{round}/r{region}", self.base))?;
            bucket.verify(&artifact, &encoding).await.context("the plain copy is not right")?;
            bucket.remove_index(&artifact, &encoding).await?;
            while !bucket.remove_parts(&artifact, &encoding, || true).await? {}
        }
        Ok(())
    }

    fn report(&self, rounds: &[Round]) -> Vec<Way> {
        let bytes = self.bytes() * self.args.regions as u64;
        let of = |way: &str, figure: fn(&Round) -> f64| {
            median_of(rounds.iter().filter(|round| round.way == way).map(figure))
                .unwrap_or_default()
        };
        let plain = of(PLAIN, |round| round.seconds);
        let ways = [SHARED, ALONE, PLAIN].into_iter().map(|way| {
            let seconds = of(way, |round| round.seconds);
            let main = of(way, |round| round.main_bytes as f64) / self.bytes() as f64;
            Way {
                way,
                bytes,
                seconds,
                mb_per_s: bytes as f64 / 1e6 / seconds,
                cpu_s_per_gb: of(way, |round| round.cpu_s) / (bytes as f64 / 1e9),
                main_copies: (way != PLAIN).then_some(main),
                by_plain: plain / seconds,
                by_link: self.args.link_mbit.map(|mbit| bytes as f64 * 8e-6 / seconds / mbit),
            }
        });
        ways.collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if !self.base.contains("://") {
            let _ = fs::remove_dir_all(&self.base);
        }
    }
}

/// Runs this program again at the near end of a line, and an S3 server at the far one, which is held back by nothing else.
fn with_line(mbit: f64) -> anyhow::Result<ExitCode> {
    net::bridge()?;
    let line = Line::even(Rate { bits_per_s: mbit * 1e6, queue_s: QUEUE_S });
    net::machine(MACHINE.0, MACHINE.1, line)?;
    let status = Command::new(program(None, "shoal-test-s3")?)
        .env("SHOAL_TEST_S3_LISTEN", format!("{}:0", net::CONTROL))
        .args(["ip", "netns", "exec", MACHINE.0])
        .arg(env::current_exe()?)
        .args(env::args_os().skip(1))
        .arg("--behind")
        .status()?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn main() -> ExitCode {
    let args = Args::parse();
    let check = |mbit: f64| {
        ensure!((1.0..=100_000.0).contains(&mbit), "--link-mbit is 1 to 100000");
        program(None, "shoal-test-s3")?;
        net::check()
    };
    match args.link_mbit {
        Some(mbit) if !args.behind => {
            namespaces::enter(args.inside, &[], || check(mbit), || with_line(mbit))
        }
        _ => namespaces::ended(measure(args).map(|()| ExitCode::SUCCESS)),
    }
}

#[tokio::main]
async fn measure(args: Args) -> anyhow::Result<()> {
    let bench = Bench::new(args).await?;
    let mut rounds = Vec::new();
    for round in 0..bench.args.rounds {
        rounds.push(bench.shoal(SHARED, round).await?);
        rounds.push(bench.plain(round)?);
        bench.clear_plain(round).await?;
        rounds.push(bench.shoal(ALONE, round).await?);
    }
    let ways = bench.report(&rounds);
    if bench.args.json {
        println!("{}", serde_json::to_string_pretty(&ways)?);
        return Ok(());
    }
    println!("{} into {} regions under {}:", bench.args.size, bench.args.regions, bench.base);
    for way in &ways {
        let main = way.main_copies.map_or_else(|| "-".into(), |main| format!("{main:.2}"));
        let link = way.by_link.map_or_else(String::new, |link| format!("  {link:.2} of the line"));
        println!(
            "{:<36} {:>6.1} GB  {:>6.2} s  {:>6.0} MB/s  {:>5.2} CPU s/GB  main read {main}  {:.2} of plain{link}",
            way.way,
            way.bytes as f64 / 1e9,
            way.seconds,
            way.mb_per_s,
            way.cpu_s_per_gb,
            way.by_plain
        );
    }
    Ok(())
}
