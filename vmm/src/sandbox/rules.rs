//! The system calls each thread may make: the one place where they are listed.
//!
//! What is needed only before the VM runs (opening files, making the VM, connecting) is not here: filters come after that.
//! A call that is not plain says why it is here. `ioctl` is limited by its request.

use std::fmt;

use ivcpu_sandbox::Role as _;
use ivcpu_sandbox::Sysno::*;
use ivcpu_sandbox::{EVERY_THREAD, Rule, THREADS, any, one_of};
use kvm_bindings as kvm;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The main thread: the event loop, the host's interrupts, the end of the VM.
    Main,
    /// A vCPU, the IVCPU included.
    Vcpu,
    /// A disk's own thread, which serves its queues with an io_uring.
    Disk,
    /// Looks for a vhost-user backend that was lost.
    Reconnect,
    /// Gives up a vhost-user backend that does not answer.
    Deadline,
    /// Reads the console's input.
    Console,
    /// Serves the API socket.
    Api,
}

impl ivcpu_sandbox::Role for Role {
    const ALL: &'static [Self] =
        &[Self::Main, Self::Vcpu, Self::Disk, Self::Reconnect, Self::Deadline, Self::Console, Self::Api];

    fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Vcpu => "vCPU",
            Self::Disk => "disk",
            Self::Reconnect => "vhost-user reconnect",
            Self::Deadline => "vhost-user deadline",
            Self::Console => "console",
            Self::Api => "API",
        }
    }

    fn rules(self) -> impl Iterator<Item = &'static Rule> {
        let own: &[&[Rule]] = match self {
            Self::Main => &[MAIN, THREADS, CONNECT, VHOST_USER, FILES, MACHINE, TEARDOWN],
            Self::Vcpu => &[VCPU, VHOST_USER, MACHINE],
            Self::Disk => &[DISK],
            Self::Reconnect => &[THREADS, CONNECT, VHOST_USER],
            Self::Deadline => &[DEADLINE],
            Self::Console => &[CONSOLE],
            Self::Api => &[API, VHOST_USER],
        };
        [EVERY_THREAD, TERMINAL].iter().chain(own).flat_map(|list| list.iter())
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Gives the terminal back before the process ends. The C library reads it back; a newer one has a request of its own.
const TERMINAL: &[Rule] = &[one_of(ioctl, 1, &[libc::TCSETS, libc::TCGETS, libc::TCSETS2, libc::TCGETS2])];

/// The event loop.
const MAIN: &[Rule] =
    &[any(epoll_wait), any(epoll_pwait), any(epoll_ctl), any(poll), any(timerfd_settime), any(eventfd2)];

/// Host interrupts come and go while the VM runs (`affinity.rs`), the count of exits is read and its tracing instance
/// removed at the end, and the API's socket with it. Which files, landlock says.
const FILES: &[Rule] = &[
    any(openat),
    any(statx),
    any(newfstatat),
    any(fstat),
    any(getdents64),
    any(readlink),
    any(readlinkat),
    any(lseek),
    any(pread64),
    any(flock), // The journal of moved interrupts is locked.
    any(mkdir),
    any(unlink),
    any(rmdir),
];

/// Messages to a vhost-user backend with files in them, over a connection that is there.
const VHOST_USER: &[Rule] = &[
    any(sendmsg),
    any(recvmsg),
    any(sendto),
    any(recvfrom),
    any(shutdown),
    one_of(fcntl, 1, &[libc::F_DUPFD_CLOEXEC as u64, libc::F_GETFL as u64, libc::F_SETFL as u64]),
];

/// What a guest changes of its machine by programming devices, from a vCPU or (after a reconnect) the main thread.
const MACHINE: &[Rule] = &[
    one_of(
        ioctl,
        1,
        &[
            kvm_write::<kvm::kvm_irqfd>(0x76), // KVM_IRQFD: a vector is masked or not.
            kvm_write::<kvm::kvm_ioeventfd>(0x79), // KVM_IOEVENTFD: a notify address moves.
            kvm_write::<kvm::kvm_irq_routing>(0x6a), // KVM_SET_GSI_ROUTING: a vector's message.
            kvm_write::<kvm::kvm_userspace_memory_region>(0x46), // KVM_SET_USER_MEMORY_REGION: a BAR moves.
            vfio(10),                          // VFIO_DEVICE_SET_IRQS
            vfio(11),                          // VFIO_DEVICE_RESET
        ],
    ),
    any(eventfd2), // A queue's kick and call are made when the driver sets it up.
    any(pread64),  // Registers and configuration of a passed-through function.
    any(pwrite64),
    any(timerfd_settime), // What the serial console holds back is written out a little later.
];

