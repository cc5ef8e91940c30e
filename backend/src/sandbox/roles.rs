//! The system calls that each thread may make: the one place where they are listed.

use ivcpu_sandbox::Sysno::*;
use ivcpu_sandbox::{EVERY_THREAD, Rule, THREADS, any, one_of};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The program's first thread and the one that waits for signals.
    Main,
    /// Shows counters.
    Show,
    /// Serves a port's frontends, and starts the four kinds below.
    Port,
    /// Passes a frontend's messages on.
    Door,
    /// Handles a frontend's messages.
    Messages,
    /// The vhost-user-backend crate's worker: wakes poll threads.
    Rings,
    /// Moves frames.
    Poll,
}

impl ivcpu_sandbox::Role for Role {
    const ALL: &'static [Self] =
        &[Self::Main, Self::Show, Self::Port, Self::Door, Self::Messages, Self::Rings, Self::Poll];

    fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Show => "counters",
            Self::Port => "port",
            Self::Door => "door",
            Self::Messages => "messages",
            Self::Rings => "rings",
            Self::Poll => "poll",
        }
    }

    fn rules(self) -> impl Iterator<Item = &'static Rule> {
        let own: &[&[Rule]] = match self {
            Self::Main => &[MAIN],
            Self::Show => &[SHOW],
            Self::Port => &[PORT, THREADS, DOOR, MESSAGES, RINGS, POLL],
            Self::Door => &[DOOR],
            Self::Messages => &[MESSAGES],
            Self::Rings => &[RINGS],
            Self::Poll => &[POLL],
        };
        [EVERY_THREAD, ALL].iter().chain(own).flat_map(|list| list.iter())
    }
}

/// What all threads do besides what every thread of any program does.
const ALL: &[Rule] = &[
    any(nanosleep),
    // Guest memory that was lost: the handler may have to go.
    any(rt_sigaction),
    // The handler of SIGTERM, which may run on any thread, tells the thread that waits for signals by it.
    any(sendto),
    // Descriptors: their flags, and a copy.
    one_of(fcntl, 1, &[libc::F_GETFL as u64, libc::F_SETFL as u64, libc::F_DUPFD_CLOEXEC as u64]),
];

const MAIN: &[Rule] = &[
    any(connect),
    any(newfstatat),
    any(poll),
    any(ppoll),
    any(recvfrom),
    any(recvmsg),
    any(shutdown),
    any(statx),
    any(unlink),
    any(unlinkat),
    one_of(socket, 0, &[libc::AF_UNIX as u64]),
];

const SHOW: &[Rule] = &[
    any(accept4),
    any(poll),
    any(recvfrom),
    any(setsockopt),
    any(shutdown),
    one_of(getsockopt, 1, &[libc::SOL_SOCKET as u64]),
];

const DOOR: &[Rule] = &[
    any(poll),
    any(ppoll),
    any(recvfrom),
    any(recvmsg),
    any(sendmsg),
    any(shutdown),
    one_of(ioctl, 1, &[libc::FIONBIO]),
];

const MESSAGES: &[Rule] = &[
    any(epoll_ctl),
    any(eventfd2),
    any(fstat),
    any(lseek),
    any(newfstatat),
    any(recvfrom),
    any(recvmsg),
    any(sendmsg),
    any(shutdown),
    any(statx),
    // What a TAP device is told.
    one_of(ioctl, 1, &[libc::TUNSETOFFLOAD, libc::TUNSETVNETHDRSZ, libc::FIONBIO]),
];

const RINGS: &[Rule] = &[any(epoll_ctl), any(epoll_pwait), any(epoll_wait)];

const POLL: &[Rule] = &[
    any(io_uring_enter),
    any(poll),
    any(ppoll),
    any(readv),
    any(shutdown),
    any(writev),
    // A TAP's queue goes in and out of use.
    one_of(ioctl, 1, &[libc::TUNSETQUEUE]),
];

/// What a port does besides what the threads do that it starts: it takes connections, opens the FIFO region, starts
/// threads, and has them pinned and confined.
const PORT: &[Rule] = &[
    any(accept4),
    any(connect),
    any(epoll_create1),
    any(getsockname),
    any(openat),
    any(sched_setaffinity),
    any(setsockopt),
    any(socketpair),
    // A lock on a FIFO region.
    one_of(fcntl, 1, &[libc::F_OFD_SETLK as u64]),
    one_of(getsockopt, 1, &[libc::SOL_SOCKET as u64]),
    one_of(socket, 0, &[libc::AF_UNIX as u64]),
];

#[cfg(test)]
mod tests {
    use ivcpu_sandbox::{Role as _, When, exceeds};

    use super::*;

    #[test]
    fn a_ports_filter_allows_what_its_threads_may() {
        for role in [Role::Door, Role::Messages, Role::Rings, Role::Poll] {
            assert_eq!(exceeds(role, Role::Port), [], "{role:?}");
        }
    }

    #[test]
    fn no_role_may_start_a_program_or_open_the_network() {
        for &role in Role::ALL {
            let rules: Vec<_> = role.rules().collect();
            let may = |call| rules.iter().any(|rule| rule.call == call);
            for call in [execve, execveat, ptrace, bpf, bind] {
                assert!(!may(call), "{role:?}");
            }
            assert_eq!(may(openat), role == Role::Port);
            for rule in &rules {
                let limited = rule.when != When::Always;
                assert!(
                    limited || ![mmap, mprotect, tgkill, socket].contains(&rule.call),
                    "{role:?}: {rule:?}"
                );
            }
        }
    }
}
