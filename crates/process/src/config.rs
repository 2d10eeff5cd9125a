//! One configuration from a TOML file below and flags above.

use std::path::Path;

use anyhow::Context as _;
use serde::{Serialize, de::DeserializeOwned};

/// The longest error, in characters: it may quote a line of the file.
const LINE_MAX_CHARS: usize = 1_000;

/// The file or a flag is wrong, in one line; nothing was done.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongConfig(String);

impl From<anyhow::Error> for WrongConfig {
    fn from(error: anyhow::Error) -> Self {
        let text = format!("{error:#}");
        Self(text.chars().take(LINE_MAX_CHARS).collect())
    }
}

/// Reads `file`, lays `flags` over it key by key, and reads the result as a `T`.
///
/// # Errors
/// One line that names the file and the key: a file that cannot be read, an unknown key, a wrong value.
pub fn load_config<T: DeserializeOwned>(
    file: Option<&Path>,
    flags: &impl Serialize,
) -> Result<T, WrongConfig> {
    Ok(read(file, flags)?)
}

fn read<T: DeserializeOwned>(file: Option<&Path>, flags: &impl Serialize) -> anyhow::Result<T> {
    let mut table = match file {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the configuration {}", path.display()))?;
            // Read on its own first, so that a mistake in the file is told with its line.
            toml::from_str::<toml::Table>(&text)
                .with_context(|| format!("{} is not TOML", path.display()))?
        }
        None => toml::Table::new(),
    };
    let given = toml::Table::try_from(flags).context("flags that TOML cannot hold")?;
    table.extend(given);
    let origin = file.map_or_else(|| "the flags".into(), |path| path.display().to_string());
    T::deserialize(table).map_err(|error| {
        let text = error.message().trim().replace('\n', " ");
        // Who starts a process with nothing has most likely forgotten its file.
        let hint = if file.is_none() && text.starts_with("missing field") {
            "; give --config FILE with all keys, or each as a flag (--help lists them)"
        } else {
            ""
        };
        anyhow::anyhow!("wrong configuration in {origin}: {text}{hint}")
    })
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Config {
        listen: String,
        #[serde(default)]
        zone: String,
    }

    #[derive(Serialize)]
    struct Flags {
        #[serde(skip_serializing_if = "Option::is_none")]
        zone: Option<String>,
    }

    fn load(text: &str, zone: Option<&str>) -> Result<Config, WrongConfig> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        load_config(Some(&path), &Flags { zone: zone.map(Into::into) })
    }

    #[test]
    fn flags_win_and_mistakes_are_named() {
        let config = load("listen = 'a'\nzone = 'z'", Some("b")).unwrap();
        assert_eq!(config, Config { listen: "a".into(), zone: "b".into() });
        assert_eq!(load("listen = 'a'\nzone = 'z'", None).unwrap().zone, "z");
        let unknown = load("listen = 'a'\nzoen = 'z'", None).unwrap_err().to_string();
        assert!(unknown.contains("zoen") && unknown.contains("config.toml"), "{unknown}");
        let missing = load("", None).unwrap_err().to_string();
        assert!(missing.contains("listen"), "{missing}");
        assert!(load("listen = ", None).is_err());
        assert!(load_config::<Config>(Some(Path::new("/nowhere")), &Flags { zone: None }).is_err());
    }
}
