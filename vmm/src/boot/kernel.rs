//! The kernel: a bzImage and its initrd are LOADED, and the zero page tells the kernel where everything is. An ELF file goes
//! to `pvh.rs`.
//!
//! The 64-bit boot protocol of `Documentation/arch/x86/boot.rst`: the compressed kernel goes to 1 MiB and is entered
//! 0x200 beyond; it moves itself to the address it prefers. The initrd goes as high as it may below the hole.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::files::{self, BootFile, BootFiles};
use super::{Entry, layout, pvh};
use crate::memory::{ECAM_SIZE, ECAM_START, GuestMemory, HOLE_START};

/// What an ELF file begins with.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const LOADER_UNDEFINED: u8 = 0xff;
const XLOADFLAG_64_BIT_ENTRY: u16 = 1;
const ENTRY_64_BIT: u64 = 0x200;
/// First boot protocol with `xloadflags`, and so with a 64-bit entry one can check for.
const OLDEST_PROTOCOL: u16 = 0x020c;
const PAGE: u64 = 4096;
/// Unit of `setup_sects`, bytes.
const SECTOR: u64 = 512;
/// Unit of `syssize`, bytes.
const PARAGRAPH: u64 = 16;

/// What is booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelOptions {
    /// A bzImage, or an ELF vmlinux with a PVH entry point.
    pub kernel: PathBuf,
    /// The initial RAM file system, if any.
    pub initramfs: Option<PathBuf>,
    /// The command line.
    pub command_line: String,
}

impl KernelOptions {
    /// Opens the files.
    pub fn open(&self) -> Result<BootFiles, files::Error> {
        BootFiles::open(&self.kernel, self.initramfs.as_deref())
    }
}

/// What can go wrong while a kernel is loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be booted from.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The file is not a bzImage.
    #[error(
        "{path} is not a bzImage ({reason}); give --kernel a compressed x86 Linux kernel, such as /boot/vmlinuz-*"
    )]
    NotBzImage {
        /// Its path.
        path: PathBuf,
        /// What the loader missed.
        reason: String,
    },
    /// An ELF file that is no kernel for this VM.
    #[error(
        "the ELF kernel {path} cannot be loaded ({reason}); is it a whole x86-64 vmlinux, and the VM's memory large enough?"
    )]
    Elf {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// An ELF file that cannot be entered.
    #[error(
        "the ELF kernel {0} has no PVH entry point; give --kernel one built with CONFIG_PVH, or the bzImage (/boot/vmlinuz-*)"
    )]
    NoPvhEntry(PathBuf),
    /// The start info of PVH could not be written.
    #[error("cannot write the PVH start info to guest memory")]
    StartInfo(#[source] linux_loader::configurator::Error),
    /// The end of the file is missing.
    #[error(
        "the kernel {path} is cut off: it has {size} bytes and its header promises {promised}; copy or download it again"
    )]
    Truncated {
        /// Its path.
        path: PathBuf,
        /// Bytes it has.
        size: u64,
        /// Bytes it should have.
        promised: u64,
    },
    /// The kernel has no 64-bit entry point.
    #[error("{path} has no 64-bit entry point (boot protocol {version:#x}); give --kernel an x86-64 kernel")]
    Not64Bit {
        /// Its path.
        path: PathBuf,
        /// Boot protocol of the image.
        version: u16,
    },
    /// RAM is too small.
    #[error(
        "{what} needs {needed} MiB and the VM has {available} MiB for it; give it more with --memory size="
    )]
    TooSmall {
        /// kernel or initramfs.
        what: &'static str,
        /// MiB needed.
        needed: u64,
        /// MiB there.
        available: u64,
    },
    /// The command line is too long or holds a zero byte.
    #[error("the command line has {length} bytes (or a zero byte in it); at most {limit} are possible")]
    CommandLine {
        /// Its length.
        length: usize,
        /// The limit of kernel and VMM.
        limit: usize,
    },
    /// Guest memory refused a write.
    #[error("cannot write {what} to guest memory")]
    Memory {
        /// What was written.
        what: &'static str,
        /// The error.
        source: vm_memory::GuestMemoryError,
    },
}

