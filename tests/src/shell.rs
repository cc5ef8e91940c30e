//! `cargo lab shell`: a terminal, or one command, in the emulated host.

use std::io::{self, IsTerminal, Write};

use crate::emulated_host::{EmulatedHost, Input, Options, RawTerminal, terminal_size};
use crate::provision::{Kernel, Provision};
use crate::workspace::Workspace;

/// Runs `command` (a shell if empty) in a freshly booted emulated host and gives its exit status.
pub fn shell(workspace: &Workspace, command: &[String]) -> anyhow::Result<i32> {
    let provision = Provision::new(workspace);
    let mut host =
        EmulatedHost::build_and_boot(workspace, &provision, &[Kernel::V6_12], &Options::default())?;
    let interactive = command.is_empty() && io::stdin().is_terminal() && io::stdout().is_terminal();
    let mut run = match command {
        [] if interactive => host.command(["bash", "--norc", "-i"]),
        [] => host.command(["bash"]),
        command => host.command(command),
    };
    let terminal = if interactive {
        run.terminal = Some(terminal_size());
        eprintln!(
            "The emulated host: kernel {}, five pCPUs, /dev/kvm. This machine's files are here, read-only;\n\
             {} is {} outside.\n\
             On PATH: ivcpu-vmm, ivcpu-backend, ivcpu-lab, qemu-system-x86_64, iperf3, sockperf, ethtool, ip.\n\
             `ivcpu-lab measure` boots a guest and moves traffic (--help says how). `exit` powers off.",
            host.kernel(),
            crate::emulated_host::SHARE,
            host.share().display()
        );
        Some(RawTerminal::enter()?)
    } else {
        None
    };
    let status = host.run(&run, Input::Inherited, None, |error, bytes| {
        // A reader that has gone away does not concern the command.
        let _ = if error { io::stderr().write_all(bytes) } else { io::stdout().write_all(bytes) };
        let _ = io::stdout().flush();
    });
    drop(terminal);
    let status = status?;
    host.power_off()?;
    Ok(status)
}
