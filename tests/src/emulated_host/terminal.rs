//! The user's terminal, as the interactive shell needs it.

use std::fs;
use std::io;
use std::process::{Command, Stdio};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// The terminal in raw mode; as it was when dropped.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Every key goes to the command, `Ctrl-C` too.
    pub fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

/// Rows and columns of the terminal on standard input, 24 by 80 if it does not say.
pub fn terminal_size() -> (u16, u16) {
    // stty is one of the essential packages' programs.
    let output = fs::File::open("/dev/tty")
        .and_then(|terminal| Command::new("stty").arg("size").stdin(Stdio::from(terminal)).output());
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let mut numbers = text.split_whitespace().filter_map(|word| word.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(rows), Some(columns)) if rows > 0 && columns > 0 => (rows, columns),
        _ => (24, 80),
    }
}
