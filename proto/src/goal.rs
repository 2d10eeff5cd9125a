//! Goals: "app web runs artifact A", numbered, signed, and complete enough to act on without asking.

use alloc::{
    collections::BTreeMap,
    format,
    string::{String, ToString},
    vec::Vec,
};
use core::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    codec::{self, CodecError},
    ids::{AppName, ArtifactId, EncodingId, MachineName, NAME_MAX_BYTES, RegionName, Revision},
    manifest::PieceSize,
};

/// The longest encoded [`SignedGoal`], in bytes: a goal with its envelope is one gossip message.
pub const GOAL_MAX_BYTES: usize = 960;

/// What is signed is this tag and then the goal's bytes: a signature over a goal is one over nothing else.
pub const GOAL_DOMAIN: &[u8] = b"shoal goal v1\0";

/// A machine's labels: `region`, `zone` and `machine` always, and its own.
pub type Labels = BTreeMap<String, String>;

/// Which machines an app is for: all of its terms must hold. No terms: every machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Selector(pub Vec<Term>);

/// One condition on a label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Term {
    /// The label.
    pub key: String,
    /// Whether its value must be, or must not be, among `values`. A machine without the label has
    /// none of them.
    pub within: bool,
    /// The values.
    pub values: Vec<String>,
}

impl Selector {
    /// Whether a machine with `labels` is selected.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|term| {
            let held = labels.get(&term.key).is_some_and(|value| term.values.contains(value));
            held == term.within
        })
    }
}

/// Written as `role=web,zone!=b,tier=1|2`; empty for all machines.
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, term) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            let op = if term.within { "=" } else { "!=" };
            write!(f, "{comma}{}{op}{}", term.key, term.values.join("|"))?;
        }
        Ok(())
    }
}

/// Checks a label's key or value: what a selector can name.
///
/// # Errors
/// A line that says what is allowed.
pub fn check_label(text: &str) -> Result<(), String> {
    let ok = |b: u8| b.is_ascii_alphanumeric() || b"-._/".contains(&b);
    if !text.is_empty() && text.len() <= NAME_MAX_BYTES && text.bytes().all(ok) {
        Ok(())
    } else {
        Err(format!("'{text}' is not a label: use 1-{NAME_MAX_BYTES} of A-Z a-z 0-9 - . _ /"))
    }
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut terms = Vec::new();
        for part in text.split(',').filter(|part| !part.trim().is_empty()) {
            let (key, within, values) = match (part.split_once("!="), part.split_once('=')) {
                (Some((key, values)), _) => (key, false, values),
                (None, Some((key, values))) => (key, true, values),
                _ => {
                    return Err(format!(
                        "'{part}' is not a selector term: write key=value or key!=value"
                    ));
                }
            };
            let values: Vec<_> = values.split('|').map(|value| value.trim().to_string()).collect();
            let key = key.trim().to_string();
            check_label(&key)?;
            values.iter().try_for_each(|value| check_label(value))?;
            terms.push(Term { key, within, values });
        }
        Ok(Self(terms))
    }
}

/// What a machine does with an artifact once it is verified and switched to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// Nothing more: the file is there.
    None,
    /// Start the artifact as a program with these arguments, after the one before has been stopped.
    Run {
        /// The arguments.
        args: Vec<String>,
    },
    /// Run this command with `sh -c`; it succeeds when it exits 0.
    Command {
        /// The command.
        command: String,
    },
}

/// How a machine finds out whether the activated build is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HealthCheck {
    /// Run with `sh -c` until it exits 0.
    pub command: String,
    /// How long it may take until then, in seconds.
    pub timeout_s: u32,
}

/// Who may activate, and when it stops.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct RolloutPlan {
    /// For each wave, how many of a region's machines may have activated by then, in thousandths,
    /// rising. An empty list is one wave of all.
    pub waves_permille: Vec<u16>,
    /// The rollout halts when more than this part of the machines failed, in thousandths.
    pub max_failed_permille: u16,
    /// How long a wave's successes are watched before the next one opens, in seconds.
    pub bake_s: u32,
    /// A machine that has not reported an end by then is UNREACHABLE, in seconds from the start.
    pub deadline_s: u32,
    /// Whether it goes back to an earlier build: all waves are open at once.
    pub rollback: bool,
}

