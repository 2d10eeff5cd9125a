//! The program as a user meets it.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

use serde_json::Value;

fn sim(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shoal-sim")).args(args).output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let out = sim(args);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

const SMALL: [&str; 9] =
    ["--nodes", "40", "--size", "200MB", "--nic", "1Gbps", "--piece-size", "1MiB", "--json"];

#[test]
fn one_seed_gives_one_run_and_another_seed_another() {
    let mut again = SMALL.to_vec();
    again.extend(["--seed", "2"]);
    let (first, second, other) = (json(&SMALL), json(&SMALL), json(&again));
    for key in ["trace_digest", "makespan_s", "events", "messages", "origin_copies"] {
        assert_eq!(first[key], second[key], "{key}");
    }
    assert_ne!(first["trace_digest"], other["trace_digest"]);
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
fn one_machine_and_one_piece_are_a_fleet() {
    let run = json(&["--nodes", "1", "--size", "1B", "--json"]);
    assert_eq!((&run["completed"], &run["pieces"]), (&1.into(), &1.into()));
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
        &["--seed", "-1"],
        &["--unknown"],
        &["surplus"],
    ] {
        let out = sim(args);
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        let text = String::from_utf8(out.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
        assert!(text.starts_with("error: "), "{args:?}: {text}");
        assert!(out.stdout.is_empty());
    }
}

#[test]
fn help_is_help() {
    let out = sim(&["--help"]);
    assert!(out.status.success());
    assert!(String::from_utf8(out.stdout).unwrap().contains("--piece-size"));
}
