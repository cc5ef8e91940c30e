//! The kernel that a bzImage unpacks when it starts. Inside an emulated host that takes as long as all the rest of a boot,
//! so the lab does it once, and boots the ELF file by its PVH entry.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use ruzstd::decoding::StreamingDecoder;
use tempfile::NamedTempFile;

/// What a zstd frame begins with.
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const ELF: &[u8] = b"\x7fELF";
/// No kernel is larger.
const LARGEST: u64 = 1 << 30;

/// Unpacks `image`, which must be packed by zstd as Debian's kernels are from 6.12 on, to `vmlinux`, whole or not at all,
/// unless that is there.
pub(super) fn unpack(image: &Path, vmlinux: &Path) -> io::Result<()> {
    if vmlinux.exists() {
        return Ok(());
    }
    let content = fs::read(image)?;
    let payload = payload(&content).ok_or_else(|| invalid("is not a bzImage"))?;
    if !payload.starts_with(ZSTD) {
        return Err(invalid("is not packed by zstd"));
    }
    let mut kernel = Vec::new();
    let decoder = StreamingDecoder::new(payload).map_err(|e| invalid(&e.to_string()))?;
    decoder.take(LARGEST).read_to_end(&mut kernel)?;
    if !kernel.starts_with(ELF) {
        return Err(invalid("holds no ELF file"));
    }
    let folder = vmlinux.parent().unwrap_or(Path::new("."));
    let mut partial = NamedTempFile::new_in(folder)?;
    partial.write_all(&kernel)?;
    partial.persist(vmlinux).map_err(|e| e.error)?;
    Ok(())
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The packed kernel (Linux: Documentation/arch/x86/boot.rst, `payload_offset` and `payload_length`).
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = usize::from(*image.get(0x1f1)?);
    let begin = (setup_sectors + 1) * 512 + word(0x248)?;
    image.get(begin..begin.checked_add(word(0x24c)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header as a bzImage has it, and its payload.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(b"behind it");
        image
    }

    fn unpacked(image: &[u8]) -> io::Result<Vec<u8>> {
        let folder = tempfile::tempdir()?;
        let (from, to) = (folder.path().join("bzImage"), folder.path().join("vmlinux"));
        fs::write(&from, image)?;
        unpack(&from, &to)?;
        fs::read(to)
    }

    #[test]
    fn what_zstd_packed_comes_out() {
        let kernel = [ELF, &[7; 5000]].concat();
        let packed = ruzstd::encoding::compress_to_vec(
            kernel.as_slice(),
            ruzstd::encoding::CompressionLevel::Uncompressed,
        );
        assert_eq!(unpacked(&image(&packed)).expect("unpacked"), kernel);
    }

    #[test]
    fn what_is_no_such_kernel_is_refused() {
        let xz = unpacked(&image(b"\xfd7zXZ\0 and more")).expect_err("another packing");
        assert!(xz.to_string().contains("zstd"), "{xz}");
        let garbage = ruzstd::encoding::compress_to_vec(
            &b"no kernel"[..],
            ruzstd::encoding::CompressionLevel::Uncompressed,
        );
        assert!(unpacked(&image(&garbage)).expect_err("no ELF").to_string().contains("no ELF"));
        assert!(unpacked(b"short").expect_err("no bzImage").to_string().contains("not a bzImage"));
    }
}
