//! What came out: medians of the rounds, as a table and as JSON.

use std::fmt;

use serde::Serialize;
use shoal_benches::median_of;

use crate::{Args, case::Setting, kind::Kind};

/// One round of one program.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Outcome {
    /// From the leechers' common beginning until the last has the file.
    pub(crate) wall_s: f64,
    /// User and system time of all processes meanwhile, for each GB (1e9 bytes) that was delivered.
    pub(crate) cpu_s_per_gb: f64,
    /// What the seed sent, by its own count, in lengths of the file.
    pub(crate) seed_upload_copies: f64,
    /// What its line carried, headers and all, if it has one.
    pub(crate) seed_line_copies: Option<f64>,
    /// The most memory that the seed held, files not counted.
    pub(crate) seed_peak_bytes: u64,
    /// That of the leecher that held most.
    pub(crate) leecher_peak_bytes: u64,
}

/// All rounds of one program in one setting.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(serialize_with = "as_text")]
    program: Kind,
    encrypts: Option<&'static str>,
    verifies: Option<&'static str>,
    /// None when every round failed.
    median: Option<Outcome>,
    rounds: Vec<Outcome>,
    /// Why rounds failed.
    errors: Vec<String>,
}

/// One setting.
#[derive(Debug, Serialize)]
pub(crate) struct Table {
    #[serde(flatten)]
    setting: Setting,
    ideal_s: Option<f64>,
    rows: Vec<Row>,
}

/// A program's version, as it says it.
#[derive(Debug, Serialize)]
struct Version {
    #[serde(serialize_with = "as_text")]
    program: Kind,
    version: String,
}

/// All of it.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    versions: Vec<Version>,
    rounds: usize,
    pub(crate) settings: Vec<Table>,
}

fn as_text<S: serde::Serializer>(kind: &Kind, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(kind)
}

fn median(rounds: &[Outcome]) -> Option<Outcome> {
    let of = |pick: fn(&Outcome) -> f64| median_of(rounds.iter().map(pick));
    let lines = rounds.iter().filter_map(|round| round.seed_line_copies);
    Some(Outcome {
        wall_s: of(|round| round.wall_s)?,
        cpu_s_per_gb: of(|round| round.cpu_s_per_gb)?,
        seed_upload_copies: of(|round| round.seed_upload_copies)?,
        seed_line_copies: median_of(lines),
        seed_peak_bytes: of(|round| round.seed_peak_bytes as f64)? as u64,
        leecher_peak_bytes: of(|round| round.leecher_peak_bytes as f64)? as u64,
    })
}

impl Table {
    pub(crate) fn new(setting: Setting, kinds: &[Kind]) -> Self {
        let row = |kind: &Kind| Row {
            program: *kind,
            encrypts: kind.encrypts(),
            verifies: kind.verifies(),
            median: None,
            rounds: Vec::new(),
            errors: Vec::new(),
        };
        Self { setting, ideal_s: setting.ideal_s(), rows: kinds.iter().map(row).collect() }
    }

    /// Adds what a round came to, or why it failed.
    pub(crate) fn add(&mut self, kind: Kind, outcome: Result<Outcome, String>) {
        let Some(row) = self.rows.iter_mut().find(|row| row.program == kind) else {
            return;
        };
        match outcome {
            Ok(outcome) => row.rounds.push(outcome),
            Err(error) => row.errors.push(error),
        }
        row.median = median(&row.rounds);
    }

    fn cells(&self, row: &Row) -> Vec<String> {
        let Some(median) = &row.median else {
            return vec![row.program.to_string(), "failed".into()];
        };
        let mib = |bytes: u64| bytes >> 20;
        let failed = if row.errors.is_empty() { "" } else { " (a round failed)" };
        let mut cells = vec![
            format!("{}{failed}", row.program),
            row.encrypts.unwrap_or("no").to_owned(),
            row.verifies.unwrap_or("no").to_owned(),
            format!("{:.2} s", median.wall_s),
        ];
        if let Some(ideal_s) = self.ideal_s {
            cells.push(format!("{:.2} x", median.wall_s / ideal_s));
            cells.push(format!("{:.2}", ideal_s / median.wall_s));
        }
        cells.push(format!("{:.2}", median.cpu_s_per_gb));
        cells.push(format!("{:.2} x", median.seed_upload_copies));
        if let Some(line) = median.seed_line_copies {
            cells.push(format!("{line:.2} x"));
        }
        let (seed, leecher) = (mib(median.seed_peak_bytes), mib(median.leecher_peak_bytes));
        cells.push(format!("{seed} / {leecher} MiB"));
        cells
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = self.ideal_s.is_some();
        let mut heads = vec!["program", "encrypts", "verifies", "wall"];
        if held {
            heads.extend(["by the ideal", "share of the rate"]);
        }
        heads.extend(["CPU s/GB", "seed sent"]);
        if held {
            heads.push("its line carried");
        }
        heads.push("peak memory seed / leecher");
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::ASCII_MARKDOWN).set_header(heads);
        for row in &self.rows {
            table.add_row(self.cells(row));
        }
        write!(f, "{}", self.setting.title())?;
        if let Some(ideal_s) = self.ideal_s {
            write!(f, " (ideal {ideal_s:.1} s)")?;
        }
        write!(f, "\n\n{table}")
    }
}

