//! The command that shows again what went wrong.

use crate::setup::Violation;

/// Flags that the replay gives itself, and whether a value follows.
const REPLACED: [(&str, bool); 6] = [
    ("--seed", true),
    ("--regions", true),
    ("--stop-at", true),
    ("--watch", true),
    ("--plot", true),
    ("--json", false),
];

/// `seed S, T s, machine M: what`.
pub(crate) fn violated(seed: u64, violation: &Violation) -> String {
    let at = format!("seed {seed}, {} s", violation.at_s);
    match violation.machine {
        Some(machine) => format!("{at}, machine {machine}: {}", violation.what),
        None => format!("{at}: {}", violation.what),
    }
}

/// The command line that was given, without the program, as one that runs this region alone up to the violation.
pub(crate) fn command(given: &[String], seed: u64, violation: &Violation) -> String {
    let mut words = vec!["shoal-sim".to_string()];
    let mut given = given.iter();
    while let Some(word) = given.next() {
        let flag = word.split_once('=').map_or(word.as_str(), |(flag, _)| flag);
        match REPLACED.iter().find(|(name, _)| *name == flag) {
            Some((_, true)) if !word.contains('=') => drop(given.next()),
            Some(_) => {}
            None => words.push(quoted(word)),
        }
    }
    // A region that is one of several has a seed of its own, and the scenario file may say how many there are.
    words.push(format!("--regions 1 --seed {seed} --stop-at {}", violation.at_s));
    words.extend(violation.machine.map(|machine| format!("--watch {machine}")));
    words.join(" ")
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_string()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_is_replayed_with_the_same_flags_up_to_there() {
        let violation = Violation { at_s: 12.345, machine: Some(17), what: "held twice".into() };
        assert_eq!(violated(5, &violation), "seed 5, 12.345 s, machine 17: held twice");
        let given = [
            "--nodes=50",
            "--seed",
            "4",
            "--scenario",
            "my file.toml",
            "--json",
            "--plot=a.png",
            "--regions",
            "3",
            "--nic",
            "1Gbps",
        ];
        let command = command(&given.map(String::from), 5, &violation);
        let expected = "shoal-sim --nodes=50 --scenario 'my file.toml' --nic 1Gbps \
                        --regions 1 --seed 5 --stop-at 12.345 --watch 17";
        assert_eq!(command, expected);
    }

    #[test]
    fn a_violation_of_no_machine_watches_none() {
        let violation = Violation { at_s: 1.0, machine: None, what: "stuck".into() };
        assert_eq!(violated(1, &violation), "seed 1, 1 s: stuck");
        let expected = "shoal-sim --regions 1 --seed 1 --stop-at 1";
        assert_eq!(command(&[], 1, &violation), expected);
    }
}
