//! System-call filters, one a role.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, BpfProgramRef, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::{Error, SeccompMode};

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

const ROLES: [Role; 7] =
    [Role::Main, Role::Show, Role::Port, Role::Door, Role::Messages, Role::Rings, Role::Poll];

/// What every thread may: memory that cannot be executed, locks, time, its own end, reading and writing what is open.
const ANY: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    // Guest memory that was lost: the handler may have to go.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    // The handler of SIGTERM, which may run on any thread, tells the thread that waits for signals by it.
    libc::SYS_sendto,
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

const MAIN: &[i64] = &[
    libc::SYS_connect,
    libc::SYS_newfstatat,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

const SHOW: &[i64] =
    &[libc::SYS_accept4, libc::SYS_poll, libc::SYS_recvfrom, libc::SYS_setsockopt, libc::SYS_shutdown];

const DOOR: &[i64] = &[
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
];

const MESSAGES: &[i64] = &[
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_statx,
];

const RINGS: &[i64] = &[libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_wait];

const POLL: &[i64] = &[
    libc::SYS_io_uring_enter,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_readv,
    libc::SYS_shutdown,
    libc::SYS_writev,
];

/// What a port does besides what the threads do that it starts: it takes connections, opens the FIFO region, starts
/// threads, and has them pinned and confined.
const PORT: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_clone3,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_getsockname,
    libc::SYS_openat,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_socketpair,
];

/// System calls that are allowed with some values of one argument: number, argument, and values that it must equal.
type Limited = (i64, u8, &'static [u64]);

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;

/// Descriptors: their flags, and a copy. Locks on a FIFO region: a port's alone.
const FCNTL: Limited = (
    libc::SYS_fcntl,
    1,
    &[libc::F_GETFD as u64, libc::F_GETFL as u64, libc::F_SETFL as u64, libc::F_DUPFD_CLOEXEC as u64],
);
const FCNTL_LOCK: Limited = (libc::SYS_fcntl, 1, &[libc::F_OFD_SETLK as u64]);
/// What a TAP device is told: by messages, and by a poll thread that takes its queue in and out of use.
const IOCTL_OFFLOADS: Limited =
    (libc::SYS_ioctl, 1, &[libc::TUNSETOFFLOAD, libc::TUNSETVNETHDRSZ, libc::FIONBIO]);
const IOCTL_QUEUE: Limited = (libc::SYS_ioctl, 1, &[libc::TUNSETQUEUE]);
const IOCTL_NONBLOCK: Limited = (libc::SYS_ioctl, 1, &[libc::FIONBIO]);
/// The name of a thread, read when a forbidden call is named.
const PRCTL_NAME: Limited = (libc::SYS_prctl, 0, &[libc::PR_GET_NAME as u64]);
/// The start of a thread: its name, and the filter it puts on.
const PRCTL_START: Limited =
    (libc::SYS_prctl, 0, &[libc::PR_SET_NAME as u64, libc::PR_SET_NO_NEW_PRIVS as u64]);
const SECCOMP_FILTER: Limited = (libc::SYS_seccomp, 0, &[libc::SECCOMP_SET_MODE_FILTER as u64]);
/// A thread as glibc makes it where clone3 is refused: by systemd's `RestrictNamespaces=`, or by containers. The flags are
/// those of pthread_create, so no process and no namespace can be made by it.
const CLONE_THREAD: Limited = (libc::SYS_clone, 0, &[THREAD_FLAGS as u64]);
const THREAD_FLAGS: libc::c_int = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;
const SOCKET_UNIX: Limited = (libc::SYS_socket, 0, &[libc::AF_UNIX as u64]);
const SOCKET_ERROR: Limited = (libc::SYS_getsockopt, 1, &[libc::SOL_SOCKET as u64]);

impl Role {
    /// What it may, whatever the arguments.
    fn calls(self) -> Vec<i64> {
        let own: &[&[i64]] = match self {
            Role::Main => &[MAIN],
            Role::Show => &[SHOW],
            Role::Port => &[PORT, DOOR, MESSAGES, RINGS, POLL],
            Role::Door => &[DOOR],
            Role::Messages => &[MESSAGES],
            Role::Rings => &[RINGS],
            Role::Poll => &[POLL],
        };
        own.iter().chain(&[ANY]).copied().flatten().copied().collect()
    }

    /// What it may with some arguments.
    fn limited(self) -> Vec<Limited> {
        let own: &[Limited] = match self {
            Role::Main => &[SOCKET_UNIX],
            Role::Show => &[SOCKET_ERROR],
            Role::Port => &[
                CLONE_THREAD,
                FCNTL_LOCK,
                IOCTL_OFFLOADS,
                IOCTL_QUEUE,
                PRCTL_START,
                SECCOMP_FILTER,
                SOCKET_UNIX,
                SOCKET_ERROR,
            ],
            Role::Door => &[IOCTL_NONBLOCK],
            Role::Messages => &[IOCTL_OFFLOADS],
            Role::Rings => &[],
            Role::Poll => &[IOCTL_QUEUE],
        };
        [FCNTL, PRCTL_NAME].iter().chain(own).copied().collect()
    }

    fn rules(self) -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for (call, argument, values) in self.limited() {
            for value in values {
                let same =
                    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?;
                rules.entry(call).or_default().push(SeccompRule::new(vec![same])?);
            }
        }
        // What is mapped, or made something else, can never be executed.
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            let data =
                SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(PROT_EXEC), 0)?;
            rules.insert(call, vec![SeccompRule::new(vec![data])?]);
        }
        // `abort` signals its own process and no other.
        let ourselves = u64::from(std::process::id());
        let own = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, ourselves)?;
        rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![own])?]);
        rules.extend(self.calls().into_iter().map(|call| (call, Vec::new())));
        Ok(rules)
    }
}