/// What is undone before the process ends.
const TEARDOWN: &[Rule] = &[one_of(
    ioctl,
    1,
    &[
        kvm_write::<kvm::kvm_device_attr>(0xe1), // KVM_SET_DEVICE_ATTR: a group leaves KVM's VFIO device.
        vfio(5),                                 // VFIO_GROUP_UNSET_CONTAINER
        vfio(14),                                // VFIO_IOMMU_UNMAP_DMA
    ],
)];

const VCPU: &[Rule] = &[one_of(
    ioctl,
    1,
    &[
        kvm_none(0x80),                  // KVM_RUN
        kvm_none(0xad),                  // KVM_KVMCLOCK_CTRL: the guest's watchdogs forgive a pause.
        kvm_read::<kvm::kvm_regs>(0x81), // KVM_GET_REGS, for the message when KVM cannot go on.
    ],
)];

/// Waiting for kicks, and handing requests to an io_uring, which is set up before the filter.
const DISK: &[Rule] = &[any(poll), any(io_uring_enter)];

/// Connecting to a backend anew, for the thread that does and the main thread, which starts that. Landlock keeps it
/// from sockets of the abstract kind, and there is no other family.
const CONNECT: &[Rule] = &[one_of(socket, 0, &[libc::AF_UNIX as u64]), any(connect)];

const DEADLINE: &[Rule] = &[any(shutdown)];

const CONSOLE: &[Rule] = &[any(poll)];

/// One connection after the other, with time limits. Backends are told of a pause. KVM's statistics and the counts of exits are files that are open.
const API: &[Rule] = &[
    any(accept4),
    any(recvfrom),
    any(sendto),
    any(shutdown),
    any(pread64),
    // The limits on how long a peer may take.
    one_of(setsockopt, 2, &[libc::SO_RCVTIMEO as u64, libc::SO_SNDTIMEO as u64]),
];

const KVMIO: u8 = kvm::KVMIO as u8;

const fn kvm_none(number: u8) -> u64 {
    nix::request_code_none!(KVMIO, number)
}

const fn kvm_read<T>(number: u8) -> u64 {
    nix::request_code_read!(KVMIO, number, size_of::<T>())
}

const fn kvm_write<T>(number: u8) -> u64 {
    nix::request_code_write!(KVMIO, number, size_of::<T>())
}

/// `_IO(VFIO_TYPE, VFIO_BASE + number)`
const fn vfio(number: u8) -> u64 {
    nix::request_code_none!(b';', 100 + number)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ivcpu_sandbox::{Sysno, When, exceeds};

    use super::*;

    fn calls(role: Role) -> BTreeSet<Sysno> {
        role.rules().map(|rule| rule.call).collect()
    }

    #[test]
    fn requests_are_the_kernels_numbers() {
        assert_eq!(kvm_none(0x80), 0xae80);
        assert_eq!(kvm_none(0xad), 0xaead);
        assert_eq!(kvm_write::<kvm::kvm_irqfd>(0x76), 0x4020_ae76);
        assert_eq!(kvm_write::<kvm::kvm_ioeventfd>(0x79), 0x4040_ae79);
        assert_eq!(kvm_write::<kvm::kvm_irq_routing>(0x6a), 0x4008_ae6a);
        assert_eq!(kvm_write::<kvm::kvm_userspace_memory_region>(0x46), 0x4020_ae46);
        assert_eq!(kvm_write::<kvm::kvm_device_attr>(0xe1), 0x4018_aee1);
        assert_eq!(kvm_read::<kvm::kvm_regs>(0x81), 0x8090_ae81);
        assert_eq!(vfio(10), 0x3b6e);
    }

    #[test]
    fn nobody_executes_programs_traces_or_makes_network_sockets() {
        for &role in Role::ALL {
            for call in
                [execve, execveat, fork, vfork, ptrace, process_vm_writev, bpf, init_module, mount, setuid]
            {
                assert!(!calls(role).contains(&call), "{role}: {call}");
            }
            let sockets = role.rules().filter(|rule| rule.call == socket);
            for rule in sockets {
                assert!(matches!(rule.when, When::OneOf(0, [family]) if *family == libc::AF_UNIX as u64));
            }
        }
    }

    #[test]
    fn only_the_main_thread_opens_files() {
        for &role in Role::ALL {
            assert_eq!(calls(role).contains(&openat), role == Role::Main, "{role}");
        }
    }

    /// A thread starts with the filter of its starter, which must not forbid what it needs.
    #[test]
    fn whoever_starts_a_thread_may_do_what_that_does() {
        assert_eq!(exceeds(Role::Reconnect, Role::Main), []);
        assert_eq!(exceeds(Role::Deadline, Role::Reconnect), []);
    }
}
