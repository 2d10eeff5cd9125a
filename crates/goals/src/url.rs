//! The address of an etcd: `etcd://USER:PASSWORD@HOST:PORT,HOST:PORT/PREFIX?KEY=VALUE`, `etcds://` with TLS.

use std::path::PathBuf;

use url::form_urlencoded;

use crate::{GoalsError, Result};

/// The most endpoints of one etcd: clusters have three to seven members.
const ENDPOINTS_MAX: usize = 16;

/// etcd's own port for clients.
const PORT: u16 = 2379;

/// Where keys lie when the address names no prefix.
const PREFIX: &str = "/shoal";

/// How to write one.
const HOW: &str = "write etcd://HOST:2379,HOST:2379/PREFIX, or etcds://...?ca=FILE with TLS";

/// An address, read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Address {
    /// `http://HOST:PORT` or `https://HOST:PORT` of each endpoint.
    pub(crate) endpoints: Vec<String>,
    /// Begins with a slash, ends without one.
    pub(crate) prefix: String,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<String>,
    pub(crate) password_file: Option<PathBuf>,
    /// Whether it is TLS, and the certificates in PEM: of the CA, and of this client with its key.
    pub(crate) tls: bool,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
}

fn wrong(what: impl Into<String>) -> GoalsError {
    GoalsError::Address(what.into())
}

/// Undoes %XX, and nothing else: a plus sign is one.
fn decoded(text: &str) -> Result<String> {
    let text = text.replace('+', "%2B");
    let mut pairs = form_urlencoded::parse(text.as_bytes());
    match (text.contains(['&', '=']), pairs.next()) {
        (false, Some((name, _))) => Ok(name.into_owned()),
        (false, None) => Ok(String::new()),
        (true, _) => Err(wrong("write %26 and %3D for & and = in etcd's user and password")),
    }
}

impl Address {
    /// Reads an address. No error repeats a password.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let (scheme, rest) = text
            .split_once("://")
            .ok_or_else(|| wrong(format!("a goal store is an etcd's address: {HOW}")))?;
        let tls = match scheme {
            "etcd" => false,
            "etcds" => true,
            _ => return Err(wrong(format!("'{scheme}://' is no goal store: {HOW}"))),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, hosts) = match authority.rsplit_once('@') {
            Some((login, hosts)) => (Some(login), hosts),
            None => (None, authority),
        };
        let mut address = Self { tls, ..Self::default() };
        if let Some(login) = login {
            let (user, password) = match login.split_once(':') {
                Some((user, password)) => (user, Some(decoded(password)?)),
                None => (login, None),
            };
            address.user = Some(decoded(user)?);
            address.password = password;
        }
        for host in hosts.split(',') {
            address.endpoints.push(endpoint(host, tls)?);
        }
        if address.endpoints.len() > ENDPOINTS_MAX {
            return Err(wrong(format!("more than {ENDPOINTS_MAX} endpoints of one etcd")));
        }
        address.prefix = prefix(path)?;
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let file = Some(PathBuf::from(value.as_ref()));
            match key.as_ref() {
                "ca" => address.ca = file,
                "cert" => address.cert = file,
                "key" => address.key = file,
                "password_file" => address.password_file = file,
                _ => {
                    return Err(wrong(format!(
                        "etcd's address has no '{key}': there are ca, cert, key and password_file"
                    )));
                }
            }
        }
        address.check()?;
        Ok(address)
    }

    fn check(&self) -> Result<()> {
        let has_files = self.ca.is_some() || self.cert.is_some() || self.key.is_some();
        let checks = [
            (!self.tls && has_files, "ca, cert and key are for etcds://, not for etcd://"),
            (
                self.tls && self.ca.is_none(),
                "etcds:// needs ?ca=FILE: the CA, in PEM, that signed etcd's certificate",
            ),
            (
                self.cert.is_some() != self.key.is_some(),
                "etcd's client certificate needs both cert=FILE and key=FILE",
            ),
            (
                self.password.is_some() && self.password_file.is_some(),
                "etcd's address has a password and a password_file: give one of them",
            ),
            (
                self.user.is_some() && self.password.is_none() && self.password_file.is_none(),
                "etcd's user needs a password: USER:PASSWORD@, or ?password_file=FILE",
            ),
            (
                self.user.is_none() && self.password_file.is_some(),
                "etcd's password_file needs a user: USER@HOST",
            ),
        ];
        match checks.into_iter().find(|(is_wrong, _)| *is_wrong) {
            Some((_, what)) => Err(wrong(what)),
            None => Ok(()),
        }
    }
}

fn endpoint(host: &str, tls: bool) -> Result<String> {
    let scheme = if tls { "https" } else { "http" };
    let url = url::Url::parse(&format!("{scheme}://{host}"));
    let parts = url.as_ref().ok().and_then(|url| Some((url.host_str()?, url.port(), url.path())));
    match parts {
        // A default port is none to the parser, so it is asked of the text.
        Some((name, port, "/")) if !host.contains(['/', '?', '#', '@']) => {
            let written = host.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            let port = port.or(written).unwrap_or(PORT);
            Ok(format!("{scheme}://{name}:{port}"))
        }
        _ => Err(wrong(format!("'{host}' is not HOST:PORT of an etcd: {HOW}"))),
    }
}

fn prefix(path: &str) -> Result<String> {
    let path = path.trim_matches('/');
    if path.is_empty() {
        return Ok(PREFIX.into());
    }
    let is_good = |b: u8| b.is_ascii_alphanumeric() || b"-._/".contains(&b);
    if path.len() > 200 || !path.bytes().all(is_good) {
        return Err(wrong("a prefix in etcd is at most 200 of A-Z a-z 0-9 - . _ /"));
    }
    Ok(format!("/{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let address = Address::parse("etcd://localhost").unwrap();
        assert_eq!(address.endpoints, ["http://localhost:2379"]);
        assert_eq!(address.prefix, "/shoal");
        let text = "etcds://me%40x:a%3Ab+c@h1,h2:80,[::1]:2/a/b/?ca=/ca.pem&cert=c&key=k";
        let address = Address::parse(text).unwrap();
        assert_eq!(address.endpoints, ["https://h1:2379", "https://h2:80", "https://[::1]:2"]);
        assert_eq!(address.prefix, "/a/b");
        assert_eq!(address.user.as_deref(), Some("me@x"));
        assert_eq!(address.password.as_deref(), Some("a:b+c"));
        assert_eq!(address.ca, Some("/ca.pem".into()));
        assert_eq!(Address::parse("etcd://h:80").unwrap().endpoints, ["http://h:80"]);
    }

    #[test]
    fn mistakes_are_named_and_passwords_are_not() {
        for (text, word) in [
            ("localhost:2379", "etcd://HOST"),
            ("http://me:secret@h", "no goal store"),
            ("etcd://", "HOST:PORT"),
            ("etcd://me:secret@h:x", "HOST:PORT"),
            ("etcd://me:secret@h,", "HOST:PORT"),
            ("etcd://me@h", "password"),
            ("etcd://me:secret@h?password_file=f", "one of them"),
            ("etcd://h?password_file=f", "user"),
            ("etcd://h?ca=f", "etcds://"),
            ("etcds://h", "ca=FILE"),
            ("etcds://h?ca=f&cert=c", "key=FILE"),
            ("etcd://h?timeout=3", "timeout"),
            ("etcd://h/a b", "prefix"),
        ] {
            let error = Address::parse(text).unwrap_err().to_string();
            assert!(error.contains(word) && !error.contains("secret"), "{text}: {error}");
            assert_eq!(error.lines().count(), 1);
        }
    }
}
