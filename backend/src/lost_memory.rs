//! Guest memory that is taken away while it is mapped.
//!
//! Whoever can cut the file of a mapping can have the next access answered by SIGBUS, which would end all ports over
//! what one frontend did to its own. So the page that is missing is replaced by one of zeros, which is no worse than
//! what a driver can write there; the thread that met it remembers, and its session ends. Accesses of the kernel's
//! for us fail with `EFAULT` and need none of this.

use std::cell::Cell;
use std::ffi::{c_int, c_void};

use vmm_sys_util::signal::register_signal_handler;

/// The kernel's `BUS_ADRERR`: there is no memory behind the address.
const NO_MEMORY: c_int = 2;

/// Sizes of a page on x86-64. A part of a huge one cannot be replaced.
const PAGES: [usize; 3] = [1 << 12, 1 << 21, 1 << 30];

thread_local! {
    static MET: Cell<bool> = const { Cell::new(false) };
}

/// Survives memory that is lost from now on.
pub fn survive() -> vmm_sys_util::errno::Result<()> {
    register_signal_handler(libc::SIGBUS, on_lost_page)
}

/// Whether this thread met a lost page since it was last asked.
pub fn was_met() -> bool {
    MET.take()
}

/// Puts a page of zeros where one is missing. What is no missing page of a file, or cannot be replaced, ends the
/// program as it would without us: the handler is gone when the access is tried again.
extern "C" fn on_lost_page(_: c_int, information: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a whole `siginfo_t` and has filled in the address for SIGBUS.
    let (code, address) = unsafe { ((*information).si_code, (*information).si_addr() as usize) };
    let replaced = code == NO_MEMORY && PAGES.into_iter().any(|page| replace(address & !(page - 1), page));
    if replaced {
        // Plain thread-local storage: initialised at compile time, and nothing to drop.
        MET.set(true);
    } else {
        // SAFETY: it takes no pointers.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
}

/// Maps zeros over the page at `address`.
fn replace(address: usize, page: usize) -> bool {
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the page belongs to a mapping of a file (nothing else raises `BUS_ADRERR`) whose file has no such page any
    // more, so there is nothing in it to lose; the mapping's owner unmaps the address range as before. It is our
    // program's own code only if the program's file was cut, and then it ends all the same: zeros cannot be executed.
    let mapped = unsafe { libc::mmap(address as *mut c_void, page, access, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}
