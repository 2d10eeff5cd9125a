use std::path::PathBuf;

use super::*;
use crate::testing;

fn read(text: &str) -> Result<Scenario, String> {
    Scenario::parse("s.toml".into(), text.into())
}

/// The faults and artifacts of a file in a world of 100 machines and two zones.
fn world(text: &str) -> Result<(Vec<Fault>, Vec<Artifact>), String> {
    let scenario = read(text)?;
    let setup = Setup { zones: 2, ..testing::setup(100, 1 << 20) };
    let options = scenario.world().clone();
    Ok((scenario.faults(&setup)?, scenario.artifacts(&options, &setup)?))
}

#[test]
fn every_kind_of_fault_is_read() {
    let text = r#"
        about = "All of them."
        fault = [
            { kind = "stragglers", share = 0.05, rate = 0.1 },
            { kind = "churn", per_minute = 0.01, down = "30s", until = "5m" },
            { kind = "regions_lost", processes = 1, at_progress = 0.2 },
            { kind = "bucket_fails", at = "1s", for = "10s" },
            { kind = "bucket_slow", rate = 0.02, at = "0s", for = "500ms" },
            { kind = "corrupt", share = 0.01 },
            { kind = "zone_cut", zone = 1, at_progress = 0.3, for = "20s" },
            { kind = "late", share = 1, at = "5s" },
        ]
    "#;
    let (faults, artifacts) = world(text).expect("a scenario");
    let expected = [
        Fault::Stragglers { share: 0.05, rate: 0.1 },
        Fault::Churn { per_minute: 0.01, down_s: 30.0, until_s: 300.0 },
        Fault::RegionsLost { processes: 1, at: When::Progress(0.2) },
        Fault::BucketFails { from: When::Seconds(1.0), for_s: 10.0 },
        Fault::BucketSlow { from: When::Seconds(0.0), for_s: 0.5, rate: 0.02 },
        Fault::Corrupt { share: 0.01 },
        Fault::ZoneCut { zone: 1, from: When::Progress(0.3), for_s: 20.0 },
        Fault::Late { share: 1.0, at: When::Seconds(5.0) },
    ];
    assert_eq!(faults, expected);
    assert!(artifacts.is_empty());
}

#[test]
fn artifacts_are_read_and_have_the_worlds_sizes() {
    let text = r#"
        about = "A newer build in mid-rollout, and another app."
        [world]
        size = "3GB"
        piece_size = "16MiB"
        [[artifact]]
        [[artifact]]
        start_progress = 0.5
        replaces = 0
        priority = 7
        [[artifact]]
        size = "1GB"
        piece_size = "4MiB"
        machines = 30
        start = "2s"
    "#;
    let (_, artifacts) = world(text).expect("a scenario");
    let first = Artifact::new(3_000_000_000, Some(16 << 20)).expect("a size");
    let second =
        Artifact { start: When::Progress(0.5), replaces: Some(0), priority: 7, ..first.clone() };
    let third = Artifact {
        machines: Some(30),
        start: When::Seconds(2.0),
        ..Artifact::new(1_000_000_000, Some(4 << 20)).expect("a size")
    };
    assert_eq!(artifacts, [first, second, third]);
}

#[test]
fn artifacts_made_by_the_seed_are_within_their_limits() {
    let text = r#"
        about = "Ten."
        [[artifact]]
        count = 10
        size_min = "1GB"
        size_max = "10GB"
        start_within = "30s"
        machines = 20
    "#;
    let (_, artifacts) = world(text).expect("a scenario");
    assert_eq!(artifacts.len(), 10);
    for artifact in &artifacts {
        assert!((1_000_000_000..=10_000_000_000).contains(&artifact.size_bytes));
        assert!(matches!(artifact.start, When::Seconds(at_s) if (0.0..=30.0).contains(&at_s)));
        assert_eq!(artifact.machines, Some(20));
    }
    assert_ne!(artifacts[0].size_bytes, artifacts[1].size_bytes);
    assert_eq!(artifacts, world(text).expect("a scenario").1, "one seed, one scenario");
}

