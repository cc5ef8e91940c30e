//! The sandbox: what is in it, and what becomes of whoever leaves it.

mod guest;

use std::io::Read;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use guest::kernel::{has_kvm, image};
use guest::{CHATTER, Vmm, wait_until};
use ivcpu_sandbox::Role as _;
use ivcpu_vmm::sandbox::{self, Role, SandboxOptions, Seccomp, violation};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, dup2_stderr, fork};

/// What a child under the filter of `role` says and how it ends when it does `work`, which ends it with status 0 otherwise.
fn confined(role: Role, seccomp: Seccomp, work: fn()) -> (i32, String) {
    // One at a time: no other thread of this program holds a lock that the child would find locked for ever.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut reader, writer) = std::io::pipe().unwrap();
    // SAFETY: the child is this thread alone. It takes no lock that another one may have held: it uses the allocator, which
    // the C library keeps usable, and the sandbox, which no other thread of this program does.
    let child = match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            dup2_stderr(&writer).unwrap();
            let confined =
                sandbox::arm(SandboxOptions { seccomp, landlock: false }).and_then(|()| sandbox::enter(role));
            let status = match confined {
                Ok(()) => {
                    work();
                    0
                }
                Err(_) => 1,
            };
            // SAFETY: ends the process; nothing of the parent's is torn down twice.
            unsafe { libc::_exit(status) }
        }
        ForkResult::Parent { child } => child,
    };
    drop(writer);
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    match waitpid(child, None).unwrap() {
        WaitStatus::Exited(_, status) => (status, said),
        other => panic!("{role}: {other:?}, {said}"),
    }
}

fn make_internet_socket() {
    // SAFETY: a system call without pointers.
    unsafe { libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0) };
}

fn make_memory_executable() {
    let protection = libc::PROT_READ | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping that nothing else knows of.
    unsafe { libc::syscall(libc::SYS_mmap, 0, 4096, protection, flags, -1, 0) };
}

fn make_a_vm() {
    // SAFETY: no file has this number; KVM_CREATE_VM has no pointer.
    unsafe { libc::syscall(libc::SYS_ioctl, 999, 0xae01, 0) };
}

fn signal_another_process() {
    // SAFETY: a system call without pointers; signal 0 asks whether there is such a thread.
    unsafe { libc::syscall(libc::SYS_tgkill, 1, 1, 0) };
}

#[test]
fn a_forbidden_call_ends_the_process_and_its_name_is_said() {
    for &role in Role::ALL {
        for (work, name, number) in [
            (make_internet_socket as fn(), "socket", 41),
            (make_memory_executable, "mmap", 9),
            (make_a_vm, "ioctl", 16),
            (signal_another_process, "tgkill", 234),
        ] {
            let (status, said) = confined(role, Seccomp::True, work);
            assert_eq!(status, i32::from(violation::EXIT_STATUS), "{role}, {name}: {said}");
            let expected =
                format!("ivcpu-vmm: the {role} thread made the forbidden system call {name} ({number});");
            assert!(said.starts_with(&expected) && said.lines().count() == 1, "{said}");
        }
    }
}

#[test]
fn a_call_is_made_where_it_is_only_logged_or_not_looked_at() {
    fn work() {
        for _ in 0..3 {
            std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        }
    }
    assert_eq!(confined(Role::Vcpu, Seccomp::False, work), (0, String::new()));
    let (status, said) = confined(Role::Vcpu, Seccomp::Log, work);
    assert_eq!((status, said.matches("\n").count()), (0, 2), "each is said once: {said}");
    for call in ["socket (41)", "bind (49)"] {
        let line =
            format!("ivcpu-vmm: the vCPU thread made the system call {call}, which --seccomp true forbids\n");
        assert!(said.contains(&line), "{said}");
    }
}

#[test]
fn what_every_thread_needs_is_allowed() {
    fn work() {
        let mut map = std::collections::HashMap::new();
        for number in 0..100_000u64 {
            map.insert(number, vec![0u8; 64]);
        }
        assert_eq!(std::hint::black_box(map).len(), 100_000);
        let _ = std::panic::catch_unwind(|| panic!("a panic is said"));
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    for &role in Role::ALL {
        let (status, said) = confined(role, Seccomp::True, work);
        assert_eq!(status, 0, "{role}: {said}");
    }
}

#[test]
fn a_thread_may_start_the_next_one() {
    fn work() {
        let deadline = || std::thread::spawn(|| sandbox::enter(Role::Deadline).unwrap()).join().unwrap();
        let reconnect = move || {
            sandbox::enter(Role::Reconnect).unwrap();
            deadline();
        };
        std::thread::Builder::new().name("reconnect".into()).spawn(reconnect).unwrap().join().unwrap();
    }
    assert_eq!(confined(Role::Main, Seccomp::True, work), (0, String::new()));
}

/// A line of each thread's /proc/PID/task/TID/status.
fn of_threads(vmm: &Vmm, line: &str) -> Vec<(String, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vmm.0.id())).unwrap();
    tasks
        .filter_map(|task| {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).ok()?;
            let value =
                |key: &str| Some(status.lines().find_map(|line| line.strip_prefix(key))?.trim().to_owned());
            Some((value("Name:")?, value(line)?))
        })
        .collect()
}

#[test]
fn every_thread_of_a_vm_is_confined_unless_it_is_asked_not_to() {
    if !has_kvm("every_thread_of_a_vm_is_confined_unless_it_is_asked_not_to") {
        return;
    }
    let kernel = image(&CHATTER);
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api");
    let words = ["--serial", "null", "--cpus", "boot=2", "--api-socket", socket.to_str().unwrap()];
    let all_are = |vmm: &Vmm, line: &str, wanted: &str| {
        let threads = of_threads(vmm, line);
        let there = |name: &str| threads.iter().any(|(thread, _)| thread == name);
        ["vcpu0", "vcpu1", "api"].into_iter().all(there) && threads.iter().all(|(_, value)| value == wanted)
    };
    let mut vmm = Vmm::start(kernel.path(), &words);
    wait_until("every thread has a filter", || all_are(&vmm, "Seccomp:", "2"));
    assert!(all_are(&vmm, "NoNewPrivs:", "1"));
    kill(Pid::from_raw(vmm.0.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(vmm.status(), Some(130), "the end is allowed too");

    let unconfined = [&words[..], &["--seccomp", "false", "--landlock", "false"]].concat();
    let vmm = Vmm::start(kernel.path(), &unconfined);
    let outside = std::fs::read_to_string("/proc/self/status").unwrap();
    let ours = outside.lines().find_map(|line| line.strip_prefix("Seccomp:")).unwrap().trim();
    wait_until("every thread is as free as this one", || all_are(&vmm, "Seccomp:", ours));
    assert_eq!(reader_of(&vmm), None, "nothing to say");
}

/// What a running VMM has written to standard error, if anything.
fn reader_of(vmm: &Vmm) -> Option<String> {
    let stderr = vmm.0.stderr.as_ref()?;
    let mut waiting = 0;
    // SAFETY: FIONREAD writes one int to where the pointer leads.
    let done = unsafe { libc::ioctl(stderr.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
    (done == 0 && waiting > 0).then(|| format!("{waiting} bytes"))
}
