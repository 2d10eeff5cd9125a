//! The binary as a user meets it: its errors, and the demo from start to end.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

fn shoal(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
    for name in ["SHOAL_COORDINATOR", "SHOAL_IDENTITY", "SHOAL_CONFIG", "SHOAL_LOG"] {
        command.env_remove(name);
    }
    command.env("XDG_CONFIG_HOME", dir);
    command.args(args).env("TMPDIR", dir).current_dir(dir).output().unwrap()
}

/// Runs `shoal` with `args`, and checks the exit code and that the error is one line with `word` in it.
fn refused(code: i32, args: &[&str], word: &str) {
    let dir = tempfile::tempdir().unwrap();
    let output = shoal(dir.path(), args);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
    assert_eq!(error.lines().count(), 1, "{args:?}: {error}");
    assert!(error.starts_with("shoal: ") && error.contains(word), "{args:?}: {error}");
}

#[test]
fn errors_are_one_line_that_says_what_to_do() {
    refused(4, &["status"], "shoal login");
    refused(4, &["status", "--coordinator", "https://127.0.0.1:1"], "SHOAL_IDENTITY");
    refused(1, &["jobs", "--coordinator", "x", "--identity", "/nowhere"], "shoal pki issue");
    refused(2, &["jobs", "--identity", "/nowhere"], "SHOAL_COORDINATOR");
    refused(2, &["agent", "--config", "/nowhere"], "/nowhere");
    refused(2, &["worker"], "give --config FILE");
    refused(1, &["pki", "init", "x", "--cluster", "No Name"], "cluster name");
    let issue = ["pki", "issue", "--pki", "x", "--name", "w", "--out", "y", "--role"];
    refused(1, &[&issue[..], &["worker"]].concat(), "pki init");
    refused(1, &["demo", "--artifact", "/nowhere"], "/nowhere");
    refused(1, &["demo", "--stop", "/nowhere"], "/nowhere");
    refused(1, &["logout"], "nobody is logged in");
}

#[test]
fn wrong_usage_is_one_line_and_a_code_of_its_own() {
    refused(2, &["staus"], "similar subcommand exists: 'status'");
    refused(2, &["status", "--jsno"], "'--json'");
    refused(2, &["build", "web"], "usage: shoal build");
    refused(2, &["build", "web", "main"], "git rev-parse");
    refused(2, &["job", "x"], "not a whole number");
    refused(2, &["jobs", "--limit", "0"], "0 is not in 1..");
    refused(2, &["audit", "--since", "yesterday"], "2h");
    refused(2, &["publish", "x", "--app", "web", "--piece-size", "big"], "4MiB");
    refused(2, &["completions", "tcsh"], "[possible values: bash, zsh, fish]");
    refused(2, &["demo", "--size", "1KiB"], "--size");
    refused(2, &["demo", "--agents", "1"], "--regions");
    refused(2, &["demo", "--bucket", "/tmp"], "--bucket");
    refused(2, &["join", "--coordinator", "x", "--ca-hash", "y", "--token-file", "z"], "--ca-hash");
    let dir = tempfile::tempdir().unwrap();
    for args in [&[][..], &["pki"], &["queue"]] {
        let output = shoal(dir.path(), args);
        let help = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && help.contains("Commands:"), "{args:?}: {help}");
    }
    let output = shoal(dir.path(), &["--help"]);
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && help.contains("Exit codes:\n  0  done\n"), "{help}");
}

#[test]
fn unknown_keys_name_the_key_and_the_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.toml"), "identity = 'x'\nzoen = 'a'\n").unwrap();
    for role in ["coordinator", "worker", "region", "agent"] {
        let output = shoal(dir.path(), &[role, "--config", "a.toml"]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{role}: {error}");
        assert!(error.contains("zoen") && error.contains("a.toml"), "{role}: {error}");
    }
}

#[test]
fn two_identities_of_one_cluster_are_made_by_the_commands() {
    let dir = tempfile::tempdir().unwrap();
    let ok = |args: &[&str]| {
        let output = shoal(dir.path(), args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    ok(&["pki", "init", "pki", "--cluster", "try"]);
    ok(&[
        "pki", "issue", "--pki", "pki", "--role", "operator", "--name", "alice", "--out", "alice",
    ]);
    ok(&[
        "pki", "issue", "--pki", "pki", "--role", "agent", "--region", "eu", "--name", "m1",
        "--out", "m1",
    ]);
    for who in ["alice", "m1"] {
        for file in ["identity.pem", "identity.key", "trust.bin"] {
            assert!(dir.path().join(who).join(file).is_file(), "{who}/{file}");
        }
    }
}

#[test]
fn the_demo_builds_deploys_checks_and_cleans_up() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["demo", "--size", "3MiB", "--agents", "4", "--region-processes", "1", "--json"];
    let output = shoal(dir.path(), &args);
    let progress = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{progress}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ok"], true, "{report}");
    assert_eq!(report["size_bytes"], 3 << 20);
    assert_eq!(report["job"]["status"], "SUCCEEDED");
    for region in ["region-1", "region-2"] {
        assert_eq!(report["replication"][region]["status"], "COMPLETE", "{report}");
        assert_eq!(report["regions"][region]["active"], 2, "{report}");
        assert!(report["regions"][region]["origin_copies"].as_f64().unwrap() >= 1.0, "{report}");
    }
    // A process of the demo would have its directory in its command line.
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.path()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    let place = dir.path().display().to_string();
    let alive = fs::read_dir("/proc").unwrap().flatten().find(|process| {
        fs::read(process.path().join("cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).contains(&place))
    });
    assert!(alive.is_none(), "still runs: {alive:?}");
}

#[test]
fn a_demo_that_cannot_build_says_why_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let repository = dir.path().join("repository");
    let git = |args: &[&str]| {
        let mut command = Command::new("git");
        command.arg("-C").arg(&repository).args([
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@localhost",
        ]);
        assert!(command.args(args).output().unwrap().status.success(), "{args:?}");
    };
    fs::create_dir(&repository).unwrap();
    git(&["init", "-q"]);
    git(&["commit", "-q", "--allow-empty", "-m", "Nothing"]);
    let args = [
        "demo",
        "--repo",
        "repository",
        "--build-command",
        "echo no luck; exit 3",
        "--output",
        "x",
        "--agents",
        "2",
        "--region-processes",
        "1",
        "--json",
    ];
    let output = shoal(dir.path(), &args);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("FAILED") && error.contains("no luck"), "{error}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ok"], false);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the repository is left");
}
