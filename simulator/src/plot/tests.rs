use super::*;
use crate::{
    setup::{Fault, Sample},
    testing::{artifact, run, setup},
};

const GB: u64 = 1_000_000_000;

#[test]
fn steps_rise_at_each_time_and_end_where_they_are() {
    let expected = [(0.0, 0.0), (2.0, 0.0), (2.0, 25.0), (3.0, 25.0), (3.0, 50.0), (5.0, 50.0)];
    assert_eq!(steps(&[2.0, 3.0], 4, 5.0), expected);
    let many: Vec<f64> = (0..100_000).map(f64::from).collect();
    let points = steps(&many, many.len(), 1e5);
    assert!(points.len() <= 2 * POINTS_MAX + 4, "{}", points.len());
    assert_eq!(points.last(), Some(&(1e5, 100.0)));
}

#[test]
fn an_axis_begins_near_what_it_shows() {
    let axis = near(8.0, 9.0);
    assert!(axis.from > 7.9 && axis.from < 8.0 && axis.to > 9.0, "{axis:?}");
    assert_eq!(near(8.0, 80.0).from, 0.0);
}

#[test]
fn a_file_is_opened_before_and_written_after() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("run.png");
    std::fs::write(&path, vec![0; 1 << 20]).expect("a file");
    let mut setup = setup(3, GB);
    setup.faults = vec![Fault::Corrupt { share: 0.3 }];
    let machines = [(0, Some(9.0), true), (1, Some(9.5), true), (2, None, false)];
    let mut run = run(&[(0.0, &machines)]);
    run.samples.push(Sample {
        at_s: 9.5,
        held_bytes: 3 * GB,
        origin_bytes: GB,
        ..Sample::default()
    });
    let plot = Plot::open(&path).expect("a file that can be written");
    plot.draw(&setup, &run, Some(&"A long title. ".repeat(20))).expect("a picture");
    let bytes = std::fs::read(&path).expect("a file");
    assert!(bytes.starts_with(b"\x89PNG") && bytes.ends_with(b"IEND\xae\x42\x60\x82"));

    // Several artifacts, and a run that did not get anywhere, are drawn too.
    setup.artifacts.push(artifact(2 * GB));
    for run in
        [self::run(&[(0.0, &machines), (4.0, &machines)]), self::run(&[(0.0, &[]), (0.0, &[])])]
    {
        picture(&setup, &run, None);
    }
}

#[test]
fn a_file_that_cannot_be_written_is_said_so() {
    let error = Plot::open(Path::new("/no/such/folder/run.png")).err();
    assert!(error.is_some_and(|error| error.starts_with("cannot write /no/such/folder/run.png: ")));
}
