//! Large pages. Many machines lie all over the memory, and with pages of 4 KiB a tenth of the time goes into finding them.

use std::{env, os::unix::process::CommandExt as _, process::Command};

/// From so many machines on it makes a difference.
const MACHINES: u32 = 20_000;

/// What tells the GNU C library to ask the kernel for large pages; it must be there before the program starts.
const VARIABLE: &str = "GLIBC_TUNABLES";

/// Becomes this program anew, with large pages, if there are so many machines and nobody has set anything. Returns if not,
/// or if that fails: small pages do too.
pub(crate) fn use_large(machines: u32) {
    if !cfg!(all(target_os = "linux", target_env = "gnu"))
        || machines < MACHINES
        || env::var_os(VARIABLE).is_some()
    {
        return;
    }
    if let Ok(program) = env::current_exe() {
        let mut again = Command::new(program);
        again.args(env::args_os().skip(1)).env(VARIABLE, "glibc.malloc.hugetlb=1");
        // It comes back only with an error.
        let _ = again.exec();
    }
}