impl Report {
    pub(crate) fn new(args: &Args) -> anyhow::Result<Self> {
        let installed = args.installed()?;
        let mut used = Vec::new();
        for case in &args.cases {
            used.extend(args.kinds(*case)?);
        }
        let used = Kind::ALL.iter().copied().filter(|kind| used.contains(kind));
        let version = |program: Kind| Version { program, version: program.version(&installed) };
        Ok(Self {
            versions: used.map(version).collect(),
            rounds: args.rounds,
            settings: Vec::new(),
        })
    }

    /// What is compared, with versions.
    pub(crate) fn versions(&self) -> String {
        let each = self.versions.iter().map(|one| format!("{} {}", one.program, one.version));
        each.collect::<Vec<_>>().join("; ")
    }

    /// Whether any round did.
    pub(crate) fn failed(&self) -> bool {
        self.settings.iter().flat_map(|table| &table.rows).any(|row| !row.errors.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(seed_up_bytes_per_s: Option<f64>) -> Setting {
        Setting {
            case: "many",
            leechers: 8,
            size_bytes: 100 << 20,
            mtu: 8_972,
            seed_up_bytes_per_s,
            link_bytes_per_s: None,
        }
    }

    fn outcome(wall_s: f64, line: Option<f64>) -> Outcome {
        Outcome {
            wall_s,
            cpu_s_per_gb: 10.0 - wall_s,
            seed_upload_copies: 1.25,
            seed_line_copies: line,
            seed_peak_bytes: 20 << 20,
            leecher_peak_bytes: 30 << 20,
        }
    }

    #[test]
    fn a_row_has_the_median_of_each_figure() {
        let mut table = Table::new(setting(None), &[Kind::Shoal, Kind::Aria2]);
        for wall_s in [3.0, 1.0, 2.0] {
            table.add(Kind::Shoal, Ok(outcome(wall_s, None)));
        }
        table.add(Kind::Aria2, Err("it was not there".into()));
        let text = table.to_string();
        let row = |name: &str| text.lines().find(|line| line.contains(name)).map(squeezed);
        let shoal = "| Shoal | mutual TLS | BLAKE3 | 2.00 s | 8.00 | 1.25 x | 20 / 30 MiB |";
        assert_eq!(row("Shoal").as_deref(), Some(shoal), "{text}");
        assert!(row("aria2").is_some_and(|row| row.starts_with("| aria2 | failed |")), "{text}");
        assert!(text.starts_with("1 to 8, 100 MiB, UDP payloads of at most 8972 bytes"), "{text}");
    }

    #[test]
    fn held_lines_are_compared_with_the_ideal() {
        let mut table = Table::new(setting(Some(f64::from(50 << 20))), &[Kind::Aria2]);
        table.add(Kind::Aria2, Ok(outcome(4.0, Some(1.31))));
        table.add(Kind::Aria2, Err("it stopped".into()));
        let text = table.to_string();
        let row = text.lines().find(|line| line.contains("aria2")).map(squeezed);
        let expected = "| aria2 (a round failed) | no | SHA-1 | 4.00 s | 2.00 x | 0.50 | 6.00 | 1.25 x | \
            1.31 x | 20 / 30 MiB |";
        assert_eq!(row.as_deref(), Some(expected), "{text}");
        assert!(text.contains("(ideal 2.0 s)"), "{text}");
    }

    /// Without the spaces that align columns.
    fn squeezed(line: &str) -> String {
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}
