//! Apps, and the repositories that they are built from.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use shoal_client::types::App;
use shoal_proto::{
    AppName, CommitSha,
    goal::{Activation, HealthCheck, RolloutPlan},
};

/// An app that is only published to, for all machines, and only verified there.
pub fn plain_app(name: &str) -> App {
    App {
        name: AppName::new(name).unwrap(),
        repository: String::new(),
        build_command: String::new(),
        output: String::new(),
        activation: Activation::None,
        health: None,
        selector: String::new(),
        build_timeout_s: 60,
        max_attempts: None,
        keep_builds: None,
        piece_size_bytes: None,
        plan: RolloutPlan { deadline_s: 600, ..RolloutPlan::default() },
        priority: 0,
    }
}

/// An app whose program is a shell script that writes what it is and stays.
pub fn script_app(name: &str, repository: &Path) -> App {
    App {
        repository: repository.display().to_string(),
        build_command: "sh build.sh".into(),
        output: "out/app".into(),
        activation: Activation::Run { args: vec![] },
        health: Some(HealthCheck {
            // The version that it says must be its own, not what the one before it left.
            command:
                "grep -q \"echo $(cut -d' ' -f1 \"$SHOAL_RUN_DIR/version\") \" \"$SHOAL_CURRENT\""
                    .into(),
            timeout_s: 30,
        }),
        ..plain_app(name)
    }
}

/// A git repository of a test.
pub struct Repo {
    pub path: PathBuf,
}

impl Repo {
    /// A repository whose build makes a script that says its version and stays.
    pub fn new(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        let repo = Self { path };
        repo.git(&["init", "-q", "-b", "main"]);
        repo
    }

    pub fn git(&self, args: &[&str]) -> String {
        let output = Command::new("git")
            .arg("-C")
            .arg(&self.path)
            .args(["-c", "user.name=Tester", "-c", "user.email=tester@example.org"])
            .args(["-c", "safe.directory=*"])
            .args(args)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "git {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap().trim().into()
    }

    /// Commits `build.sh` with this text.
    pub fn commit(&self, build: &str) -> CommitSha {
        fs::write(self.path.join("build.sh"), build).unwrap();
        self.git(&["add", "-A"]);
        self.git(&["commit", "-q", "--allow-empty", "-m", "change"]);
        self.git(&["rev-parse", "HEAD"]).parse().unwrap()
    }

    /// Commits a build whose program writes `version` and runs until it is stopped.
    pub fn commit_version(&self, version: &str) -> CommitSha {
        self.commit(&format!(
            "mkdir -p out\nprintf '#!/bin/sh\\necho {version} $SHOAL_APP > \"$SHOAL_RUN_DIR/version\"\\n\
             exec sleep 100000\\n' > out/app\n"
        ))
    }
}
