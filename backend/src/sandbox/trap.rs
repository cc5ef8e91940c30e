//! The end of a program that made a forbidden system call: one line that names it, and a status of its own.

use std::ffi::{c_int, c_void};

use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

/// The program's exit status then: 128 + SIGSYS, what a shell shows for a program that the signal killed.
pub const EXIT_STATUS: i32 = 128 + libc::SIGSYS;

/// Bytes of a thread's name, its final zero included.
const THREAD_NAME: usize = 16;

/// The part of the kernel's `siginfo_t` that SIGSYS fills in (`include/uapi/asm-generic/siginfo.h`).
#[repr(C)]
struct Information {
    signal: c_int,
    error: c_int,
    code: c_int,
    _padding: c_int,
    call_address: *mut c_void,
    system_call: c_int,
    architecture: u32,
}

/// Installs the handler.
pub(super) fn install() -> vmm_sys_util::errno::Result<()> {
    register_signal_handler(libc::SIGSYS, on_forbidden_call)
}

/// Says what was forbidden and ends the program. It allocates nothing, takes no lock and makes only system calls that
/// every filter allows.
extern "C" fn on_forbidden_call(_: c_int, information: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a whole `siginfo_t`, which is longer than `Information`, and has filled in its part for
    // SIGSYS.
    let number = unsafe { (*information.cast::<Information>()).system_call };
    let name = usize::try_from(number).ok().and_then(Sysno::new).map_or("unknown", |call| call.name());
    let mut thread = [0u8; THREAD_NAME];
    // SAFETY: the call writes at most 16 bytes, as many as there is room for.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    let thread = thread.split(|byte| *byte == 0).next().unwrap_or_default();
    let mut line = Line::default();
    for part in
        [b"ivcpu-backend: thread ".as_slice(), thread, b" made the system call ", name.as_bytes(), b" ("]
    {
        line.add(part);
    }
    line.add_number(number.unsigned_abs());
    line.add(b"), which its filter forbids, and the program ends: please report it; --seccomp log goes on\n");
    // SAFETY: the line is `length` bytes long at least; nobody else uses it.
    unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.length) };
    // SAFETY: it ends the process at once and runs nothing of ours.
    unsafe { libc::_exit(EXIT_STATUS) }
}

/// A line on the stack; what does not fit is left out.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Line { bytes: [0; 256], length: 0 }
    }
}

impl Line {
    fn add(&mut self, part: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(self.length).zip(part) {
            *to = *from;
            self.length += 1;
        }
    }

    fn add_number(&mut self, mut number: u32) {
        let mut digits = [0u8; 10];
        let mut count = 0;
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
            count += 1;
            if number == 0 {
                break;
            }
        }
        self.add(digits.get(digits.len() - count..).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_takes_numbers_and_no_more_than_it_can_hold() {
        let mut line = Line::default();
        for number in [0, 7, 257, u32::MAX] {
            line.add_number(number);
            line.add(b" ");
        }
        assert_eq!(&line.bytes[..line.length], b"0 7 257 4294967295 ");
        line.add(&[b'x'; 1000]);
        assert_eq!(line.length, 256);
        line.add(b"more");
        assert_eq!(line.length, 256);
    }
}
