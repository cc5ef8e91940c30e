//! ivcpu-vmm: the program.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A KVM virtual machine monitor with an IVCPU, a virtual CPU that takes every device interrupt.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Exits(ivcpu_vmm::exits::command::ExitsArgs),
}

fn main() -> ExitCode {
    let Command::Exits(args) = Cli::parse().command;
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match ivcpu_vmm::exits::command::run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ivcpu-vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}
