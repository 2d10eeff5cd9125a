//! The programs that are compared.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::Command,
};

use clap::ValueEnum;

/// A way to bring a file from one machine to many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    Shoal,
    Nginx,
    Aria2,
    Rqbit,
    Libtorrent,
    Iroh,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title())
    }
}

impl Kind {
    pub(crate) const ALL: &[Self] =
        &[Self::Shoal, Self::Nginx, Self::Aria2, Self::Rqbit, Self::Libtorrent, Self::Iroh];

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Shoal => "Shoal",
            Self::Nginx => "nginx + curl, HTTPS",
            Self::Aria2 => "aria2",
            Self::Rqbit => "rqbit",
            Self::Libtorrent => "libtorrent",
            Self::Iroh => "iroh-blobs",
        }
    }

    /// By what it encrypts, if it does.
    pub(crate) fn encrypts(self) -> Option<&'static str> {
        match self {
            Self::Shoal => Some("mutual TLS"),
            Self::Nginx | Self::Iroh => Some("TLS"),
            Self::Aria2 | Self::Rqbit | Self::Libtorrent => None,
        }
    }

    /// By what it verifies what it got, if it does.
    pub(crate) fn verifies(self) -> Option<&'static str> {
        match self {
            Self::Shoal | Self::Iroh => Some("BLAKE3"),
            Self::Nginx => None,
            Self::Aria2 | Self::Rqbit | Self::Libtorrent => Some("SHA-1"),
        }
    }

    /// The programs that it runs, given where others than the system's are installed.
    fn programs(self, installed: &Path) -> Vec<PathBuf> {
        match self {
            Self::Shoal => Vec::new(),
            Self::Nginx => ["nginx", "curl", "openssl"].map(PathBuf::from).into(),
            Self::Aria2 => vec!["aria2c".into()],
            Self::Rqbit => vec![installed.join("rqbit/bin/rqbit")],
            Self::Libtorrent => vec![installed.join("libtorrent/bin/python")],
            Self::Iroh => vec![installed.join("iroh/bin/iroh-peer")],
        }
    }

    /// Its first program.
    pub(crate) fn program(self, installed: &Path) -> PathBuf {
        self.programs(installed).into_iter().next().unwrap_or_default()
    }

    /// What is missing of it, and how to get it.
    pub(crate) fn missing(self, installed: &Path) -> Option<String> {
        let missing = self.programs(installed).into_iter().find(|program| !is_there(program))?;
        Some(format!(
            "{self}: {} is not there: run benches/peers/install {}",
            missing.display(),
            installed.display()
        ))
    }

    /// What its programs say that they are.
    pub(crate) fn version(self, installed: &Path) -> String {
        let say = |arg: &str| said(Command::new(self.program(installed)).arg(arg));
        match self {
            Self::Shoal => env!("CARGO_PKG_VERSION").to_owned(),
            Self::Nginx => format!("{}, curl {}", say("-v"), said(Command::new("curl").arg("-V"))),
            Self::Libtorrent => {
                let ask = "import libtorrent; print(libtorrent.__version__)";
                said(Command::new(self.program(installed)).args(["-c", ask]))
            }
            Self::Aria2 | Self::Rqbit | Self::Iroh => say("--version"),
        }
    }
}

fn is_there(program: &Path) -> bool {
    if program.components().count() > 1 {
        return program.is_file();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// The first word with a digit at its start, or after a slash, of what a command says.
fn said(command: &mut Command) -> String {
    let Ok(output) = command.output() else {
        return String::new();
    };
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let words = text.split([' ', '/', '\n']);
    let mut versions = words.filter(|word| word.starts_with(|first: char| first.is_ascii_digit()));
    versions.next().unwrap_or_default().to_owned()
}
