//! ivcpu-lab: the program.

use std::process::ExitCode;
use std::thread;

use anyhow::anyhow;
use clap::{Parser, Subcommand, ValueEnum};
use ivcpu_lab::compare::{CompareOptions, compare};
use ivcpu_lab::guest;
use ivcpu_lab::html::{self, ReportOptions};
use ivcpu_lab::image::debian;
use ivcpu_lab::in_host::Host;
use ivcpu_lab::in_host::agent;
use ivcpu_lab::in_host::measure::measure;
use ivcpu_lab::in_host::plan::Plan;
use ivcpu_lab::package::{Programs, package};
use ivcpu_lab::provision::{Kernel, Provision};
use ivcpu_lab::shell;
use ivcpu_lab::workspace::Workspace;

/// An emulated virtualization host, and what is measured and tested in it.
#[derive(Parser)]
#[command(name = "cargo lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch QEMU, tools and kernels from the distribution's archive, and Alioth by cargo, into target/lab
    Provision {
        /// Kernels besides the emulated host's own
        #[arg(long, value_delimiter = ',', default_value = "6.12")]
        kernels: Vec<Kernel>,
    },
    /// Measure stock interrupts, the IVCPU by interrupts and by FIFO, and stock rivals, and print the paper's Table 1
    Compare(CompareOptions),
    /// Make a page with charts of a file that `compare --json` wrote
    Report(ReportOptions),
    /// Make a Debian disk image of packages, with its kernel and initramfs, and say how ivcpu-vmm boots it
    Image,
    /// Build the Debian package, and print where it is
    Package,
    /// A terminal in the emulated host, or one command there with its exit status
    Shell {
        /// The command and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Provision, build, and run every test
    Test {
        /// Arguments for `cargo test`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Inside the emulated host (`cargo lab shell`): measure one VM, and print what its windows saw as JSON
    Measure(Plan),
    /// Inside the emulated host: serve the lab
    #[command(hide = true)]
    Agent,
    /// Inside a guest: serve the host
    #[command(hide = true)]
    Guest,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("IVCPU_LAB_LOG"))
        .with_writer(std::io::stderr)
        .init();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return not_understood(&error),
    };
    match run(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Help and version go out as they are; an error becomes one line.
fn not_understood(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
    if let DisplayHelp | DisplayVersion | DisplayHelpOnMissingArgumentOrSubcommand = error.kind() {
        error.exit();
    }
    let text = error.to_string();
    // The first paragraph says what is wrong; usage and tips follow.
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = paragraph.split_whitespace().collect();
    let line = words.join(" ");
    eprintln!("lab: {}; see cargo lab --help", line.strip_prefix("error: ").unwrap_or(&line));
    ExitCode::from(2)
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Agent => agent::serve()?,
        Command::Guest => guest::serve()?,
        Command::Compare(options) => {
            let complete = compare(&Workspace::locate()?, &options)?;
            return Ok(if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Image => {
            let workspace = Workspace::locate()?;
            print!("{}", debian::prepare(&workspace, &Provision::new(&workspace))?.instructions());
        }
        Command::Measure(plan) => {
            println!("{}", serde_json::to_string(&measure(&mut Host::emulated()?, &plan)?)?);
        }
        Command::Package => {
            let workspace = Workspace::locate()?;
            println!("{}", package(&workspace, &Provision::new(&workspace), Programs::Shipped)?.display());
        }
        Command::Provision { kernels } => {
            let workspace = Workspace::locate()?;
            provision(&workspace, &kernels)?;
            Provision::new(&workspace).alioth()?;
        }
        Command::Report(options) => html::report(&options)?,
        Command::Shell { command } => {
            let status = shell::shell(&Workspace::locate()?, &command)?;
            return Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)));
        }
        Command::Test { arguments } => {
            let workspace = Workspace::locate()?;
            // What is tested is built while what it needs is fetched.
            thread::scope(|scope| {
                let build =
                    scope.spawn(|| workspace.build().and_then(|()| workspace.build_tests(&arguments)));
                provision(&workspace, Kernel::value_variants())?;
                let more = Provision::new(&workspace);
                more.browser()?;
                debian::prepare(&workspace, &more)?;
                more.testpmd()?;
                more.libvirt()?;
                // Last: by now the other build is at its end, too, and leaves it a core.
                more.alioth()?;
                build.join().map_err(|_| anyhow!("the thread that builds the programs died"))??;
                anyhow::Ok(())
            })?;
            workspace.test(&arguments)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn provision(workspace: &Workspace, kernels: &[Kernel]) -> anyhow::Result<()> {
    let provision = Provision::new(workspace);
    provision.tools()?;
    provision.qemu()?;
    provision.make()?;
    for kernel in kernels {
        provision.kernel(*kernel)?;
    }
    Ok(())
}
