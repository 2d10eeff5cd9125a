//! The program as a user meets it.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

fn sim(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shoal-sim")).args(args).output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let out = sim(args);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Writes a scenario file and gives its path.
fn scenario(folder: &Path, text: &str) -> String {
    let path = folder.join("scenario.toml");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_string()
}

const SMALL: [&str; 9] =
    ["--nodes", "40", "--size", "200MB", "--nic", "1Gbps", "--piece-size", "1MiB", "--json"];

const TINY: [&str; 8] =
    ["--nodes", "10", "--size", "20MB", "--nic", "1Gbps", "--piece-size", "1MiB"];

#[test]
fn one_seed_gives_one_run_and_another_seed_another() {
    let mut again = SMALL.to_vec();
    again.extend(["--seed", "2"]);
    let mut threads = SMALL.to_vec();
    threads.extend(["--threads", "1"]);
    let (first, second, other) = (json(&SMALL), json(&threads), json(&again));
    for key in ["trace_digest", "makespan_s", "events", "messages", "origin_copies"] {
        assert_eq!(first[key], second[key], "{key}");
    }
    assert_ne!(first["trace_digest"], other["trace_digest"]);
}

#[test]
fn the_result_is_the_same_with_any_number_of_threads() {
    let run = |threads| {
        json(&[
            "--nodes",
            "2000",
            "--size",
            "3MB",
            "--nic",
            "1Gbps",
            "--piece-size",
            "1MiB",
            "--zones",
            "3",
            "--zone-uplink",
            "100Gbps",
            "--threads",
            threads,
            "--json",
        ])
    };
    let (one, two) = (run("1"), run("2"));
    for key in ["trace_digest", "makespan_s", "events", "messages", "cross_zone_copies"] {
        assert_eq!(one[key], two[key], "{key}");
    }
}

#[test]
fn whatever_goes_wrong_every_live_machine_is_complete() {
    let world = "about = \"a test\"\n[world]\nnodes = 60\nsize = \"60MB\"\nnic = \"100Mbps\"\npiece_size = \"1MiB\"\nzones = 3\n";
    let faults = [
        "kind = \"churn\"\nper_minute = 1.0\ndown = \"2s\"\nuntil = \"5s\"\n",
        "kind = \"corrupt\"\nshare = 0.1\n",
        "kind = \"zone_cut\"\nzone = 1\nat = \"1s\"\nfor = \"4s\"\n",
        "kind = \"regions_lost\"\nprocesses = 2\nat = \"100ms\"\n",
        "kind = \"bucket_fails\"\nat = \"100ms\"\nfor = \"2s\"\n",
        "kind = \"late\"\nshare = 0.2\nat = \"3s\"\n",
    ];
    let folder = tempfile::tempdir().unwrap();
    for fault in faults {
        let path = scenario(folder.path(), &format!("{world}[[fault]]\n{fault}"));
        let run = json(&["--scenario", &path, "--json"]);
        assert_eq!(run["completed"], 60, "{fault}: {run}");
        assert!(run["origin_copies"].as_f64().unwrap() <= 2.5, "{fault}: {run}");
    }
}

#[test]
fn machines_that_are_read_ahead_may_lie_dead_or_alone() {
    // Over 500 machines are read ahead: also those that have no neighbour yet, or none any more.
    let text = "about = \"a test\"\n[world]\nnodes = 600\nsize = \"8MB\"\nnic = \"100Mbps\"\npiece_size = \"1MiB\"\nzones = 3\n\
        [[fault]]\nkind = \"churn\"\nper_minute = 1.0\ndown = \"1s\"\nuntil = \"3s\"\n\
        [[fault]]\nkind = \"zone_cut\"\nzone = 1\nat = \"100ms\"\nfor = \"1s\"\n\
        [[fault]]\nkind = \"late\"\nshare = 0.3\nat = \"500ms\"\n";
    let folder = tempfile::tempdir().unwrap();
    let path = scenario(folder.path(), text);
    let run = json(&["--scenario", &path, "--json"]);
    assert_eq!(run["completed"], 600, "{run}");
}

#[test]
fn a_small_fleet_comes_near_the_bound_and_reads_the_bucket_once() {
    let run = json(&SMALL);
    assert_eq!(run["completed"], 40);
    assert_eq!(run["pieces"], 191);
    assert_eq!(run["lower_bound_s"], 1.6);
    assert!(run["origin_copies"].as_f64().unwrap() <= 1.1, "{run}");
    let efficiency = run["efficiency"].as_f64().unwrap();
    assert!(efficiency > 0.8 && efficiency <= 1.0, "{run}");
}

#[test]
fn a_short_last_piece_arrives_like_any_other() {
    // At 10 Gbit/s a byte needs less than a nanosecond, and 480 bytes overtake the part before them.
    for (size, piece_size, seed) in [("4194305B", "1MiB", "1"), ("20972000B", "256KiB", "3")] {
        let run = json(&[
            "--nodes",
            "20",
            "--size",
            size,
            "--piece-size",
            piece_size,
            "--seed",
            seed,
            "--json",
        ]);
        assert!(run["makespan_s"].as_f64().unwrap() < 1.0, "{run}");
    }
}

#[test]
fn one_machine_and_one_piece_are_a_fleet() {
    let run = json(&["--nodes", "1", "--size", "1B", "--json"]);
    assert_eq!((&run["completed"], &run["pieces"]), (&1.into(), &1.into()));
}

#[test]
fn the_json_has_these_fields_in_this_order() {
    let mut args = TINY.to_vec();
    args.push("--json");
    let out = String::from_utf8(sim(&args).stdout).unwrap();
    assert_eq!(out.lines().count(), 1);
    let mut rest = out.as_str();
    for key in [
        "nodes",
        "completed",
        "size_bytes",
        "piece_size_bytes",
        "pieces",
        "seed",
        "lower_bound_s",
        "startup_s",
        "makespan_s",
        "p50_s",
        "p99_s",
        "p999_s",
        "efficiency",
        "origin_copies",
        "cross_zone_copies",
        "messages",
        "control_bytes_per_node",
        "events",
        "trace_digest",
        "wall_s",
        "peak_rss_bytes",
    ] {
        let at = rest.find(&format!("\"{key}\":")).unwrap_or_else(|| panic!("{key} in {out}"));
        rest = &rest[at..];
    }
}

#[test]
fn regions_are_reported_each_and_the_worst_above() {
    let mut args = TINY.to_vec();
    args.extend(["--regions", "3", "--json"]);
    let run = json(&args);
    let regions = run["regions"].as_array().unwrap();
    assert_eq!((regions.len(), &run["nodes"], &run["completed"]), (3, &30.into(), &30.into()));
    let last = regions.iter().map(|region| region["makespan_s"].as_f64().unwrap());
    assert_eq!(run["makespan_s"], last.fold(0.0, f64::max));
    // Each region can be had alone by its seed.
    let mut alone = TINY.to_vec();
    let seed = regions[2]["seed"].to_string();
    alone.extend(["--seed", &seed, "--json"]);
    assert_eq!(json(&alone)["trace_digest"], regions[2]["trace_digest"]);
}

#[test]
fn flags_go_before_the_scenario() {
    let folder = tempfile::tempdir().unwrap();
    let text = "about = 'Two zones.'\n[world]\nnodes = 20\nsize = '20MB'\nzones = 2\nseed = 7\n";
    let path = scenario(folder.path(), text);
    let run = json(&["--scenario", &path, "--nodes", "12", "--json"]);
    assert_eq!((&run["nodes"], &run["seed"]), (&12.into(), &7.into()));
    assert_eq!(run["size_bytes"], 20_000_000);
}

#[test]
fn a_pipeline_is_added_up() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios/pipeline.toml");
    let mut args = TINY.to_vec();
    args.extend(["--zones", "1", "--scenario", path, "--regions", "2", "--json"]);
    let run = json(&args);
    let steps = run["pipeline"].as_array().unwrap();
    let sum: f64 = steps.iter().map(|step| step["s"].as_f64().unwrap()).sum();
    // What is printed is read again to the last digit but one.
    assert!((run["total_s"].as_f64().unwrap() - sum).abs() < 1e-6);
    let swarm = steps.iter().find(|step| step["part"] == "swarm").unwrap();
    assert_eq!(swarm["s"], run["makespan_s"]);
}