/// The filters of all roles, ready to be put on.
#[derive(Debug)]
pub(super) struct Filters {
    /// In the order of [`ROLES`].
    programs: Vec<BpfProgram>,
}

impl Filters {
    pub(super) fn new(mode: SeccompMode) -> Result<Self, Error> {
        let forbidden = match mode {
            SeccompMode::Log => SeccompAction::Log,
            SeccompMode::Enforce | SeccompMode::Off => SeccompAction::Trap,
        };
        let program = |role: Role| -> Result<BpfProgram, Error> {
            let filter = SeccompFilter::new(
                role.rules()?,
                forbidden.clone(),
                SeccompAction::Allow,
                TargetArch::try_from(std::env::consts::ARCH)?,
            )?;
            Ok(filter.try_into()?)
        };
        Ok(Filters { programs: ROLES.into_iter().map(program).collect::<Result<_, _>>()? })
    }

    pub(super) fn program(&self, role: Role) -> BpfProgramRef<'_> {
        self.programs.get(role as usize).map(Vec::as_slice).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ports_filter_allows_what_its_threads_may() {
        let port = Role::Port.rules().unwrap();
        for role in [Role::Door, Role::Messages, Role::Rings, Role::Poll] {
            for (call, rules) in role.rules().unwrap() {
                let wider = port.get(&call).unwrap_or_else(|| panic!("{role:?} may {call}, its port not"));
                assert!(
                    wider.is_empty() || rules.iter().all(|rule| wider.contains(rule)),
                    "{role:?} may more with {call} than its port"
                );
            }
        }
    }

    #[test]
    fn no_role_may_start_a_program_or_open_the_network() {
        for role in ROLES {
            let rules = role.rules().unwrap();
            for call in
                [libc::SYS_execve, libc::SYS_execveat, libc::SYS_ptrace, libc::SYS_bpf, libc::SYS_bind]
            {
                assert!(!rules.contains_key(&call), "{role:?}");
            }
            assert_eq!(rules.contains_key(&libc::SYS_openat), role == Role::Port);
            for call in [libc::SYS_mmap, libc::SYS_mprotect] {
                assert!(!rules[&call].is_empty(), "{role:?} may map memory to be executed");
            }
        }
        assert_eq!(ROLES.map(|role| role as usize), [0, 1, 2, 3, 4, 5, 6]);
    }
}
