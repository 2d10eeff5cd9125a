//! `shoal completions`: what a shell needs to complete commands and flags.

use clap::{CommandFactory as _, ValueEnum};
use clap_complete::{generate, shells};

use crate::{Cli, show};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

#[derive(clap::Args)]
pub(crate) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

impl CompletionsArgs {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        show::print(script(self.shell).trim_end())
    }
}

/// The script that a shell reads.
fn script(shell: Shell) -> String {
    let (mut command, mut out) = (Cli::command(), Vec::new());
    match shell {
        Shell::Bash => generate(shells::Bash, &mut command, "shoal", &mut out),
        Shell::Zsh => generate(shells::Zsh, &mut command, "shoal", &mut out),
        Shell::Fish => generate(shells::Fish, &mut command, "shoal", &mut out),
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each command below this one with the words that lead to it, and its visible long flags.
    fn walk(command: &clap::Command, path: &[String], all: &mut Vec<(Vec<String>, Vec<String>)>) {
        let flags = command.get_arguments().filter(|flag| !flag.is_hide_set());
        let flags = flags.filter_map(|flag| flag.get_long().map(String::from)).collect();
        all.push((path.to_vec(), flags));
        for sub in command.get_subcommands() {
            let path: Vec<_> = path.iter().cloned().chain([sub.get_name().into()]).collect();
            walk(sub, &path, all);
        }
    }

    #[test]
    fn every_command_and_flag_is_completed_in_each_shell() {
        let mut command = Cli::command();
        command.build();
        let mut all = Vec::new();
        walk(&command, &[], &mut all);
        let (bash, zsh, fish) = (script(Shell::Bash), script(Shell::Zsh), script(Shell::Fish));
        assert!(all.len() > 60, "only {} commands", all.len());
        for (path, flags) in all {
            let last = path.last().map_or("shoal", String::as_str);
            // Each shell has a case a command: bash with all of its words.
            let words = path.iter().flat_map(|name| name.split('-'));
            let case: String = words.map(|word| format!("__subcmd__{word}")).collect();
            let start = bash.find(&format!("\n        shoal{case})\n"));
            let start = start.unwrap_or_else(|| panic!("bash lacks shoal {path:?}"));
            let of_bash = bash[start..].split(";;").next().unwrap_or_default();
            assert!(zsh.contains(&format!("'{last}:")) || path.is_empty(), "zsh lacks {path:?}");
            assert!(fish.contains(&format!(" -a \"{last}\"")) || path.is_empty(), "fish: {path:?}");
            for flag in flags {
                let word = format!("--{flag}");
                assert!(of_bash.contains(&word), "bash lacks {word} of {path:?}");
                assert!(zsh.contains(&word), "zsh lacks {word} of {path:?}");
                // clap_complete's script for fish knows the flags of commands of one word and of two.
                if path.len() < 3 {
                    assert!(fish.contains(&format!(" -l {flag}")), "fish lacks {word} of {path:?}");
                }
            }
        }
    }

    #[test]
    fn bash_completes_by_the_script() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("shoal.bash");
        std::fs::write(&file, script(Shell::Bash)).unwrap();
        let complete = |words: &[&str]| {
            let ask = format!(
                "source {}; COMP_WORDS=({}); COMP_CWORD={}; _shoal shoal \"{}\" \"\"; echo \"${{COMPREPLY[*]}}\"",
                file.display(),
                words.join(" "),
                words.len() - 1,
                words.last().unwrap_or(&""),
            );
            let output = std::process::Command::new("bash").args(["-c", &ask]).output().unwrap();
            String::from_utf8(output.stdout).unwrap().trim().to_string()
        };
        assert_eq!(complete(&["shoal", "stat"]), "status");
        assert_eq!(complete(&["shoal", "pki", "rotate-ca", "fin"]), "finish");
        assert_eq!(complete(&["shoal", "drain", "--rea"]), "--reason");
        assert_eq!(complete(&["shoal", "completions", "z"]), "zsh");
    }
}