/// Loads kernel, initrd and command line, and tells the kernel where they are; returns where it begins.
///
/// `rsdp` is the guest-physical address of the root of the ACPI tables.
pub fn load(memory: &GuestMemory, files: BootFiles, command_line: &str, rsdp: u64) -> Result<Entry, Error> {
    let mut magic = [0; ELF_MAGIC.len()];
    // A file too short to tell is no bzImage either.
    if files.kernel.file.read_exact_at(&mut magic, 0).is_ok() && magic == ELF_MAGIC {
        return pvh::load(memory, files, command_line, rsdp);
    }
    let header = load_kernel(memory, files.kernel)?;
    let kernel_end = end_of_unpacked_kernel(&header);
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    if let Some(file) = files.initramfs {
        let (address, size) = load_initramfs(memory, file, kernel_end, header.initrd_addr_max)?;
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    write_command_line(memory, command_line, header.cmdline_size as usize)?;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    fill_e820(memory, &mut params);
    memory
        .write_obj(params, GuestAddress(layout::ZERO_PAGE))
        .map_err(|source| Error::Memory { what: "the zero page", source })?;
    Ok(Entry::Linux64(layout::HIGH_MEMORY + ENTRY_64_BIT))
}

fn load_kernel(memory: &GuestMemory, file: BootFile) -> Result<setup_header, Error> {
    let BootFile { path, mut file, size } = file;
    let available = low_ram_end(memory);
    let loaded_end = layout::HIGH_MEMORY.saturating_add(size);
    if loaded_end > available {
        return Err(too_small("the kernel", loaded_end, available));
    }
    let loaded = BzImage::load(memory, Some(GuestAddress(layout::HIGH_MEMORY)), &mut file, None)
        .map_err(|error| Error::NotBzImage { path: path.clone(), reason: error.to_string() })?;
    let header = loaded
        .setup_header
        .ok_or_else(|| Error::NotBzImage { path: path.clone(), reason: "no setup header".into() })?;
    let promised = promised_size(&header);
    if size < promised {
        return Err(Error::Truncated { path, size, promised });
    }
    let version = header.version;
    if version < OLDEST_PROTOCOL || header.xloadflags & XLOADFLAG_64_BIT_ENTRY == 0 {
        return Err(Error::Not64Bit { path, version });
    }
    let needed = end_of_unpacked_kernel(&header);
    if needed > available {
        return Err(too_small("the kernel", needed, available));
    }
    Ok(header)
}

/// Bytes of the file as its header has it; a signature may follow.
fn promised_size(header: &setup_header) -> u64 {
    // No number means four, from the time before there was one.
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    (1 + setup_sectors) * SECTOR + u64::from(header.syssize) * PARAGRAPH
}

/// A relocatable kernel unpacks itself at its preferred address or where it was loaded, whichever is higher.
fn end_of_unpacked_kernel(header: &setup_header) -> u64 {
    header.pref_address.max(layout::HIGH_MEMORY).saturating_add(u64::from(header.init_size))
}

/// Reads the initrd to the highest address that kernel (its last byte may have) and hole allow; returns its address and size.
pub(super) fn load_initramfs(
    memory: &GuestMemory,
    file: BootFile,
    kernel_end: u64,
    last: u32,
) -> Result<(u64, usize), Error> {
    let BootFile { mut file, size, .. } = file;
    let limit = low_ram_end(memory).min(u64::from(last) + 1);
    let address = limit
        .checked_sub(size)
        .map(|address| address & !(PAGE - 1))
        .filter(|&address| address >= kernel_end.next_multiple_of(PAGE))
        .ok_or_else(|| {
            too_small(
                "the initramfs",
                size.saturating_add(PAGE),
                low_ram_end(memory).saturating_sub(kernel_end),
            )
        })?;
    // It fits, so its size is below 4 GiB.
    let size = size as usize;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, size)
        .map_err(|source| Error::Memory { what: "the initramfs", source })?;
    Ok((address, size))
}