#[test]
fn a_run_stops_where_it_is_told_to_and_says_who_was_watched() {
    let mut args = TINY.to_vec();
    args.extend(["--stop-at", "0.05", "--watch", "3", "--json"]);
    let out = sim(&args);
    assert!(out.status.success());
    let run: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&run["completed"], &run["makespan_s"]), (&0.into(), &Value::Null));
    assert!(!out.stderr.is_empty(), "the events of machine 3");
}

#[test]
fn a_plot_is_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.png");
    let mut args = TINY.to_vec();
    args.extend(["--plot", path.to_str().unwrap()]);
    let out = sim(&args);
    assert!(out.status.success());
    assert!(String::from_utf8(out.stdout).unwrap().contains("The world: fixed"));
    assert!(fs::read(&path).unwrap().starts_with(b"\x89PNG"));
}

/// Not started: wrong input is one line, and nothing on stdout.
fn refused(args: &[&str]) -> String {
    let out = sim(args);
    assert_eq!(out.status.code(), Some(2), "{args:?}");
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
    assert!(text.starts_with("error: "), "{args:?}: {text}");
    assert!(out.stdout.is_empty());
    text
}

#[test]
fn wrong_input_is_one_line_and_exit_2() {
    for args in [
        &["--nodes", "0"][..],
        &["--nodes", "many"],
        &["--size", "0"],
        &["--size", "10XB"],
        &["--nic", "10GB"],
        &["--piece-size", "3MiB"],
        &["--size", "10TB"],
        &["--size", "1000GB", "--piece-size", "256KiB"],
        &["--nodes", "2", "--zones", "3"],
        &["--zones", "0"],
        &["--racks", "0"],
        &["--parts", "65"],
        &["--rack-uplink", "0bps"],
        &["--zone-uplink", "fast"],
        &["--seed", "-1"],
        &["--regions", "0"],
        &["--threads", "0"],
        &["--stop-at", "-1"],
        &["--stop-at", "nan"],
        &["--nodes", "10", "--watch", "10"],
        &["--scenario"],
        &["--unknown"],
        &["surplus"],
    ] {
        refused(args);
    }
}

