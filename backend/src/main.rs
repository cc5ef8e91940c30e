//! ivcpu-backend: the program.

use std::process::ExitCode;

use clap::Parser;
use ivcpu_backend::cli::{CAPABILITIES, Options};
use ivcpu_backend::daemon;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let options = Options::parse();
    let filter =
        EnvFilter::try_from_env("IVCPU_LOG").unwrap_or_else(|_| EnvFilter::new("warn,virtio_queue=off"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    if options.print_capabilities {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    match daemon::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ivcpu-backend: {error}");
            ExitCode::FAILURE
        }
    }
}
