//! A network of a test's own.

use std::process::Command;

/// Set where a test runs in its own network.
const INSIDE: &str = "SHOAL_TEST_OWN_NETWORK";

/// Whether this process has a network of its own. If not, runs the one test of this name again in one, fails if that
/// fails, and then there is nothing left to do. Users who are not root need user namespaces, and are told so.
pub fn own_network(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "unshare", "--net"]);
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.arg(std::env::current_exe().unwrap()).args([test, "--exact", "--nocapture"]);
    let output = command.env(INSIDE, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{test} in a network of its own (it needs iproute2, and root or user namespaces):\n{said}{error}"
    );
    false
}

/// Runs `ip` with these words.
pub fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {words}: {error}");
}