#[test]
fn a_picture_that_cannot_be_written_is_said_before_the_run() {
    // Were it run first, this would take hours.
    let text = refused(&["--nodes", "1000000", "--plot", "/no/such/folder/run.png"]);
    assert!(text.starts_with("error: cannot write /no/such/folder/run.png: "), "{text}");
}

#[test]
fn a_wrong_scenario_is_said_with_file_line_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("none.toml");
    let text = refused(&["--scenario", missing.to_str().unwrap()]);
    assert!(text.contains("none.toml: "), "{text}");
    let path = scenario(folder.path(), "about = 'x'\n[[fault]]\nkind = 'late'\nshares = 0.5\n");
    let text = refused(&["--scenario", &path]);
    assert!(text.contains("scenario.toml:4: ") && text.contains("`shares`"), "{text}");
    let cut = "about = 'x'\n[[fault]]\nkind = 'zone_cut'\nzone = 1\nat = '1s'\nfor = '1s'\n";
    let path = scenario(folder.path(), cut);
    assert!(refused(&["--scenario", &path]).contains("scenario.toml:4: zone: "));
}

#[test]
fn help_is_help() {
    let out = sim(&["--help"]);
    assert!(out.status.success());
    assert!(String::from_utf8(out.stdout).unwrap().contains("--piece-size"));
}
