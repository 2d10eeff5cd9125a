//! How a command ends: its exit code, and the line on stderr that says why.

use std::{error::Error, fmt, process::ExitCode};

use shoal_client::ClientError;

use crate::show;

/// It was refused, or failed; a build or a rollout that was waited for did not succeed.
const FAILED: u8 = 1;

/// The command line is wrong: nothing was asked or done.
const USAGE: u8 = 2;

/// No coordinator could answer: the same command may do later.
const AWAY: u8 = 3;

/// Whoever asks is not logged in, or may not do it.
const NOT_ALLOWED: u8 = 4;

/// What `shoal --help` says of them.
pub(crate) const HELP: &str = "\
Exit codes:
  0  done
  1  refused or failed; with --wait or --follow also when the build or the rollout did not succeed
  2  wrong usage, or a configuration that cannot be read: nothing was done
  3  no coordinator could answer: try again later
  4  not logged in, not allowed, or one end does not believe the other's certificate
An error is one line on stderr.";

/// The command line is wrong in a way that clap does not see.
#[derive(Debug)]
pub(crate) struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Usage {}

/// An error of the command line.
pub(crate) fn usage(text: impl Into<String>) -> anyhow::Error {
    Usage(text.into()).into()
}

/// Nobody has said who asks.
#[derive(Debug)]
pub(crate) struct Nobody(pub(crate) &'static str);

impl fmt::Display for Nobody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Error for Nobody {}

/// Whoever read what a command prints has gone away: there is nothing more to do, and no error.
#[derive(Debug)]
pub(crate) struct ReaderGone;

impl fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nobody reads this")
    }
}

impl Error for ReaderGone {}

fn of_client(error: &ClientError) -> u8 {
    match error {
        ClientError::Refused { status: 401 | 403, .. } => NOT_ALLOWED,
        ClientError::Distrusted { .. } => NOT_ALLOWED,
        ClientError::Config(_) => USAGE,
        // Its status is one of those that pass; this does not, until somebody sets the key.
        ClientError::Refused { code, .. } if code == "no_ca_key" => FAILED,
        error if error.is_transient() => AWAY,
        _ => FAILED,
    }
}

fn code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<ClientError>() {
            return of_client(error);
        }
        if cause.is::<Usage>() || cause.is::<shoal_process::WrongConfig>() {
            return USAGE;
        }
        if cause.is::<Nobody>() {
            return NOT_ALLOWED;
        }
    }
    FAILED
}

/// Ends a command: says what went wrong, and how it is to be told to the shell.
pub(crate) fn end(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<ReaderGone>() => ExitCode::SUCCESS,
        Err(error) => {
            show::note(&format!("shoal: {}", show::one_line(&error)));
            code(&error).into()
        }
    }
}

/// Ends on a command line that clap did not take; help and version are no errors.
pub(crate) fn refuse(error: &clap::Error) -> ExitCode {
    if error.exit_code() == 0
        || error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    {
        // Nobody to tell when this does not go out.
        let _ = error.print();
        return u8::try_from(error.exit_code()).unwrap_or(USAGE).into();
    }
    show::note(&format!("shoal: {}", usage_line(&error.render().to_string())));
    USAGE.into()
}

/// What clap counts among the needed as soon as the environment gives it.
const GIVEN: [&str; 3] = [" --coordinator <URL>", " --identity <DIR>", " --config <FILE>"];

/// clap's explanation, which is several paragraphs, in a line.
fn usage_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let text = text.replace("invalid digit found in string", "it is not a whole number");
    let mut said = Vec::new();
    let mut form = None;
    for paragraph in text.split("\n\n") {
        let words = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
        if let Some(usage) = paragraph.strip_prefix("Usage: ") {
            let usage = usage.lines().next().unwrap_or_default().to_string();
            form = Some(GIVEN.iter().fold(usage, |usage, given| usage.replace(given, "")));
        } else if !words.is_empty() && !paragraph.starts_with("For more information") {
            said.push(words);
        }
    }
    let form = form.map(|form| format!(" (usage: {form})")).unwrap_or_default();
    format!("{}{form}; --help says more", said.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: u16) -> anyhow::Error {
        let (code, message) = ("x".into(), "no".into());
        ClientError::Refused { status, code, message }.into()
    }

    #[test]
    fn codes_tell_what_a_script_may_do() {
        assert_eq!(code(&anyhow::anyhow!("no room")), FAILED);
        assert_eq!(code(&refused(404)), FAILED);
        assert_eq!(code(&refused(409).context("while deploying")), FAILED);
        assert_eq!(code(&usage("--agents is at least 1")), USAGE);
        assert_eq!(code(&ClientError::Config("no address".into()).into()), USAGE);
        for status in [429, 500, 503] {
            assert_eq!(code(&refused(status).context("while asking")), AWAY, "{status}");
        }
        // Waiting sets no key.
        let (code_word, message) = ("no_ca_key".into(), "set ca_key".into());
        let refused_key = ClientError::Refused { status: 503, code: code_word, message };
        assert_eq!(code(&refused_key.into()), FAILED);
        for status in [401, 403] {
            assert_eq!(code(&refused(status)), NOT_ALLOWED, "{status}");
        }
        assert_eq!(code(&Nobody("who are you?").into()), NOT_ALLOWED);
    }

    #[test]
    fn what_clap_says_is_one_line() {
        let text = "error: unexpected argument '--jsno' found\n\n  tip: a similar argument exists: '--json'\n\n\
                    Usage: shoal status --json [APP]\n       shoal x\n\nFor more information, try '--help'.\n";
        let want = "unexpected argument '--jsno' found; tip: a similar argument exists: '--json' \
                    (usage: shoal status --json [APP]); --help says more";
        assert_eq!(usage_line(text), want);
        let text = "error: invalid value 'x' for '[SET]'\n  [possible values: on, off]\n\nFor more information, try \
                    '--help'.\n";
        let want = "invalid value 'x' for '[SET]' [possible values: on, off]; --help says more";
        assert_eq!(usage_line(text), want);
        // What the environment gives need not be typed.
        let text = "error: x\n\nUsage: shoal drain --coordinator <URL> --identity <DIR> <REGION>\n";
        assert_eq!(usage_line(text), "x (usage: shoal drain <REGION>); --help says more");
    }
}