#[test]
fn what_is_wrong_is_said_in_one_line_with_file_line_and_key() {
    for (text, expected) in [
        ("abuot = 1", "1: unknown field `abuot`"),
        ("[world]\nnods = 5", "2: unknown field `nods`"),
        ("[world]\nsize = \"10XB\"", "2: size: '10XB' is not a size"),
        ("[world]\nsize = \"0GB\"", "2: size: a size of 0 bytes"),
        ("[world]\nnic = \"10GB\"", "2: nic: '10GB' is not a rate"),
        ("[world]\nnodes = -5", "2: nodes: invalid value"),
        ("[world\nnodes = 5", "1: "),
        ("[[fault]]\nkind = \"fire\"", "2: kind: unknown variant `fire`"),
        ("[[fault]]\nshare = 1", "1: missing field `kind`"),
        ("[[fault]]\nkind = \"late\"\nshares = 1", "3: unknown field `shares`"),
        ("[[fault]]\nkind = \"late\"\nshare = 1.5\nat = \"1s\"", "3: share: 1.5 is no part"),
        ("[[fault]]\nkind = \"late\"\nshare = 1\nat = \"1\"", "4: at: '1' is not a time"),
        ("[[fault]]\nkind = \"late\"\nshare = 1", "1: `at` or `at_progress` is missing"),
        (
            "[[fault]]\nkind = \"late\"\nshare = 1\nat = \"1s\"\nat_progress = 0.1",
            "5: give `at` or `at_progress`, not both",
        ),
        (
            "[[fault]]\nkind = \"corrupt\"\nshare = 1\nrate = 1",
            "4: unknown key `rate` of this kind of fault, expected `share`",
        ),
        ("[[fault]]\nkind = \"corrupt\"", "1: `share` is missing"),
        (
            "[[fault]]\nkind = \"zone_cut\"\nzone = 2\nat = \"1s\"\nfor = \"1s\"",
            "3: zone: zones are numbered from 0, and there are 2",
        ),
        (
            "[[fault]]\nkind = \"regions_lost\"\nprocesses = 3\nat = \"1s\"",
            "3: processes: a region has 2 processes to lose",
        ),
        ("[[artifact]]\nsizes = \"1GB\"", "2: unknown field `sizes`"),
        ("[[artifact]]\nmachines = 101", "2: machines: give 1 to the number of nodes, 100"),
        ("[[artifact]]\nreplaces = 0", "2: replaces: this must be the number of an earlier"),
        ("[[artifact]]\npiece_size = \"3MiB\"", "2: piece_size: a piece size of 3145728"),
        ("[[artifact]]\nsize = \"99999TB\"", "2: size: an artifact has 1 to"),
        ("[[artifact]]\nstart_progress = 0.5", "1: no artifact starts by itself"),
        ("[[artifact]]\nsize_min = \"1GB\"", "2: size_min: this goes with `count` only"),
        ("[[artifact]]\ncount = 2", "1: `size_min` is missing beside `count`"),
        ("[[artifact]]\ncount = 0", "2: count: give 1 to 64"),
        ("[[artifact]]\ncount = 2\nsize = \"1GB\"", "3: size: this does not go with `count`"),
        (
            "[[artifact]]\ncount = 2\nsize_min = \"2GB\"\nsize_max = \"1GB\"",
            "4: size_max: this is less than `size_min`",
        ),
        ("[pipeline]\nbuild = \"15m\"\nbuilds = 1", "3: unknown field `builds`"),
    ] {
        let error = world(&format!("about = \"x\"\n{text}")).expect_err(text);
        let (line, rest) = expected.split_once(' ').expect("a line and more");
        let line = line.trim_end_matches(':').parse::<u32>().expect("a number") + 1;
        let expected = format!("s.toml:{line}: {rest}");
        assert!(error.starts_with(&expected), "{text}\n{error}\nis not\n{expected}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn a_file_says_what_it_is_about() {
    let error = read("[world]\nnodes = 5").expect_err("no `about`");
    assert_eq!(error, "s.toml:1: missing field `about`");
}

#[test]
fn every_scenario_file_is_read() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let files = fs::read_dir(folder).expect("scenarios").map(|file| file.expect("a file").path());
    let mut count = 0;
    for path in files {
        let scenario = Scenario::load(&path).expect("a scenario");
        let setup = scenario.world().setup().expect("a world");
        scenario.faults(&setup).expect("faults");
        scenario.artifacts(scenario.world(), &setup).expect("artifacts");
        count += 1;
    }
    assert_eq!(count, 15);
}
