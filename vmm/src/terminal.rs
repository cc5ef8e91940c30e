//! The terminal is in raw mode while a guest has it, and as it was afterwards, however the VM ends.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::OnceLock;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// The terminal's settings before the first guest had it.
static BEFORE: OnceLock<libc::termios> = OnceLock::new();

/// Gives the terminal back, for a process that ends on the spot. May be called from a signal handler.
pub fn restore_at_exit() {
    if let Some(before) = BEFORE.get() {
        // SAFETY: the settings are a whole `termios` that lives as long as the process. The call is safe in a signal handler.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, before) };
    }
}

/// Raw mode for as long as this lives.
#[derive(Debug)]
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Puts standard input into raw mode; `None` if it is no terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin.as_fd())?;
        BEFORE.get_or_init(|| before.clone().into());
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        // The VMM's own messages go to the same terminal; without this their lines would run down like stairs.
        raw.output_flags = before.output_flags;
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &self.before);
    }
}
