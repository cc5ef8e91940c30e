//! ivcpu-vmm: the program.

use std::fmt::Display;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use ivcpu_vmm::chain::Chain;
use ivcpu_vmm::cli::{Cli, Command};
use ivcpu_vmm::doctor;
use ivcpu_vmm::exits;
use ivcpu_vmm::machine::Machine;
use ivcpu_vmm::vfio;
use tracing_subscriber::EnvFilter;

/// What is logged unless IVCPU_LOG says otherwise. vfio-ioctls warns of interrupts a function merely does not have, and of
/// accesses that a guest can repeat as often as it likes.
const DEFAULT_LOG: &str = "warn,vfio_ioctls=error,virtio_queue=off";

fn main() -> ExitCode {
    ivcpu_sandbox::use_one_arena();
    let filter = EnvFilter::try_from_env("IVCPU_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOG));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return not_understood(&error),
    };
    match (cli.command, cli.run) {
        (Some(Command::Exits(args)), _) => match exits::command::run(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(format_args!("{error:#}")),
        },
        (Some(Command::Doctor(args)), _) => match doctor::command::run(&args) {
            Ok(ready) => ExitCode::from(u8::from(!ready)),
            Err(error) => failed(error),
        },
        (Some(Command::Vfio(command)), _) => match vfio::command::run(&command) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(Chain(&error)),
        },
        (None, Some(run)) => match Machine::new(&run.into()).and_then(Machine::run) {
            Ok(ending) => {
                eprintln!("ivcpu-vmm: {ending}");
                ExitCode::from(ending.exit_status())
            }
            Err(error) => failed(Chain(&error)),
        },
        (None, None) => not_understood(
            &Cli::command().error(ErrorKind::MissingRequiredArgument, "give a kernel to boot: --kernel PATH"),
        ),
    }
}

/// Help and version go out as they are; an error becomes one line.
fn not_understood(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        print!("{error}");
        return ExitCode::SUCCESS;
    }
    let text = error.to_string();
    // The first paragraph says what is wrong; usage and tips follow.
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = paragraph.split_whitespace().collect();
    let line = words.join(" ");
    eprintln!("ivcpu-vmm: {}; see ivcpu-vmm --help", line.strip_prefix("error: ").unwrap_or(&line));
    ExitCode::from(2)
}

fn failed(error: impl Display) -> ExitCode {
    eprintln!("ivcpu-vmm: {error}");
    ExitCode::FAILURE
}
