//! ivcpu-vmm: the program.

use std::process::ExitCode;

use clap::Parser;
use ivcpu_vmm::cli::Cli;
use ivcpu_vmm::machine::{Error, Machine};
use ivcpu_vmm::power::Ending;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("IVCPU_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .init();
    let cli = Cli::parse();
    match run(cli) {
        Ok(ending) => {
            eprintln!("ivcpu-vmm: {ending}");
            ExitCode::from(ending.exit_status())
        }
        Err(error) => {
            eprintln!("ivcpu-vmm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<Ending, Error> {
    Machine::new(&cli.run.into())?.run()
}
