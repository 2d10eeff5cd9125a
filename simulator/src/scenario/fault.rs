//! `[[fault]]`: one thing that goes wrong.

use std::ops::Range;

use serde::Deserialize;
use toml::Spanned;

use super::{Wrong, when};
use crate::{
    setup::{Fault, REGION_PROCESSES, Setup, When},
    units::{Part, Seconds},
};

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Stragglers,
    Churn,
    RegionsLost,
    BucketFails,
    BucketSlow,
    Corrupt,
    ZoneCut,
    Late,
}

/// A fault as it is written: its kind and that kind's keys. One struct for all kinds, not an enum, because
/// serde forgets the lines inside of a tagged enum.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FaultTable {
    kind: Kind,
    /// Part of the machines.
    share: Option<Spanned<Part>>,
    /// Part of the bandwidth that is left.
    rate: Option<Spanned<Part>>,
    /// Part of the machines that die in a minute.
    per_minute: Option<Spanned<Part>>,
    /// How long a machine that died is away.
    down: Option<Spanned<Seconds>>,
    /// When the last machine dies at most.
    until: Option<Spanned<Seconds>>,
    /// How many region processes.
    processes: Option<Spanned<u32>>,
    /// A zone's number, from 0.
    zone: Option<Spanned<u32>>,
    /// When it begins.
    at: Option<Spanned<Seconds>>,
    /// At which part of all pieces held it begins.
    at_progress: Option<Spanned<Part>>,
    /// How long it lasts.
    #[serde(rename = "for")]
    lasts: Option<Spanned<Seconds>>,
}

impl FaultTable {
    /// The keys of this kind.
    fn keys(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::Stragglers => &["share", "rate"],
            Kind::Churn => &["per_minute", "down", "until"],
            Kind::RegionsLost => &["processes", "at", "at_progress"],
            Kind::BucketFails => &["at", "at_progress", "for"],
            Kind::BucketSlow => &["rate", "at", "at_progress", "for"],
            Kind::Corrupt => &["share"],
            Kind::ZoneCut => &["zone", "at", "at_progress", "for"],
            Kind::Late => &["share", "at", "at_progress"],
        }
    }

    /// The fault, in this world. `table` is the place of the whole table.
    pub(super) fn fault(&self, table: Range<usize>, setup: &Setup) -> Result<Fault, Wrong> {
        for (name, span) in self.given() {
            if !self.keys().contains(&name) {
                let keys = self.keys().join("`, `");
                let what = format!("unknown key `{name}` of this kind of fault, expected `{keys}`");
                return Err(Wrong::new(span, what));
            }
        }
        let missing = |name: &str| Wrong::new(table.clone(), format!("`{name}` is missing"));
        let part = |name: &str, given: &Option<Spanned<Part>>| {
            given.as_ref().map(|part| part.get_ref().0).ok_or_else(|| missing(name))
        };
        let seconds = |name: &str, given: &Option<Spanned<Seconds>>| {
            given.as_ref().map(|seconds| seconds.get_ref().0).ok_or_else(|| missing(name))
        };
        Ok(match self.kind {
            Kind::Stragglers => Fault::Stragglers {
                share: part("share", &self.share)?,
                rate: part("rate", &self.rate)?,
            },
            Kind::Churn => Fault::Churn {
                per_minute: part("per_minute", &self.per_minute)?,
                down_s: seconds("down", &self.down)?,
                until_s: seconds("until", &self.until)?,
            },
            Kind::RegionsLost => {
                let processes = self.processes.as_ref().ok_or_else(|| missing("processes"))?;
                if !(1..=REGION_PROCESSES).contains(processes.get_ref()) {
                    let what = format!("a region has {REGION_PROCESSES} processes to lose");
                    return Err(Wrong::new(processes.span(), what));
                }
                Fault::RegionsLost { processes: *processes.get_ref(), at: self.begins(table)? }
            }
            Kind::BucketFails => Fault::BucketFails {
                for_s: seconds("for", &self.lasts)?,
                from: self.begins(table)?,
            },
            Kind::BucketSlow => Fault::BucketSlow {
                rate: part("rate", &self.rate)?,
                for_s: seconds("for", &self.lasts)?,
                from: self.begins(table)?,
            },
            Kind::Corrupt => Fault::Corrupt { share: part("share", &self.share)? },
            Kind::ZoneCut => {
                let zone = self.zone.as_ref().ok_or_else(|| missing("zone"))?;
                if *zone.get_ref() >= setup.zones {
                    let what = format!("zones are numbered from 0, and there are {}", setup.zones);
                    return Err(Wrong::new(zone.span(), what));
                }
                Fault::ZoneCut {
                    zone: *zone.get_ref(),
                    for_s: seconds("for", &self.lasts)?,
                    from: self.begins(table)?,
                }
            }
            Kind::Late => {
                Fault::Late { share: part("share", &self.share)?, at: self.begins(table)? }
            }
        })
    }

    fn begins(&self, table: Range<usize>) -> Result<When, Wrong> {
        when(table, ["at", "at_progress"], self.at.as_ref(), self.at_progress.as_ref())
    }

    /// The keys that are given, and where.
    fn given(&self) -> impl Iterator<Item = (&'static str, Range<usize>)> {
        fn place<T>(given: &Option<Spanned<T>>) -> Option<Range<usize>> {
            given.as_ref().map(Spanned::span)
        }
        let keys = [
            ("share", place(&self.share)),
            ("rate", place(&self.rate)),
            ("per_minute", place(&self.per_minute)),
            ("down", place(&self.down)),
            ("until", place(&self.until)),
            ("processes", place(&self.processes)),
            ("zone", place(&self.zone)),
            ("at", place(&self.at)),
            ("at_progress", place(&self.at_progress)),
            ("for", place(&self.lasts)),
        ];
        keys.into_iter().filter_map(|(name, span)| Some((name, span?)))
    }
}
