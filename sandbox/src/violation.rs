//! A forbidden system call: the kernel does not make it and sends SIGSYS to the thread instead. The handler here says which
//! call it was, does the program's last act, and ends the process.
//!
//! It runs in the middle of anything, perhaps while the thread holds the lock of the allocator or of standard error, so it only
//! formats into a buffer on its stack and makes system calls that every role may make.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::io;
use std::sync::OnceLock;

use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

use super::Program;

/// Exit status of a process that made a forbidden call: 128 + SIGSYS, as a shell shows the signal itself.
pub const EXIT_STATUS: u8 = 128 + libc::SIGSYS as u8;

/// Who ends.
static PROGRAM: OnceLock<Program> = OnceLock::new();

thread_local! {
    /// Without a destructor and known at compile time, so the handler can read it at any moment.
    static ROLE: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// What the message calls this thread.
pub(super) fn name_thread(role: &'static str) {
    ROLE.set(Some(role));
}

/// Installs the handler.
pub(super) fn install_handler(program: Program) -> io::Result<()> {
    let _ = PROGRAM.set(program);
    register_signal_handler(libc::SIGSYS, forbidden).map_err(io::Error::from)
}

/// The name of the system call `number`.
pub(super) fn call_name(number: c_int) -> &'static str {
    usize::try_from(number).ok().and_then(Sysno::new).map_or("unknown", |call| call.name())
}

/// Where `siginfo_t` has the number of the call, in words of 4 bytes: after signal, error, code, padding and the address
/// of the call (`_sigsys` in the kernel's uapi/asm-generic/siginfo.h).
const CALL_WORD: usize = 6;

extern "C" fn forbidden(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a whole siginfo_t, which is 128 bytes, to a handler installed with SA_SIGINFO.
    let number = unsafe { info.cast::<c_int>().add(CALL_WORD).read() };
    let role = ROLE.get().unwrap_or("unnamed");
    let mut line = Line::default();
    let program = PROGRAM.get();
    for part in [
        program.map_or("", |program| program.name),
        ": the ",
        role,
        " thread made the forbidden system call ",
        call_name(number),
        " (",
    ] {
        line.push(part.as_bytes());
    }
    line.push_number(number.unsigned_abs());
    line.push(b"); this is a bug or an attack, --seccomp log runs on\n");
    if let Some(program) = program {
        (program.last_act)();
    }
    let bytes = line.bytes();
    // SAFETY: the bytes are on this stack, and both calls are safe in a signal handler; nothing is left to do if they fail.
    unsafe {
        libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len());
        libc::_exit(EXIT_STATUS.into());
    }
}

/// A line of text that needs no allocator; what does not fit is cut off.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 256], length: 0 }
    }
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(self.length).zip(text) {
            *to = *from;
            self.length += 1;
        }
    }

    fn push_number(&mut self, number: u32) {
        let mut divisor = 1;
        while number / divisor >= 10 {
            divisor *= 10;
        }
        while divisor > 0 {
            self.push(&[b'0' + (number / divisor % 10) as u8]);
            divisor /= 10;
        }
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_full_and_long_lines_cut_off() {
        for number in [0, 7, 10, 59, 435, u32::MAX] {
            let mut line = Line::default();
            line.push_number(number);
            assert_eq!(line.bytes(), number.to_string().as_bytes());
        }
        let mut line = Line::default();
        line.push(&[b'x'; 300]);
        assert_eq!(line.bytes(), [b'x'; 256]);
    }
}
