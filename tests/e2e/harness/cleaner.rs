//! What is left of a cluster whose test was killed.

use std::{
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
};

/// Waits until its input ends, which the kernel sees to when the test is gone. Then it ends the programs that agents
/// started, which outlive them by design, by the pids and start times that they wrote, and removes the directory.
const SCRIPT: &str = r#"
read -r _
find "$0" -name pid | while read -r file; do
    read -r pid start <"$file"
    if [ "$(cut -d' ' -f22 "/proc/$pid/stat" 2>/dev/null)" = "$start" ]; then kill -KILL -- "-$pid"; fi
done
rm -rf "$0"
"#;

/// A process that cleans up after a test that could not.
pub(super) struct Cleaner(Child);

impl Cleaner {
    pub(super) fn of(dir: &Path) -> Self {
        let mut command = Command::new("sh");
        command.arg("-c").arg(SCRIPT).arg(dir).stdin(Stdio::piped()).process_group(0);
        Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Cleaner {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
