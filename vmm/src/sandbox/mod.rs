//! What a VMM that a guest or a peer has taken over can still do: very little.
//!
//! Everything is opened first; then each thread gives up, for good, what its role does not need. Two fences, both on by default:
//!
//! - system-call filters ([`ivcpu_sandbox`]): each thread may make only the calls that [`rules`] lists for its [`Role`]. A forbidden
//!   one ends the process, with its name as the last word; the terminal is given back. Host interrupts stay moved, as after a kill; the
//!   next run gives them back.
//! - [`landlock`]: no file can be opened but those that are still needed while the VM runs, and no TCP connection be made.
//!
//! Setuid programs gain nothing (`no_new_privs`), and none of the roles may execute one.

pub mod landlock;
pub mod rules;

use std::sync::OnceLock;

use ivcpu_sandbox::{Filters, Program};
pub use ivcpu_sandbox::{Seccomp, violation};

use crate::terminal;
pub use rules::Role;

/// `--seccomp true|false|log` and `--landlock true|false`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SandboxOptions {
    /// What happens at a forbidden system call.
    pub seccomp: Seccomp,
    /// Whether files are out of reach.
    pub landlock: bool,
}

impl Default for SandboxOptions {
    fn default() -> Self {
        Self { seccomp: Seccomp::True, landlock: true }
    }
}

/// Why a process or thread cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The promise never to gain privileges.
    #[error("cannot give up gaining privileges")]
    Privileges(#[source] std::io::Error),
    /// The filters of system calls.
    #[error(transparent)]
    Seccomp(#[from] ivcpu_sandbox::Error),
    /// The rules of landlock.
    #[error("cannot confine the VMM with landlock; --landlock false runs the VM without")]
    Landlock(#[from] ::landlock::RulesetError),
}

/// The filters of this process, once it is [armed](arm).
static FILTERS: OnceLock<Filters> = OnceLock::new();

/// Gets ready to confine threads: from now on [`enter`] means it. Call once, before the first thread starts.
pub fn arm(options: SandboxOptions) -> Result<(), Error> {
    if options == (SandboxOptions { seccomp: Seccomp::False, landlock: false }) {
        return Ok(());
    }
    nix::sys::prctl::set_no_new_privs().map_err(|source| Error::Privileges(source.into()))?;
    let program = Program { name: "ivcpu-vmm", last_act: terminal::restore_at_exit };
    if let Some(filters) = Filters::arm::<Role>(program, options.seccomp)? {
        // Armed twice only by a program that makes two machines; the first one's filters stay.
        let _ = FILTERS.set(filters);
    }
    Ok(())
}

/// Confines the calling thread to its role, for good. Does nothing in a process that is not [armed](arm).
pub fn enter(role: Role) -> Result<(), Error> {
    match FILTERS.get() {
        Some(filters) => Ok(filters.enter(role)?),
        None => Ok(()),
    }
}

/// The same for a thread that has nobody to tell: one that cannot be confined must not run, and neither must the VM.
pub fn enter_or_exit(role: Role) {
    if let Err(error) = enter(role) {
        eprintln!("ivcpu-vmm: {}", crate::chain::Chain(&error));
        std::process::exit(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_not_armed_is_not_confined() {
        std::thread::spawn(|| enter(Role::Deadline).unwrap()).join().unwrap();
    }
}
