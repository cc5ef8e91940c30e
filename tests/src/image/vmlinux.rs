//! The ELF kernel inside a bzImage, which distributions do not ship by itself.

use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use ruzstd::decoding::StreamingDecoder;
use tempfile::NamedTempFile;

use super::Error;
use crate::provision::{Kernel, Provision};
use crate::workspace::Workspace;

/// Unpacks the vmlinux of `kernel`, once; its path.
pub fn vmlinux(workspace: &Workspace, kernel: Kernel) -> Result<PathBuf, Error> {
    let files = Provision::new(workspace).kernel(kernel)?;
    let path = workspace.cache().join(format!("vmlinux-{}", files.release));
    if path.exists() {
        return Ok(path);
    }
    let image = fs::read(&files.image).map_err(Error::file("read", &files.image))?;
    let kernel = unpack(&image).map_err(Error::file("unpack", &files.image))?;
    let cache = workspace.cache();
    let mut partial = NamedTempFile::new_in(&cache).map_err(Error::file("make a file in", &cache))?;
    partial.write_all(&kernel).map_err(Error::file("write", &path))?;
    partial.persist(&path).map_err(|e| Error::file("write", &path)(e.error))?;
    Ok(path)
}

/// The payload of a bzImage, decompressed. Where it lies is in the header, which Linux's `Documentation/arch/x86/boot.rst` describes;
/// the kernels that are unpacked here are compressed by zstd.
fn unpack(image: &[u8]) -> io::Result<Vec<u8>> {
    const SETUP_SECTORS: usize = 0x1f1;
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24c;
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
    let word = |at: usize| image.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes) as usize);
    let payload = || {
        let start = (usize::from(*image.get(SETUP_SECTORS)?) + 1) * 512 + word(PAYLOAD_OFFSET)?;
        image.get(start..start.checked_add(word(PAYLOAD_LENGTH)?)?)
    };
    let payload = payload().ok_or_else(|| invalid("its header names no payload"))?;
    let mut kernel = Vec::new();
    let mut decoder = StreamingDecoder::new(payload).map_err(io::Error::other)?;
    decoder.read_to_end(&mut kernel)?;
    if kernel.starts_with(b"\x7fELF") { Ok(kernel) } else { Err(invalid("its payload is no ELF file")) }
}
