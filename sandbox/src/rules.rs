//! What a role may do: system calls, and for some of them with which arguments.

use syscalls::Sysno::{self, *};

/// A system call, and when it is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Which.
    pub call: Sysno,
    /// When.
    pub when: When,
}

/// What the arguments must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Anything.
    Always,
    /// The argument with this number is one of these 32-bit values.
    OneOf(u8, &'static [u64]),
    /// The argument with this number has none of these bits.
    Without(u8, u64),
    /// The argument with this number is the id of this process.
    OwnProcess(u8),
}

/// The call, whatever its arguments.
pub const fn any(call: Sysno) -> Rule {
    Rule { call, when: When::Always }
}

/// The call, with one of these values of an argument.
pub const fn one_of(call: Sysno, argument: u8, values: &'static [u64]) -> Rule {
    Rule { call, when: When::OneOf(argument, values) }
}

/// The call, with none of these bits in an argument.
const fn without(call: Sysno, argument: u8, bits: u64) -> Rule {
    Rule { call, when: When::Without(argument, bits) }
}

/// The call, on this process.
const fn own_process(call: Sysno, argument: u8) -> Rule {
    Rule { call, when: When::OwnProcess(argument) }
}

/// What every thread needs: memory that is never executable, locks, time, reading and writing what is open, and the end. Logging and a
/// panic's message need no more.
pub const EVERY_THREAD: &[Rule] = &[
    any(read),
    any(write),
    any(writev),
    any(close),
    one_of(fcntl, 1, &[libc::F_GETFD as u64]), // Rust, built for debugging, looks whether what it closes is open.
    any(futex),
    any(brk),
    without(mmap, 2, libc::PROT_EXEC as u64),
    without(mprotect, 2, libc::PROT_EXEC as u64),
    any(munmap),
    any(mremap),
    any(madvise),
    any(clock_gettime),
    any(clock_nanosleep),
    any(restart_syscall), // A sleep that was interrupted by a stop and continued.
    any(sched_yield),
    any(getrandom), // Rust's hash maps are seeded by each thread.
    any(rt_sigprocmask),
    any(rt_sigreturn),
    any(sigaltstack), // The stack of a thread's overflow handler comes and goes with the thread.
    any(gettid),
    any(getpid),
    own_process(tgkill, 0), // Threads of this program signal each other; abort.
    any(exit),
    any(exit_group),
];

/// What starting threads takes, and confining them: they start with the filter of the one that starts them and then get their own.
pub const THREADS: &[Rule] = &[
    any(clone3),
    // Where clone3 is refused, as by some containers and by systemd's `RestrictNamespaces=`. The flags are those of
    // pthread_create, so no process and no namespace can be made by it.
    one_of(clone, 0, &[THREAD_FLAGS as u64]),
    any(set_robust_list),
    any(rseq),
    any(sched_getaffinity), // The C library asks for it to find a new thread's stack.
    one_of(prctl, 0, &[libc::PR_SET_NAME as u64, libc::PR_SET_NO_NEW_PRIVS as u64]),
    one_of(seccomp, 0, &[libc::SECCOMP_SET_MODE_FILTER as u64]), // More filters can only forbid more.
];

const THREAD_FLAGS: libc::c_int = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;

/// What `started` may do and its `starter`, whose filter it inherits, may not.
pub fn exceeds(started: impl super::Role, starter: impl super::Role) -> Vec<Rule> {
    let allows = |rule: &Rule| {
        starter.rules().any(|wide| {
            wide.call == rule.call
                && match (wide.when, rule.when) {
                    (When::Always, _) => true,
                    (When::OneOf(at, wide), When::OneOf(argument, values)) => {
                        at == argument && values.iter().all(|value| wide.contains(value))
                    }
                    (wide, when) => wide == when,
                }
        })
    };
    started.rules().filter(|rule| !allows(rule)).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::super::Role;
    use super::*;

    #[derive(Clone, Copy)]
    struct Of(&'static [Rule]);

    impl Role for Of {
        const ALL: &'static [Self] = &[];

        fn name(self) -> &'static str {
            "test"
        }

        fn rules(self) -> impl Iterator<Item = &'static Rule> {
            self.0.iter()
        }
    }

    #[test]
    fn what_a_starter_lacks_is_found() {
        const WIDE: Of = Of(&[any(read), one_of(ioctl, 1, &[1, 2]), without(mmap, 2, 4)]);
        const NARROW: Of = Of(&[one_of(read, 0, &[0]), one_of(ioctl, 1, &[2])]);
        assert_eq!(exceeds(NARROW, WIDE), []);
        assert_eq!(exceeds(WIDE, NARROW), WIDE.0);
        const OTHER: Of = Of(&[one_of(ioctl, 2, &[2]), any(mmap), any(write)]);
        assert_eq!(exceeds(OTHER, WIDE), OTHER.0);
    }
}
