//! ivcpu-vmm: the program.

use std::fmt::Display;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, error::ErrorKind};
use ivcpu_vmm::cli::{Cli, Command};
use ivcpu_vmm::exits;
use ivcpu_vmm::machine::Machine;
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
    match (cli.command, cli.run) {
        (Some(Command::Exits(args)), _) => match exits::command::run(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(format_args!("{error:#}")),
        },
        (None, Some(run)) => match Machine::new(&run.into()).and_then(Machine::run) {
            Ok(ending) => {
                eprintln!("ivcpu-vmm: {ending}");
                ExitCode::from(ending.exit_status())
            }
            Err(error) => failed(error),
        },
        (None, None) => Cli::command()
            .error(ErrorKind::MissingRequiredArgument, "give a kernel to boot: --kernel PATH")
            .exit(),
    }
}

fn failed(error: impl Display) -> ExitCode {
    eprintln!("ivcpu-vmm: {error}");
    ExitCode::FAILURE
}
