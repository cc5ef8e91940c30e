//! `--seccomp log`: a thread that is told of each call outside the rules, says its name once, and lets it be made.
//!
//! The kernel stops the calling thread and notifies whoever holds the filter's listener (seccomp_unotify(2)); that one answers
//! "continue". A thread that inherits such a filter cannot have a listener of its own: its calls outside its own role, but
//! inside its starter's, are in the kernel's log only.

use std::collections::BTreeSet;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use seccompiler::sock_filter;

use super::{Program, violation};

/// Takes the filters' listeners. A pipe, because a thread under a filter may write to one, whatever its role.
#[derive(Debug)]
pub(super) struct Witness(PipeWriter);

impl Witness {
    /// Starts the thread for the roles `names`.
    pub(super) fn start(program: Program, names: Vec<&'static str>) -> io::Result<Self> {
        let (listeners, witness) = io::pipe()?;
        thread::Builder::new().name("seccomp-log".into()).spawn(move || {
            if let Err(error) = watch(listeners, program, &names) {
                tracing::error!("the seccomp log ends, and threads that leave their rules hang: {error}");
            }
        })?;
        Ok(Self(witness))
    }

    /// Gives the calling thread a filter that asks here, that of the role with this number; fails where one of its starters has
    /// one.
    pub(super) fn install(&self, number: usize, program: &[sock_filter]) -> io::Result<()> {
        let number = u8::try_from(number).map_err(io::Error::other)?;
        let program = libc::sock_fprog {
            len: u16::try_from(program.len()).map_err(io::Error::other)?,
            filter: program.as_ptr().cast_mut().cast(),
        };
        let (operation, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
        // SAFETY: the kernel copies the instructions, whose layout is its own (`sock_filter` is repr(C)), and keeps no pointer.
        let listener = unsafe { libc::syscall(libc::SYS_seccomp, operation, flags, &raw const program) };
        if listener < 0 {
            return Err(io::Error::last_os_error());
        }
        let [first, second, third, fourth] = (listener as RawFd).to_ne_bytes();
        (&self.0).write_all(&[number, first, second, third, fourth])
    }
}

/// A role's number, and the listener's: the other thread has the same files.
const MESSAGE: usize = 1 + size_of::<RawFd>();

mod ioctl {
    //! `SECCOMP_IOCTL_NOTIF_RECV` and `SECCOMP_IOCTL_NOTIF_SEND`.
    #![allow(missing_docs, reason = "the macros write the functions")]
    nix::ioctl_readwrite!(receive, b'!', 0, libc::seccomp_notif);
    nix::ioctl_readwrite!(send, b'!', 1, libc::seccomp_notif_resp);
}

fn watch(mut pipe: PipeReader, program: Program, names: &[&'static str]) -> io::Result<()> {
    let mut listeners: Vec<(&'static str, OwnedFd)> = Vec::new();
    let mut said = BTreeSet::new();
    loop {
        let files = std::iter::once(pipe.as_fd()).chain(listeners.iter().map(|(_, file)| file.as_fd()));
        let mut files: Vec<_> = files.map(|file| PollFd::new(file, PollFlags::POLLIN)).collect();
        match poll(&mut files, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let events: Vec<_> = files.iter().map(|file| file.revents().unwrap_or(PollFlags::empty())).collect();
        let (from_pipe, of_listeners) = events.split_at(1);
        for ((role, listener), events) in listeners.iter().zip(of_listeners) {
            if events.contains(PollFlags::POLLIN) {
                answer(program, role, listener, &mut said);
            }
        }
        // Nobody has the filter any more.
        let mut ended = of_listeners.iter().map(|events| events.contains(PollFlags::POLLHUP));
        listeners.retain(|_| !ended.next().unwrap_or(false));
        if from_pipe.iter().any(|events| events.contains(PollFlags::POLLIN)) {
            let mut message = [0; MESSAGE];
            pipe.read_exact(&mut message)?;
            let [role, number @ ..] = message;
            let role = names.get(usize::from(role)).copied().unwrap_or_default();
            // SAFETY: the kernel made the descriptor for `install`, which gave its number away here and nowhere else.
            let listener = unsafe { OwnedFd::from_raw_fd(RawFd::from_ne_bytes(number)) };
            listeners.push((role, listener));
        }
    }
}

/// Says which call it is, the first time, and lets it be made.
fn answer(
    program: Program,
    role: &'static str,
    listener: &OwnedFd,
    said: &mut BTreeSet<(&'static str, i32)>,
) {
    // SAFETY: plain numbers, of which zero is one; the kernel wants them to be zero.
    let mut request: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes a whole `seccomp_notif` to where the pointer leads.
    if unsafe { ioctl::receive(listener.as_raw_fd(), &mut request) }.is_err() {
        // The thread is gone.
        return;
    }
    let number = request.data.nr;
    if said.insert((role, number)) {
        let name = violation::call_name(number);
        // Nobody can be told if standard error is gone.
        let _ = writeln!(
            io::stderr(),
            "{}: the {role} thread made the system call {name} ({number}), which --seccomp true forbids",
            program.name
        );
    }
    let flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
    let mut answer = libc::seccomp_notif_resp { id: request.id, val: 0, error: 0, flags };
    // SAFETY: the kernel reads a whole `seccomp_notif_resp`. If it fails the thread is gone.
    let _ = unsafe { ioctl::send(listener.as_raw_fd(), &mut answer) };
}
