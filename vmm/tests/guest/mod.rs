//! Guests of a few instructions, for tests that look at the VMM around them.

pub(crate) mod kernel;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Writes line ends to COM1 for ever: each goes out on its own, so the output's length says how far the guest is.
pub(crate) const CHATTER: [u8; 9] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'\n', 0xee, 0xeb, 0xfd]; // mov dx, 0x3f8; mov al, 10; out dx, al; jmp out

/// A VMM that runs; killed when dropped.
pub(crate) struct Vmm(pub(crate) Child);

impl Vmm {
    pub(crate) fn start(kernel: &Path, more: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ivcpu-vmm"));
        command.arg("--kernel").arg(kernel).args(["--memory", "size=64M"]).args(more);
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        Self(child)
    }

    /// The exit status of a VMM that is about to end.
    pub(crate) fn status(&mut self) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "still running");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until something is so.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
