//! The files that AWS's SDKs and command line share: `~/.aws/credentials` and `~/.aws/config`.
//!
//! Of a profile its keys, region and endpoint are read. What has to be run or asked for first (`sso_*`, `source_profile`,
//! `credential_process`) is not: a role comes from a web identity, a container or the instance.

use std::{io, path::PathBuf};

use crate::{
    cloud::{Environment, home},
    error::OriginError,
};

/// The longest of these files, in bytes.
const FILE_MAX_BYTES: u64 = 1 << 20;

/// What a profile says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Profile {
    /// Access key and secret.
    pub(crate) key: Option<(String, String)>,
    /// The token that belongs to it, when it is temporary.
    pub(crate) token: Option<String>,
    pub(crate) region: Option<String>,
    pub(crate) endpoint_url: Option<String>,
}

impl Profile {
    /// The profile that `AWS_PROFILE` names, else the one named `default`, which need not be there.
    ///
    /// # Errors
    /// [`OriginError::Settings`] when a file cannot be read, or the profile that was named is in neither.
    pub(crate) fn load(environment: &Environment) -> Result<Self, OriginError> {
        let get = |name: &str| environment.get(name).filter(|value| !value.is_empty());
        let named = get("AWS_PROFILE");
        let name = named.map_or("default", String::as_str);
        let place = |variable: &str, usual: &str| {
            get(variable).map(PathBuf::from).or_else(|| Some(home(environment)?.join(usual)))
        };
        let credentials = read(place("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials"))?;
        let config = read(place("AWS_CONFIG_FILE", ".aws/config"))?;
        let mut profile = Self::default();
        let mut found = false;
        for (file, is_config) in [(&config, true), (&credentials, false)] {
            let Some(pairs) = section(file, name, is_config) else { continue };
            found = true;
            let get = |key: &str| {
                let pair = pairs.iter().rfind(|(name, _)| *name == key);
                pair.map(|(_, value)| (*value).to_string())
            };
            if let (Some(key), Some(secret)) =
                (get("aws_access_key_id"), get("aws_secret_access_key"))
            {
                profile.key = Some((key, secret));
                profile.token = get("aws_session_token");
            }
            profile.region = get("region").or(profile.region);
            profile.endpoint_url = get("endpoint_url").or(profile.endpoint_url);
        }
        if !found && let Some(named) = named {
            let reason =
                format!("neither the credentials nor the config file has a profile '{named}'");
            return Err(OriginError::Settings { name: "AWS_PROFILE".into(), reason });
        }
        Ok(profile)
    }
}

/// A file's text; nothing when it is not there.
fn read(path: Option<PathBuf>) -> Result<String, OriginError> {
    let Some(path) = path else { return Ok(String::new()) };
    let wrong = |reason: String| OriginError::Settings { name: path.display().to_string(), reason };
    match std::fs::metadata(&path) {
        Ok(meta) if meta.len() > FILE_MAX_BYTES => {
            return Err(wrong(format!("longer than {FILE_MAX_BYTES} bytes")));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        // Somebody else's home: a process that runs as a user without one finds no profile there.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(String::new()),
        Err(error) => return Err(wrong(error.to_string())),
    }
    std::fs::read_to_string(&path).map_err(|error| wrong(error.to_string()))
}

/// The keys and values of a profile; none when it is not in the file.
fn section<'a>(text: &'a str, name: &str, is_config: bool) -> Option<Vec<(&'a str, &'a str)>> {
    let mut pairs: Option<Vec<_>> = None;
    let mut inside = false;
    for line in text.lines() {
        // What is indented belongs to a setting above it, such as `s3 =`.
        let nested = line.starts_with([' ', '\t']);
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(title) = line.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            let title = title.0.trim();
            let of = match title.strip_prefix("profile ") {
                Some(rest) if is_config => rest.trim(),
                _ if is_config && title != "default" => "",
                _ => title,
            };
            inside = of == name;
            if inside {
                pairs.get_or_insert_default();
            }
        } else if inside
            && !nested
            && let (Some(pairs), Some((key, value))) = (&mut pairs, line.split_once('='))
        {
            pairs.push((key.trim(), value.trim()));
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_read_as_the_sdk_does() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(".aws")).unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write(
            ".aws/credentials",
            "# keys\n[default]\naws_access_key_id = A\naws_secret_access_key=B==\n\n[ops]\n\
             aws_access_key_id = C\naws_secret_access_key = D\naws_session_token = E\n",
        );
        write(
            ".aws/config",
            "[default]\nregion = eu-west-1\ns3 =\n    region = wrong\n[ops]\nregion = wrong\n\
             [profile ops]\nregion=eu-north-1\nendpoint_url = http://x\n[profile bare]\nregion = r\n",
        );
        let environment = |extra: &[(&str, &str)]| -> Environment {
            let home = ("HOME".to_string(), dir.path().display().to_string());
            let extra = extra.iter().map(|(name, value)| (name.to_string(), value.to_string()));
            [home].into_iter().chain(extra).collect()
        };
        let text = |text: &str| Some(text.to_string());
        let found = Profile::load(&environment(&[])).unwrap();
        assert_eq!(
            (found.key, found.region),
            (Some(("A".into(), "B==".into())), text("eu-west-1"))
        );
        let found = Profile::load(&environment(&[("AWS_PROFILE", "ops")])).unwrap();
        assert_eq!(found.key, Some(("C".into(), "D".into())));
        assert_eq!(
            (found.token, found.region, found.endpoint_url),
            (text("E"), text("eu-north-1"), text("http://x"))
        );
        let found = Profile::load(&environment(&[("AWS_PROFILE", "bare")])).unwrap();
        assert_eq!((found.key, found.region), (None, text("r")));
        let error = Profile::load(&environment(&[("AWS_PROFILE", "nobody")])).unwrap_err();
        assert!(error.to_string().contains("'nobody'"), "{error}");
        let none = dir.path().join("none").display().to_string();
        let elsewhere = [("AWS_SHARED_CREDENTIALS_FILE", &*none), ("AWS_CONFIG_FILE", &*none)];
        assert_eq!(Profile::load(&environment(&elsewhere)).unwrap(), Profile::default());
    }
}
