//! Requests to the programs' own interfaces.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Sends a request to `at`, and reads the JSON of its answer. By HTTP/1.0, whose answers end with the connection.
pub(crate) fn ask(at: &str, method: &str, path: &str, body: &[u8]) -> anyhow::Result<Value> {
    let mut stream = TcpStream::connect(at).with_context(|| format!("cannot connect to {at}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.0\r\nHost: {at}\r\nContent-Length: {length}\r\n\r\n")?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let head = answer.windows(4).position(|four| four == b"\r\n\r\n");
    let (head, body) = answer.split_at(head.context("an answer without an end of its head")? + 4);
    let head = String::from_utf8_lossy(head);
    let status = head.split(' ').nth(1).unwrap_or_default();
    let said = String::from_utf8_lossy(body);
    ensure!(status.starts_with('2'), "{at}{path} says {status}: {}", said.trim());
    Ok(serde_json::from_slice(body)?)
}
