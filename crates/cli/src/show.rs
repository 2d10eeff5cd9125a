//! How answers look: tables, JSON, sizes and times.

use std::{
    io::{self, Write as _},
    time::{Duration, SystemTime},
};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use shoal_client::{ClientError, types::Halt};

use crate::exit::ReaderGone;

/// Prints `text` and a newline on stdout. A reader that has gone away (`| head`) is no error of ours.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    match stream(text) {
        Err(error) if error.is::<ReaderGone>() => Ok(()),
        printed => printed,
    }
}

/// The same where more will follow: [`ReaderGone`] when nobody reads it any more.
pub(crate) fn stream(text: &str) -> anyhow::Result<()> {
    written(writeln!(io::stdout().lock(), "{text}"))
}

/// What became of writing to stdout.
pub(crate) fn written(result: io::Result<()>) -> anyhow::Result<()> {
    result.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => ReaderGone.into(),
        _ => anyhow::Error::new(error).context("cannot write to standard output"),
    })
}

/// Says that a call did not do, and is made again.
pub(crate) fn again(error: &ClientError) {
    note(&format!("shoal: {error}; trying again"));
}

/// Says something on stderr; where that is closed there is nobody to tell.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Prints `value` as JSON.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}

/// Prints one of several values: a line of JSON when `json`, else what `human` makes of it.
pub(crate) fn stream_as<T: Serialize>(
    json: bool,
    value: &T,
    human: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    stream(&if json { serde_json::to_string(value)? } else { human(value) })
}

/// Prints JSON when `json`, else what `human` makes of it.
pub(crate) fn print_as<T: Serialize>(
    json: bool,
    value: &T,
    human: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    if json { print_json(value) } else { print(&human(value)) }
}

/// An empty table with these column titles, no lines, as wide as its content.
pub(crate) fn table(titles: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(titles.to_vec());
    table
}

/// A table as text, without the blanks that pad its last column; `nothing` when it has no rows.
pub(crate) fn render(table: &Table, nothing: &str) -> String {
    if table.is_empty() {
        return nothing.into();
    }
    let lines: Vec<_> = table.lines().map(|line| line.trim_end().to_string()).collect();
    // The preset leaves a blank before the first column.
    let indent = lines.iter().all(|line| line.starts_with(' '));
    lines
        .iter()
        .map(|line| if indent { &line[1..] } else { line.as_str() })
        .collect::<Vec<_>>()
        .join("\n")
}

/// A size as people read it: `256.0 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    bytesize::ByteSize::b(bytes).to_string()
}

/// Milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

/// A moment as time gone by: `3m 5s ago`.
pub(crate) fn ago(at_ms: i64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let at = Duration::from_millis(u64::try_from(at_ms).unwrap_or(0));
    format!("{} ago", duration(now.saturating_sub(at)))
}

/// A moment to come: `in 3m 5s`.
pub(crate) fn until(at_ms: i64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let at = Duration::from_millis(u64::try_from(at_ms).unwrap_or(0));
    format!("in {}", duration(at.saturating_sub(now)))
}

/// A duration with at most its two greatest units: `3m 5s`, `2days 4h`, `0s`.
pub(crate) fn duration(duration: Duration) -> String {
    let whole = humantime::format_duration(Duration::from_secs(duration.as_secs())).to_string();
    whole.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// Who took it out of service or stopped it, when and why.
pub(crate) fn halted(halt: &Halt) -> String {
    let reason = halt.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    format!("{} by {}{reason}", ago(halt.at_ms), halt.by)
}

/// Reads how many rows are wanted.
pub(crate) fn at_least_one() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..)
}

/// Reads a time, such as 90s, 2h or 7days.
pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "write a time such as 90s, 2h or 7days".into())
}

/// Reads a time that something is to last: a second at least.
pub(crate) fn parse_lasting(text: &str) -> Result<Duration, String> {
    match parse_time(text)? {
        time if time < Duration::from_secs(1) => Err("a second is the least".into()),
        time => Ok(time),
    }
}

/// Reads a size, such as 4MiB.
pub(crate) fn parse_size(text: &str) -> Result<bytesize::ByteSize, String> {
    text.parse().map_err(|_| "write a size such as 4MiB".into())
}

/// The time between two moments in seconds; none when one of them is not there yet.
pub(crate) fn seconds_between(from_ms: Option<i64>, to_ms: Option<i64>) -> Option<f64> {
    let millis = to_ms?.saturating_sub(from_ms?).max(0);
    Some(millis as f64 / 1_000.0)
}

/// An error and its causes in one line.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut causes: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        // Many an error's own text holds its cause's already.
        if !causes.iter().any(|said| said.contains(&text)) {
            causes.push(text);
        }
        if cause.is::<ClientError>() {
            // It says what lies below, as far as that says anything.
            break;
        }
    }
    causes.join(": ").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_are_short() {
        assert_eq!(duration(Duration::from_millis(400)), "0s");
        assert_eq!(duration(Duration::from_secs(3_725)), "1h 2m");
        assert_eq!(size(256 << 20), "256.0 MiB");
        assert_eq!(seconds_between(Some(1_000), Some(2_500)), Some(1.5));
        assert_eq!(seconds_between(None, Some(1)), None);
    }

    #[test]
    fn tables_have_no_lines_and_no_trailing_blanks() {
        let mut table = table(&["NAME", "STATE"]);
        assert_eq!(render(&table, "none"), "none");
        table.add_row(["web", "RUNNING"]).add_row(["longer", "OK"]);
        assert_eq!(render(&table, "none"), "NAME    STATE\nweb     RUNNING\nlonger  OK");
    }

    #[test]
    fn an_error_is_one_line_and_says_nothing_twice() {
        let error = anyhow::anyhow!("no such\nfile").context("cannot read x: no such\nfile");
        assert_eq!(one_line(&error), "cannot read x: no such file");
        let error = anyhow::anyhow!("cause").context("effect");
        assert_eq!(one_line(&error), "effect: cause");
    }
}
