//! Scenario files: a world, what goes wrong in it, what is fetched, and the pipeline around it.
//!
//! A file is read in two steps: the keys of each table and the form of each value here and by serde, and what
//! depends on the rest of the world (a zone's number, say) when the world is known. Both say the line.

mod artifact;
mod fault;

use std::{fs, ops::Range, path::Path};

use serde::Deserialize;
use toml::Spanned;

use crate::{
    options::Options,
    pipeline::Pipeline,
    setup::{Artifact, Fault, Setup, When},
    units::{Part, Seconds},
};
use artifact::ArtifactTable;
use fault::FaultTable;

/// A scenario file as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tables {
    /// What the scenario shows, in a sentence.
    about: String,
    #[serde(default)]
    world: Options,
    #[serde(default)]
    artifact: Vec<Spanned<ArtifactTable>>,
    #[serde(default)]
    fault: Vec<Spanned<FaultTable>>,
    pipeline: Option<Pipeline>,
}

/// A scenario file that was read.
#[derive(Debug)]
pub(crate) struct Scenario {
    tables: Tables,
    /// The file's name and text, for messages.
    name: String,
    text: String,
}

/// What is wrong in a file, and where.
#[derive(Debug)]
struct Wrong {
    span: Range<usize>,
    what: String,
}

impl Wrong {
    fn new(span: Range<usize>, what: impl Into<String>) -> Self {
        Self { span, what: what.into() }
    }
}

impl Scenario {
    /// Reads a file.
    pub(crate) fn load(path: &Path) -> Result<Self, String> {
        let name = path.display().to_string();
        let text =
            fs::read_to_string(path).map_err(|error| format!("cannot read {name}: {error}"))?;
        Self::parse(name, text)
    }

    fn parse(name: String, text: String) -> Result<Self, String> {
        match toml::from_str(&text) {
            Ok(tables) => Ok(Self { tables, name, text }),
            Err(error) => {
                let wrong = Wrong::new(error.span().unwrap_or(0..0), error.message());
                Err(located(&name, &text, &wrong))
            }
        }
    }

    pub(crate) fn about(&self) -> &str {
        &self.tables.about
    }

    /// What the file says about the world.
    pub(crate) fn world(&self) -> &Options {
        &self.tables.world
    }

    pub(crate) fn pipeline(&self) -> Option<&Pipeline> {
        self.tables.pipeline.as_ref()
    }

    /// What goes wrong in this world.
    pub(crate) fn faults(&self, setup: &Setup) -> Result<Vec<Fault>, String> {
        let faults = self.tables.fault.iter();
        let faults = faults.map(|table| table.get_ref().fault(table.span(), setup));
        faults.collect::<Result<_, _>>().map_err(|wrong| self.located(&wrong))
    }

    /// What is fetched in this world: none when the file says nothing about it.
    pub(crate) fn artifacts(
        &self,
        options: &Options,
        setup: &Setup,
    ) -> Result<Vec<Artifact>, String> {
        artifact::artifacts(&self.tables.artifact, options, setup)
            .map_err(|wrong| self.located(&wrong))
    }

    fn located(&self, wrong: &Wrong) -> String {
        located(&self.name, &self.text, wrong)
    }
}

/// `FILE:LINE: KEY: what is wrong`, in one line.
fn located(name: &str, text: &str, wrong: &Wrong) -> String {
    let start = wrong.span.start.min(text.len());
    let line = text.get(..start).map_or(1, |before| before.matches('\n').count() + 1);
    let what = wrong.what.lines().collect::<Vec<_>>().join(" ");
    let key = text.lines().nth(line - 1).and_then(|line| line.split_once('='));
    match key.map(|(key, _)| key.trim()) {
        Some(key) if !key.is_empty() && !what.contains(&format!("`{key}`")) => {
            format!("{name}:{line}: {key}: {what}")
        }
        _ => format!("{name}:{line}: {what}"),
    }
}

/// The moment that two keys of a table give, one of which must be there.
fn when(
    table: Range<usize>,
    names: [&str; 2],
    at: Option<&Spanned<Seconds>>,
    progress: Option<&Spanned<Part>>,
) -> Result<When, Wrong> {
    match (at, progress) {
        (Some(at), None) => Ok(When::Seconds(at.get_ref().0)),
        (None, Some(part)) => Ok(When::Progress(part.get_ref().0)),
        (Some(_), Some(part)) => {
            Err(Wrong::new(part.span(), format!("give `{}` or `{}`, not both", names[0], names[1])))
        }
        (None, None) => {
            Err(Wrong::new(table, format!("`{}` or `{}` is missing", names[0], names[1])))
        }
    }
}

#[cfg(test)]
mod tests;