impl Default for RolloutPlan {
    fn default() -> Self {
        Self {
            waves_permille: Vec::new(),
            max_failed_permille: 100,
            bake_s: 0,
            deadline_s: 1_800,
            rollback: false,
        }
    }
}

/// What the machines of an app shall run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goal {
    /// The cluster that it is for.
    pub cluster: String,
    /// The app.
    pub app: AppName,
    /// Higher replaces lower.
    pub revision: Revision,
    /// The machines that it is for.
    pub selector: Selector,
    /// The regions that it is for; none named: all.
    pub regions: Vec<RegionName>,
    /// The artifact.
    pub artifact: ArtifactId,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// The length of its pieces.
    pub piece_size: PieceSize,
    /// The encoding that the buckets hold.
    pub encoding: EncodingId,
    /// Permission bits of the file, such as `0o755`.
    pub file_mode: u32,
    /// What to do with it.
    pub activation: Activation,
    /// How to find out whether it is well.
    pub health: Option<HealthCheck>,
    /// Who may activate, and when.
    pub plan: RolloutPlan,
    /// Higher fetches first where apps compete.
    pub priority: u8,
    /// About how many machines of a region will fetch: sets how many of them may ask the origin.
    pub machines_estimate: u32,
    /// When it was set, in milliseconds since the Unix epoch: for people only, no decision hangs on it.
    pub issued_at_ms: u64,
}

impl Goal {
    /// Whether a machine in `region` with `labels` shall follow it.
    #[must_use]
    pub fn is_for(&self, region: &RegionName, labels: &Labels) -> bool {
        (self.regions.is_empty() || self.regions.contains(region)) && self.selector.matches(labels)
    }
}

/// A goal as it travels: the very bytes that were signed, so that no re-encoding can break a signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedGoal {
    /// The encoded [`Goal`].
    pub goal: Vec<u8>,
    /// Which goal key of the trust bundle signed it.
    pub key_id: u32,
    /// Ed25519 over [`GOAL_DOMAIN`] and `goal`: 64 bytes.
    pub signature: Vec<u8>,
}

impl SignedGoal {
    /// The bytes that the signature covers.
    #[must_use]
    pub fn signing_input(goal: &[u8]) -> Vec<u8> {
        [GOAL_DOMAIN, goal].concat()
    }

    /// Reads the goal. This does not check the signature: `shoal_pki::Trust::open_goal` does both.
    ///
    /// # Errors
    /// [`CodecError`] when the bytes are not a goal.
    pub fn decode_unverified(&self) -> Result<Goal, CodecError> {
        codec::decode(&self.goal, GOAL_MAX_BYTES)
    }
}

/// Builds the labels that every machine has, and adds its own.
#[must_use]
pub fn labels(region: &RegionName, zone: &str, machine: &MachineName, own: &Labels) -> Labels {
    let mut labels = own.clone();
    labels.insert("region".into(), region.as_str().into());
    labels.insert("zone".into(), zone.into());
    labels.insert("machine".into(), machine.as_str().into());
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels_of(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
    }

    #[test]
    fn selectors_read_print_and_match() {
        let selector: Selector = "role=web|api, zone!=b".parse().unwrap();
        assert_eq!(selector.to_string(), "role=web|api,zone!=b");
        assert!(selector.matches(&labels_of(&[("role", "api"), ("zone", "a")])));
        assert!(selector.matches(&labels_of(&[("role", "web")])));
        assert!(!selector.matches(&labels_of(&[("role", "web"), ("zone", "b")])));
        assert!(!selector.matches(&labels_of(&[("zone", "a")])));
        assert!("".parse::<Selector>().unwrap().matches(&Labels::new()));
        assert!("role".parse::<Selector>().is_err());
        assert!("role=".parse::<Selector>().is_err());
        assert!("=web".parse::<Selector>().is_err());
    }

    #[test]
    fn own_labels_cannot_pretend_another_region() {
        let region = RegionName::new("eu").unwrap();
        let machine = MachineName::new("m1").unwrap();
        let own = labels_of(&[("region", "us"), ("role", "web")]);
        let all = labels(&region, "a", &machine, &own);
        assert_eq!(all["region"], "eu");
        assert_eq!(all["role"], "web");
    }
}
