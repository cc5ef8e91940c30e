//! System-call filters by thread role, for the programs of this workspace: each has its own roles, this is what they have in common.
//!
//! A [`Role`] lists the system calls of a kind of thread as [`Rule`]s. [`Filters::arm`] compiles them all, and
//! [`Filters::enter`] puts one on the calling thread, for good. A forbidden call ends the process, and [`violation`] says which it was and
//! who made it; with `--seccomp log` it is made, and a thread of its own says so.
//!
//! A thread inherits the filter of the one that starts it and adds its own, so a role that starts threads has at least what those
//! have ([`exceeds`] finds what is missing). Not here: files, users and capabilities, which the programs give up each in its own way.

mod filters;
mod rules;
pub mod violation;
mod witness;

use std::str::FromStr;

pub use filters::Filters;
pub use rules::{EVERY_THREAD, Rule, THREADS, When, any, exceeds, one_of};
pub use syscalls::Sysno;

/// A kind of thread.
pub trait Role: Copy + Send + Sync + 'static {
    /// All of them.
    const ALL: &'static [Self];

    /// Its name in messages: "the NAME thread". No two have the same.
    fn name(self) -> &'static str;

    /// What it may call.
    fn rules(self) -> impl Iterator<Item = &'static Rule>;
}

/// Who is confined.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Its name in messages.
    pub name: &'static str,
    /// What is done before a forbidden call ends it. It runs in a signal handler, under any role's filter.
    pub last_act: fn(),
}

/// Has all threads share the allocator's first arena. glibc shrinks the arenas it makes for other threads, and opens a file of
/// /proc before it does so for the first time (`check_may_shrink_heap`), which no thread may that serves a guest or a peer.
///
/// Call first of all: an arena that a thread was given is not taken back when that ends.
pub fn use_one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call sets a number of the allocator's, under the allocator's lock.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
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
    #[error("this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER); --seccomp false goes without")]
    NoSeccomp(#[source] std::io::Error),
    /// The rules do not make a filter: a mistake in them.
    #[error("cannot make the seccomp filter of the {role} thread")]
    Filter {
        /// Whose.
        role: &'static str,
        /// What the compiler said.
        source: seccompiler::Error,
    },
    /// The kernel does not take a filter.
    #[error("cannot confine the {role} thread with seccomp; --seccomp false goes without")]
    Apply {
        /// Whose.
        role: &'static str,
        /// What the kernel answered.
        source: seccompiler::Error,
    },
    /// A part of the process that filters need.
    #[error("cannot {step}")]
    System {
        /// What was being done.
        step: &'static str,
        /// What the kernel answered.
        source: std::io::Error,
    },
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
}
