//! What a VMM that a guest or a peer has taken over can still do: very little.
//!
//! Everything is opened first; then each thread gives up, for good, what its role does not need. Two fences, both on by default:
//!
//! - [`seccomp`]: each thread may make only the system calls that [`rules`] lists for its [`Role`]. A forbidden one ends the
//!   process, and [`violation`] says which it was. With `--seccomp log` it is made, and a thread of its own says which.
//! - [`landlock`]: no file can be opened but those that are still needed while the VM runs, and no TCP connection be made.
//!
//! A thread inherits the filter of the one that starts it and adds its own, so a role that starts threads has at least what those have.
//! Setuid programs gain nothing (`no_new_privs`), and none of the roles may execute one.

pub mod landlock;
pub mod rules;
pub mod seccomp;
pub mod violation;
mod witness;

use std::str::FromStr;
use std::sync::OnceLock;

pub use rules::Role;
use seccomp::Filters;

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

/// What happens at a forbidden system call; the words are Cloud Hypervisor's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Seccomp {
    /// The process ends, and says which it was.
    #[default]
    True,
    /// Nothing is forbidden.
    False,
    /// The call is made, and standard error says which it was.
    Log,
}

impl FromStr for Seccomp {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "true" => Ok(Self::True),
            "false" => Ok(Self::False),
            "log" => Ok(Self::Log),
            _ => Err("expected true, false or log"),
        }
    }
}

/// Why a process or thread cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel has no filters, or none that can say what they caught.
    #[error(
        "this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER); --seccomp false runs the VM without"
    )]
    NoSeccomp(#[source] std::io::Error),
    /// The rules do not make a filter: a mistake in [`rules`].
    #[error("cannot make the seccomp filter of the {role} thread")]
    Filter {
        /// Whose.
        role: Role,
        /// What the compiler said.
        source: seccompiler::Error,
    },
    /// The kernel does not take a filter.
    #[error("cannot confine the {role} thread with seccomp; --seccomp false runs the VM without")]
    Apply {
        /// Whose.
        role: Role,
        /// What the kernel answered.
        source: seccompiler::Error,
    },
    /// The handler of forbidden calls, or the promise never to gain privileges.
    #[error("cannot {step}")]
    System {
        /// What was being done.
        step: &'static str,
        /// What the kernel answered.
        source: std::io::Error,
    },
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
    nix::sys::prctl::set_no_new_privs()
        .map_err(|source| Error::System { step: "give up gaining privileges", source: source.into() })?;
    if options.seccomp == Seccomp::False {
        return Ok(());
    }
    use_one_arena();
    let filters = Filters::compile(options.seccomp)?;
    if options.seccomp == Seccomp::True {
        // The one that is there would open the program's own file for a backtrace, and end the process by that.
        std::panic::set_hook(Box::new(|panic| eprintln!("ivcpu-vmm: {panic}")));
        violation::install_handler()
            .map_err(|source| Error::System { step: "catch forbidden system calls", source })?;
    }
    // Armed twice only by a program that makes two machines; the first one's filters stay.
    let _ = FILTERS.set(filters);
    Ok(())
}

/// Has all threads share the allocator's first arena. glibc shrinks the arenas it makes for other threads, and opens a file of
/// /proc before it does so for the first time (`check_may_shrink_heap`), which no role but the main thread's may.
fn use_one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call sets a number of the allocator's; no other thread runs yet that could be using it.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Confines the calling thread to its role, for good. Does nothing in a process that is not [armed](arm).
pub fn enter(role: Role) -> Result<(), Error> {
    match FILTERS.get() {
        Some(filters) => {
            violation::name_thread(role);
            filters.apply(role)
        }
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
    fn the_words_are_cloud_hypervisors() {
        assert_eq!("true".parse(), Ok(Seccomp::True));
        assert_eq!("false".parse(), Ok(Seccomp::False));
        assert_eq!("log".parse(), Ok(Seccomp::Log));
        assert_eq!("on".parse::<Seccomp>(), Err("expected true, false or log"));
    }

    #[test]
    fn a_process_that_is_not_armed_is_not_confined() {
        std::thread::spawn(|| enter(Role::Deadline).unwrap()).join().unwrap();
    }
}
