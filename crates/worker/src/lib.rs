//! The worker: builds commits into artifacts.
//!
//! It asks the coordinator for a job (`worker`), brings the commit into its mirror of the repository and checks it
//! out clean (`git`), runs the app's build command in a process group of its own, as an unprivileged user where
//! it can (`build`, `user`), cuts the output and uploads it to the main bucket (`job`). Only then does
//! it report success. Beside the work go heartbeats and the log; a worker that was declared lost is told so by
//! its next call, and drops the job.
//!
//! Any command, any output file: the worker knows no language. Whatever a build leaves running ends with it,
//! and whatever a killed worker left ends when the next one starts on the same directory.

mod build;
mod config;
mod git;
mod job;
mod processes;
mod user;
mod worker;

pub use config::{Args, Config};
pub use worker::run;
