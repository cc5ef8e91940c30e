//! An uncompressed kernel: the segments of an ELF vmlinux are LOADED where they say, and the PVH start info tells the
//! kernel where everything is.
//!
//! The entry point is in a note of the file (`XEN_ELFNOTE_PHYS32_ENTRY`) and is entered in 32-bit protected mode without
//! paging, `ebx` at the start info: `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h` of Xen,
//! `CONFIG_PVH` in Linux.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Address, GuestAddress};

use super::Entry;
use super::files::{BootFile, BootFiles};
use super::kernel::{Error, load_initramfs, low_ram_end, memory_map, write_command_line};
use super::layout;
use crate::memory::GuestMemory;

const START_MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;

/// Loads kernel, initrd and command line, and writes the start info.
pub(super) fn load(
    memory: &GuestMemory,
    files: BootFiles,
    command_line: &str,
    rsdp: u64,
) -> Result<Entry, Error> {
    let BootFile { path, mut file, .. } = files.kernel;
    let loaded = Elf::load(memory, None, &mut file, None)
        .map_err(|error| Error::Elf { path: path.clone(), reason: error.to_string() })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(Error::NoPvhEntry(path));
    };
    if loaded.kernel_end > low_ram_end(memory) {
        return Err(Error::Elf { path, reason: "it does not fit the RAM below 3 GiB".into() });
    }
    let mut modules = Vec::new();
    if let Some(file) = files.initramfs {
        let (paddr, size) = load_initramfs(memory, file, loaded.kernel_end, u32::MAX)?;
        modules.push(hvm_modlist_entry { paddr, size: size as u64, ..Default::default() });
    }
    write_command_line(memory, command_line, layout::COMMAND_LINE_SIZE)?;
    let map: Vec<_> = memory_map(memory)
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry { addr, size, type_, reserved: 0 })
        .collect();
    let start_info = hvm_start_info {
        magic: START_MAGIC,
        version: VERSION,
        nr_modules: modules.len() as u32,
        modlist_paddr: layout::PVH_MODULES,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&map, GuestAddress(layout::PVH_MEMORY_MAP));
    params.set_modules(&modules, GuestAddress(layout::PVH_MODULES));
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(Error::StartInfo)?;
    Ok(Entry::Pvh(entry.raw_value()))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;
    use crate::boot::kernel::KernelOptions;

    const ENTRY: u32 = 0x100_0000;

    /// The least of an ELF: headers, a note if wanted, and one segment of code at 16 MiB.
    pub(crate) fn elf(code: &[u8], note: bool, physical: u64, memory_size: u64) -> tempfile::NamedTempFile {
        const NOTE_AT: u64 = 0x100;
        const CODE_AT: u64 = 0x200;
        let mut bytes = vec![0u8; CODE_AT as usize];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &[2, 0, 62, 0, 1]);
        put(24, &u64::from(ENTRY).to_le_bytes());
        put(32, &64u64.to_le_bytes()); // program headers
        put(52, &[64, 0, 56, 0, if note { 2 } else { 1 }]);
        let mut header =
            |index: usize, kind: u32, offset: u64, address: u64, in_file: u64, in_memory: u64| {
                let at = 64 + 56 * index;
                put(at, &kind.to_le_bytes());
                for (place, value) in [(8, offset), (24, address), (32, in_file), (40, in_memory)] {
                    put(at + place, &value.to_le_bytes());
                }
            };
        header(0, 1, CODE_AT, physical, code.len() as u64, memory_size);
        header(1, 4, NOTE_AT, 0, 20, 20);
        put(NOTE_AT as usize, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        put(NOTE_AT as usize + 12, b"Xen\0");
        put(NOTE_AT as usize + 16, &ENTRY.to_le_bytes());
        bytes.extend(code);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    fn load(
        memory: &GuestMemory,
        kernel: &tempfile::NamedTempFile,
        initramfs: Option<&tempfile::NamedTempFile>,
    ) -> Result<Entry, Error> {
        let options = KernelOptions {
            kernel: kernel.path().into(),
            initramfs: initramfs.map(|file| file.path().into()),
            command_line: "quiet".into(),
        };
        crate::boot::kernel::load(memory, options.open().unwrap(), &options.command_line, 0xe_0000)
    }

    fn ram(mebibytes: usize) -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), mebibytes << 20)]).unwrap()
    }

    #[test]
    fn the_start_info_names_command_line_initrd_map_and_tables() {
        let memory = ram(64);
        let mut initramfs = tempfile::NamedTempFile::new().unwrap();
        initramfs.write_all(&[7; 5000]).unwrap();
        let kernel = elf(b"code", true, u64::from(ENTRY), 1 << 20);
        assert_eq!(load(&memory, &kernel, Some(&initramfs)).unwrap(), Entry::Pvh(u64::from(ENTRY)));
        let mut code = [0; 4];
        memory.read_slice(&mut code, GuestAddress(u64::from(ENTRY))).unwrap();
        assert_eq!(&code, b"code");
        let info: hvm_start_info = memory.read_obj(GuestAddress(layout::PVH_START_INFO)).unwrap();
        assert_eq!((info.magic, info.version, info.rsdp_paddr), (START_MAGIC, 1, 0xe_0000));
        let mut text = [0; 6];
        memory.read_slice(&mut text, GuestAddress(info.cmdline_paddr)).unwrap();
        assert_eq!((&text, info.nr_modules), (b"quiet\0", 1));
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!(
            (module.size, memory.read_obj::<u8>(GuestAddress(module.paddr + 4999)).unwrap()),
            (5000, 7)
        );
        assert!(module.paddr >= u64::from(ENTRY) + (1 << 20));
        let first: hvm_memmap_table_entry = memory.read_obj(GuestAddress(info.memmap_paddr)).unwrap();
        assert_eq!((info.memmap_entries, first.addr, first.type_), (3, 0, 1));
    }

    #[test]
    fn what_cannot_be_entered_or_does_not_fit_is_refused() {
        let entry = u64::from(ENTRY);
        let refused = |kernel| load(&ram(64), &kernel, None).unwrap_err().to_string();
        assert!(refused(elf(b"code", false, entry, 4)).contains("has no PVH entry point"));
        for (physical, size) in [(63 << 20, 2 << 20), (entry, u64::MAX), (u64::MAX - 1, 4), (64 << 20, 4)] {
            let text = refused(elf(b"code", true, physical, size));
            assert!(text.contains("cannot be loaded"), "{physical:#x} {size:#x}: {text}");
        }
        let cut_off = elf(b"", true, entry, 4);
        cut_off.as_file().set_len(100).unwrap();
        assert!(refused(cut_off).contains("cannot be loaded"));
    }
}
