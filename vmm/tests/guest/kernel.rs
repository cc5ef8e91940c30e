//! What a guest of a few instructions needs.

use std::fs::OpenOptions;
use std::io::Write;

/// A bzImage whose kernel is `code`.
pub(crate) fn image(code: &[u8]) -> tempfile::NamedTempFile {
    let mut bytes = vec![0u8; 1024 + 0x200];
    bytes[0x1f1] = 1; // one setup sector
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    bytes[0x211] = 1; // loaded high
    bytes[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes()); // highest initrd address
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
