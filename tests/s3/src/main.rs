//! Runs a command with an S3 server beside it, which is named in the environment as SDKs expect it, and ends with
//! the command's exit code. The bucket is `s3://shoal`. It listens on a free port of loopback, or where
//! `SHOAL_TEST_S3_LISTEN` says.

use std::process::{Command, ExitCode};

use anyhow::Context as _;
use shoal_test_s3::{BUCKET, Server, WRITER};

fn main() -> anyhow::Result<ExitCode> {
    let mut words = std::env::args_os().skip(1);
    let program = words.next().context("give the command to run: shoal-test-s3 COMMAND...")?;
    let server = match std::env::var("SHOAL_TEST_S3_LISTEN") {
        Ok(addr) => Server::start_on(addr.parse().context("SHOAL_TEST_S3_LISTEN is no address")?)?,
        Err(_) => Server::start()?,
    };
    eprintln!("s3://{BUCKET} is served at {}", server.endpoint());
    let mut command = Command::new(&program);
    command.args(words).envs(server.environment(WRITER));
    let status = command.status().with_context(|| format!("cannot run {}", program.display()))?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}
