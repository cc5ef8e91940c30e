//! Guests of a few instructions, for tests that look at the VMM around them.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Writes line ends to COM1 for ever: each goes out on its own, so the output's length says how far the guest is.
pub(crate) const CHATTER: [u8; 9] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'\n', 0xee, 0xeb, 0xfd]; // mov dx, 0x3f8; mov al, 10; out dx, al; jmp out

/// A bzImage whose kernel is `code`.
pub(crate) fn image(code: &[u8]) -> tempfile::NamedTempFile {
    let mut bytes = vec![0u8; 1024 + 0x200];
    bytes[0x1f1] = 1; // one setup sector
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    bytes[0x211] = 1; // loaded high
    bytes[0x236..0x238].copy_from_slice(&1u16.to_le_bytes()); // 64-bit entry
    bytes[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes()); // longest command line
    bytes.extend(code);
    bytes.resize(1024 + 0x2000, 0xf4);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

/// Whether there is a KVM to run guests with; says so if not.
pub(crate) fn has_kvm(test: &str) -> bool {
    let there = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        // Not through the test harness, which would swallow it.
        let _ = writeln!(std::io::stderr(), "SKIPPED {test}: no usable /dev/kvm");
    }
    there
}

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