/// Writes the command line, of which the kernel takes `most` bytes.
pub(super) fn write_command_line(memory: &GuestMemory, text: &str, most: usize) -> Result<(), Error> {
    let limit = most.min(layout::COMMAND_LINE_SIZE - 1);
    if text.len() > limit || text.contains('\0') {
        return Err(Error::CommandLine { length: text.len(), limit });
    }
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::COMMAND_LINE))
        .map_err(|source| Error::Memory { what: "the command line", source })
}

/// RAM below the BIOS area, RAM above 1 MiB, and the ECAM window as reserved (Linux uses it only then): start, size
/// and kind of each.
pub(super) fn memory_map(memory: &GuestMemory) -> Vec<(u64, u64, u32)> {
    let mut entries = vec![(0, layout::LOW_MEMORY_END, E820_RAM), (ECAM_START, ECAM_SIZE, E820_RESERVED)];
    for region in memory.iter() {
        let (start, end) = (region.start_addr().raw_value(), region.last_addr().raw_value() + 1);
        let start = start.max(layout::HIGH_MEMORY);
        entries.push((start, end - start, E820_RAM));
    }
    entries.sort_unstable();
    entries
}

fn fill_e820(memory: &GuestMemory, params: &mut boot_params) {
    let entries = memory_map(memory);
    params.e820_entries = entries.len() as u8;
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(entries) {
        *slot = boot_e820_entry { addr, size, r#type: kind };
    }
}

/// End of the RAM below the hole.
pub(super) fn low_ram_end(memory: &GuestMemory) -> u64 {
    let below_hole = |end: &u64| *end <= HOLE_START;
    memory.iter().map(|region| region.last_addr().raw_value() + 1).filter(below_hole).max().unwrap_or(0)
}

fn too_small(what: &'static str, needed: u64, available: u64) -> Error {
    Error::TooSmall { what, needed: needed.div_ceil(1 << 20), available: available >> 20 }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use super::*;

    /// A minimal bzImage: one setup sector, the header, and 4 KiB of "kernel".
    fn image(change: impl FnOnce(&mut setup_header)) -> tempfile::NamedTempFile {
        let mut header = setup_header {
            setup_sects: 1,
            header: 0x5372_6448,
            version: 0x020f,
            loadflags: 1,
            xloadflags: 1,
            cmdline_size: 2047,
            initrd_addr_max: 0x7fff_ffff,
            pref_address: 0x100_0000,
            init_size: 8 << 20,
            ..Default::default()
        };
        change(&mut header);
        let mut bytes = vec![0u8; 1024 + 4096];
        let raw = vm_memory::ByteValued::as_slice(&header);
        bytes[0x1f1..0x1f1 + raw.len()].copy_from_slice(raw);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    fn options(kernel: &Path) -> KernelOptions {
        KernelOptions { kernel: kernel.into(), initramfs: None, command_line: "console=ttyS0".into() }
    }

    fn load(memory: &GuestMemory, options: &KernelOptions, rsdp: u64) -> Result<Entry, Error> {
        super::load(memory, options.open()?, &options.command_line, rsdp)
    }

    fn ram(mebibytes: usize) -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), mebibytes << 20)]).unwrap()
    }

    #[test]
    fn the_zero_page_names_command_line_initrd_and_tables() {
        let kernel = image(|_| ());
        let mut initramfs = tempfile::NamedTempFile::new().unwrap();
        initramfs.write_all(&[7; 5000]).unwrap();
        let memory = ram(64);
        let options = KernelOptions { initramfs: Some(initramfs.path().into()), ..options(kernel.path()) };
        assert_eq!(load(&memory, &options, 0xe_0000).unwrap(), Entry::Linux64(0x10_0200));
        let params: boot_params = memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
        assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
        assert_eq!({ params.hdr.ramdisk_size }, 5000);
        let initrd = u64::from(params.hdr.ramdisk_image);
        assert!(initrd % PAGE == 0 && initrd + 5000 <= 64 << 20);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(initrd + 4999)).unwrap(), 7);
        let mut text = [0u8; 14];
        memory.read_slice(&mut text, GuestAddress(u64::from(params.hdr.cmd_line_ptr))).unwrap();
        assert_eq!(&text, b"console=ttyS0\0");
        assert_eq!(params.e820_entries, 3);
    }

    #[test]
    fn what_is_not_a_64_bit_bzimage_is_refused_with_its_name() {
        let memory = ram(64);
        let error = |kernel: &Path| load(&memory, &options(kernel), 0).unwrap_err().to_string();
        assert!(error(Path::new("/nonexistent/vmlinuz")).contains("/nonexistent/vmlinuz"));
        assert!(error(Path::new("/proc")).contains("the kernel /proc is not a regular file"));
        let script = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(script.path(), "#!/bin/sh\n").unwrap();
        assert!(error(script.path()).contains("is not a bzImage"));
        assert!(error(image(|h| h.xloadflags = 0).path()).contains("no 64-bit entry"));
        assert!(error(image(|h| h.version = 0x0204).path()).contains("no 64-bit entry"));
    }

    #[test]
    fn a_kernel_whose_end_is_missing_is_refused() {
        let memory = ram(64);
        for (paragraphs, whole) in [(4096 / 16, true), (4096 / 16 + 1, false), (u32::MAX, false)] {
            let kernel = image(|h| h.syssize = paragraphs);
            let loaded = load(&memory, &options(kernel.path()), 0);
            assert_eq!(loaded.is_ok(), whole, "{paragraphs}");
            assert!(whole || matches!(loaded, Err(Error::Truncated { size: 5120, .. })));
        }
    }

    #[test]
    fn pipes_and_devices_are_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let kernel = image(|_| ());
        for path in [pipe.as_path(), Path::new("/dev/zero")] {
            let opened = options(path).open();
            assert!(matches!(opened, Err(files::Error::NotRegular { what: "kernel", .. })));
            let opened = KernelOptions { initramfs: Some(path.into()), ..options(kernel.path()) }.open();
            assert!(matches!(opened, Err(files::Error::NotRegular { what: "initramfs", .. })));
        }
    }

    #[test]
    fn too_little_memory_says_how_much_is_needed() {
        let kernel = image(|h| h.init_size = 60 << 20);
        let error = load(&ram(64), &options(kernel.path()), 0).unwrap_err().to_string();
        assert!(error.contains("the kernel needs 76 MiB and the VM has 64 MiB"), "{error}");
        let kernel = image(|_| ());
        let mut initramfs = tempfile::NamedTempFile::new().unwrap();
        initramfs.write_all(&vec![0; 41 << 20]).unwrap();
        let options = KernelOptions { initramfs: Some(initramfs.path().into()), ..options(kernel.path()) };
        let error = load(&ram(64), &options, 0).unwrap_err().to_string();
        assert!(error.contains("the initramfs needs 42 MiB and the VM has 40 MiB"), "{error}");
    }

    #[test]
    fn a_hostile_header_does_not_overflow() {
        let kernel = image(|h| {
            h.pref_address = u64::MAX;
            h.init_size = u32::MAX;
        });
        assert!(matches!(load(&ram(64), &options(kernel.path()), 0), Err(Error::TooSmall { .. })));
    }

    #[test]
    fn a_command_line_too_long_is_refused() {
        let kernel = image(|_| ());
        let options = KernelOptions { command_line: "x".repeat(2048), ..options(kernel.path()) };
        assert!(matches!(load(&ram(64), &options, 0), Err(Error::CommandLine { .. })));
    }
}
