//! ivcpu-backend: the program.

use std::process::ExitCode;

use clap::Parser;
use ivcpu_backend::cli::{Command, Options, capabilities};
use ivcpu_backend::daemon;
use ivcpu_backend::fifo::{FifoCommand, RegionFile};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    ivcpu_sandbox::use_one_arena();
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => return not_understood(&error),
    };
    let filter =
        EnvFilter::try_from_env("IVCPU_LOG").unwrap_or_else(|_| EnvFilter::new("warn,virtio_queue=off"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    if options.print_capabilities {
        return match capabilities() {
            Ok(capabilities) => {
                println!("{capabilities}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("ivcpu-backend: cannot read its own description: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let result = match &options.command {
        Some(Command::Fifo(FifoCommand::Create(region))) => {
            RegionFile::create(region).map(drop).map_err(daemon::Error::from)
        }
        None => daemon::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ivcpu-backend: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Help and version go out as they are; an error becomes one line.
fn not_understood(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.to_string();
    // The first paragraph says what is wrong; usage and tips follow.
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = paragraph.split_whitespace().collect();
    let line = words.join(" ");
    eprintln!("ivcpu-backend: {}; see ivcpu-backend --help", line.strip_prefix("error: ").unwrap_or(&line));
    ExitCode::from(2)
}
