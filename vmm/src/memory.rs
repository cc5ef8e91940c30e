//! Guest memory: where RAM and its holes lie in the guest-physical address space, and the memfd that backs RAM.
//!
//! ```text
//! 0            .. 3 GiB          RAM
//! 3 GiB        .. 4 GiB          hole: 32-bit PCI window, ECAM, IOAPIC, local APIC, KVM's own pages
//! 4 GiB        ..                the rest of RAM
//! above RAM    ..                64-bit PCI window
//! ```
//!
//! RAM is one sealed memfd mapped shared, so a vhost-user backend can map the same pages and nobody can shrink it
//! under our feet (a shrunk file would turn every access into SIGBUS).

use std::fs::{self, File};
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::mmap::FromRangesError;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use crate::suboption::{self, ByteSize, SubOptions};

/// First address of the hole below 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// First address above the hole.
pub const HOLE_END: u64 = 1 << 32;
/// The 32-bit window of the PCI host bridge, inclusive start and exclusive end.
pub const PCI_WINDOW_32: (u64, u64) = (HOLE_START, 0xe000_0000);
/// The enhanced configuration space of PCI bus 0: 1 MiB.
pub const ECAM_START: u64 = 0xe000_0000;
/// Bytes of enhanced configuration space: one bus.
pub const ECAM_SIZE: u64 = 1 << 20;
/// Where KVM keeps the page of the identity map it needs for real mode on old VMX.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Where KVM keeps its three pages of task state for the same purpose.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Least RAM a VM may have; Linux does not unpack in less.
const MIN_SIZE: u64 = 32 << 20;
/// Bytes of a huge page unless something else is said.
const HUGE_PAGE: u64 = 2 << 20;
/// The other size x86-64 has.
const GIGANTIC_PAGE: u64 = 1 << 30;
/// Alignment and size of the 64-bit PCI window.
const PCI_WINDOW_64_ALIGN: u64 = 1 << 32;
const PCI_WINDOW_64_SIZE: u64 = 32 << 30;

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages";

/// Guest memory as every part of the VMM holds it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// `--memory size=SIZE[,shared=on][,hugepages=on|off][,hugepage_size=2M|1G][,prefault=on|off]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryOptions {
    /// RAM in bytes.
    pub size: u64,
    /// Bytes of the huge pages, set aside by the host, that RAM is made of; ordinary pages if none.
    pub hugepages: Option<u64>,
    /// Whether all of it is there before the guest starts.
    pub prefault: bool,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self { size: 512 << 20, hugepages: None, prefault: false }
    }
}

impl FromStr for MemoryOptions {
    type Err = suboption::Error;

    fn from_str(text: &str) -> Result<Self, suboption::Error> {
        let mut options = SubOptions::parse(text)?;
        let size = options.take_with("size", |value| {
            let ByteSize(size) = value.parse()?;
            if size < MIN_SIZE || size % (1 << 20) != 0 {
                return Err("expected whole MiB, 32M at least".to_owned());
            }
            if size > 1 << 40 {
                return Err("expected 1T at most".to_owned());
            }
            Ok(size)
        })?;
        options.take_with("shared", |value| match value {
            "on" | "true" => Ok(()),
            _ => Err("guest memory is always shared here; leave the word out or say on".to_owned()),
        })?;
        let hugepages = options.take_switch("hugepages")?.unwrap_or(false);
        let page = options.take_with("hugepage_size", |value| match value.parse()? {
            _ if !hugepages => Err("that goes with hugepages=on only".to_owned()),
            ByteSize(size @ (HUGE_PAGE | GIGANTIC_PAGE)) => Ok(size),
            _ => Err("expected 2M or 1G".to_owned()),
        })?;
        let prefault = options.take_switch("prefault")?.unwrap_or(false);
        options.finish()?;
        let size = size.unwrap_or(Self::default().size);
        let page = page.unwrap_or(HUGE_PAGE);
        if hugepages && !size.is_multiple_of(page) {
            let (key, value) = ("size".to_owned(), format!("{}M", size >> 20));
            return Err(suboption::Error::Value {
                key,
                value,
                reason: format!("expected a multiple of {}M, a huge page", page >> 20),
            });
        }
        Ok(Self { size, hugepages: hugepages.then_some(page), prefault })
    }
}

/// What can go wrong while guest memory is made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The memfd could not be made, sized or sealed.
    #[error("cannot make {size} MiB of guest memory ({step}); give the VM less with --memory size=")]
    Memfd {
        /// Size asked for, MiB.
        size: u64,
        /// The system call that failed.
        step: &'static str,
        /// Its error.
        source: io::Error,
    },
    /// The host does not say how many huge pages it has.
    #[error("cannot read how many huge pages are free ({path}); has the host pages of this size?")]
    HugePages {
        /// Where it says so.
        path: String,
        /// The error.
        source: io::Error,
    },
    /// The host has set too few huge pages aside.
    #[error(
        "the VM needs {needed} huge pages of {mebibytes}M and {free} are free; set more aside (as root: {}) or leave out hugepages=on",
        set_aside(*.mebibytes, *.total)
    )]
    TooFewHugePages {
        /// Huge pages needed.
        needed: u64,
        /// Huge pages free.
        free: u64,
        /// MiB of each.
        mebibytes: u64,
        /// Huge pages the host would have if there were enough.
        total: u64,
    },
    /// Not all of it is to be had.
    #[error(
        "the host cannot provide all {size} MiB of guest memory now; give the VM less with --memory size= or leave out prefault=on"
    )]
    Prefault {
        /// Size asked for, MiB.
        size: u64,
        /// The error.
        source: io::Error,
    },
    /// It could not be mapped into this process.
    #[error("cannot map {size} MiB of guest memory; give the VM less with --memory size=")]
    Map {
        /// Size asked for, MiB.
        size: u64,
        /// The error of the mapping.
        source: vm_memory::mmap::FromRangesError,
    },
    /// KVM did not take a region.
    #[error("KVM refuses the memory slot at {start:#x}")]
    Slot {
        /// Guest-physical start of the region.
        start: u64,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
}

/// Makes and maps guest RAM.
///
/// Huge pages are worth it: without them a booting Linux causes some 30,000 exits to map what it touches, page by page. Where
/// the host has none set aside, the kernel is asked to use transparent ones, which it does if `shmem_enabled` lets it.
pub fn allocate(options: &MemoryOptions) -> Result<GuestMemory, Error> {
    let size = options.size;
    let mebibytes = size >> 20;
    let memfd = |step, source| Error::Memfd { size: mebibytes, step, source };
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if let Some(page) = options.hugepages {
        check_huge_pages(size, page)?;
        let size = if page == GIGANTIC_PAGE { MFdFlags::MFD_HUGE_1GB } else { MFdFlags::MFD_HUGE_2MB };
        flags |= MFdFlags::MFD_HUGETLB | size;
    }
    let file = File::from(memfd_create("ivcpu-guest", flags).map_err(|e| memfd("memfd_create", e.into()))?);
    file.set_len(size).map_err(|e| memfd("ftruncate", e))?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(|e| memfd("F_ADD_SEALS", e.into()))?;
    let file = Arc::new(file);
    let mut regions = Vec::new();
    for (start, length, offset) in ranges(size) {
        let file = FileOffset::from_arc(Arc::clone(&file), offset);
        // Ordinary pages are promised without being set aside. Huge ones are set aside here, or mapping fails: one that
        // is missing when it is touched would kill the process.
        let reserve = if options.hugepages.is_some() { 0 } else { libc::MAP_NORESERVE };
        let region = MmapRegion::build(
            Some(file),
            length as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | reserve,
        );
        let region = region.map_err(|e| Error::Map { size: mebibytes, source: e.into() })?;
        let region = GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or(Error::Map { size: mebibytes, source: FromRangesError::InvalidGuestRegion })?;
        regions.push(region);
    }
    let memory =
        GuestMemory::from_regions(regions).map_err(|e| Error::Map { size: mebibytes, source: e.into() })?;
    if options.hugepages.is_none() {
        memory.iter().for_each(ask_for_huge_pages);
    }
    if options.prefault {
        memory.iter().try_for_each(populate).map_err(|source| Error::Prefault { size: mebibytes, source })?;
    }
    Ok(memory)
}

/// A huge page that is not there when it is touched kills the process, so their number is checked before.
fn check_huge_pages(size: u64, page: u64) -> Result<(), Error> {
    let count = |name: &str| -> Result<u64, Error> {
        let path = format!("{HUGE_PAGES}/hugepages-{}kB/{name}", page >> 10);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim().parse().unwrap_or(0)),
            Err(source) => Err(Error::HugePages { path, source }),
        }
    };
    // Some of the free ones may be promised to somebody.
    let free = count("free_hugepages")?.saturating_sub(count("resv_hugepages")?);
    let needed = size / page;
    if needed <= free {
        return Ok(());
    }
    let total = count("nr_hugepages")? + needed - free;
    Err(Error::TooFewHugePages { needed, free, mebibytes: page >> 20, total })
}

/// The command after which there are so many huge pages.
fn set_aside(mebibytes: u64, total: u64) -> String {
    if mebibytes == HUGE_PAGE >> 20 {
        format!("sysctl vm.nr_hugepages={total}")
    } else {
        format!("echo {total} > {HUGE_PAGES}/hugepages-{}kB/nr_hugepages", mebibytes << 10)
    }
}

/// Has the kernel provide every page now.
fn populate(region: &GuestRegionMmap) -> io::Result<()> {
    // SAFETY: the range is a live mapping owned by `region`, and providing its pages does not change what it holds.
    let result = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_POPULATE_WRITE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A wish: the host may not grant it.
fn ask_for_huge_pages(region: &GuestRegionMmap) {
    // SAFETY: the range is a live mapping owned by `region`, and the advice does not change what it holds.
    unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
}

/// The RAM ranges of a guest with `size` bytes: guest-physical start, length, offset in the memfd.
fn ranges(size: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let low = size.min(HOLE_START);
    let high = size - low;
    [(0, low, 0), (HOLE_END, high, low)].into_iter().filter(|&(_, length, _)| length != 0)
}

/// Hands every region of `memory` to KVM as a memory slot.
pub fn register(vm: &VmFd, memory: &GuestMemory) -> Result<(), Error> {
    for (slot, region) in memory.iter().enumerate() {
        let start = region.start_addr().raw_value();
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: start,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the slot describes a live mapping of exactly this address and size, owned by `memory`. The machine
        // keeps `memory` for longer than any vCPU runs, and regions of a `GuestMemory` do not overlap.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|source| Error::Slot { start, source })?;
    }
    Ok(())
}

/// Numbers of memory slots that nobody has yet.
#[derive(Debug)]
pub struct FreeSlots(u32);

impl FreeSlots {
    /// Those that [`register`] leaves free.
    pub fn beside(memory: &GuestMemory) -> Self {
        Self(memory.num_regions() as u32)
    }

    /// One of them. KVM refuses the slot when there are more than it has.
    pub fn take(&mut self) -> u32 {
        self.0 += 1;
        self.0 - 1
    }
}

/// The 64-bit window of the PCI host bridge, inclusive start and exclusive end: above RAM, and within the
/// `physical_bits` of address the vCPUs have.
pub fn pci_window_64(memory: &GuestMemory, physical_bits: u8) -> (u64, u64) {
    let above_ram = (memory.last_addr().raw_value() + 1).max(HOLE_END).next_multiple_of(PCI_WINDOW_64_ALIGN);
    let limit = 1u64 << physical_bits.clamp(36, 52);
    (above_ram, (above_ram + PCI_WINDOW_64_SIZE).min(limit).max(above_ram))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn ram_avoids_the_hole() {
        let small: Vec<_> = ranges(512 << 20).collect();
        assert_eq!(small, [(0, 512 << 20, 0)]);
        let large: Vec<_> = ranges(5 << 30).collect();
        assert_eq!(large, [(0, HOLE_START, 0), (HOLE_END, 2 << 30, HOLE_START)]);
    }

    #[test]
    fn the_64_bit_window_lies_above_ram_and_inside_the_address_width() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        assert_eq!(pci_window_64(&memory, 48), (1 << 32, (1 << 32) + (32 << 30)));
        assert_eq!(pci_window_64(&memory, 36).1, (1 << 32) + (32 << 30));
        let high = GuestMemory::from_ranges(&[(GuestAddress(60 << 30), 1 << 20)]).unwrap();
        assert_eq!(pci_window_64(&high, 36), (64 << 30, 64 << 30), "no room: empty, never beyond the width");
    }

    #[test]
    fn memory_is_sealed_shared_and_there_if_wanted() {
        let memory = allocate(&MemoryOptions { size: 32 << 20, hugepages: None, prefault: true }).unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        assert!(file.set_len(4096).is_err(), "shrinking would turn accesses into SIGBUS");
        assert_eq!(file.metadata().unwrap().blocks(), (32 << 20) / 512, "every page is there");
    }

    #[test]
    fn too_few_huge_pages_say_how_many_are_needed_and_where() {
        let error =
            |mebibytes| Error::TooFewHugePages { needed: 256, free: 6, mebibytes, total: 260 }.to_string();
        assert!(error(2).contains("needs 256 huge pages of 2M and 6 are free"), "{}", error(2));
        assert!(error(2).contains("sysctl vm.nr_hugepages=260"), "{}", error(2));
        assert!(error(1024).contains("echo 260 > /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"));
    }

    #[test]
    fn options_say_what_is_expected() {
        let plain = MemoryOptions { size: 1 << 30, hugepages: None, prefault: false };
        assert_eq!("size=1G,shared=on".parse(), Ok(plain));
        for (text, hugepages, prefault) in [
            ("size=1G,hugepages=on", Some(2 << 20), false),
            ("size=2G,hugepages=on,hugepage_size=1G,prefault=on", Some(1 << 30), true),
            ("size=33M,prefault=on", None, true),
        ] {
            let options: MemoryOptions = text.parse().unwrap();
            assert_eq!((options.hugepages, options.prefault), (hugepages, prefault), "{text}");
        }
        assert_eq!("".parse(), Ok(MemoryOptions::default()));
        for bad in [
            "size=1",
            "size=16M",
            "size=2048T",
            "shared=off",
            "size=33M,hugepages=on",
            "hugepage=on",
            "size=512M,hugepages=on,hugepage_size=1G",
            "hugepages=on,hugepage_size=4K",
            "hugepage_size=2M",
        ] {
            assert!(bad.parse::<MemoryOptions>().is_err(), "{bad}");
        }
    }
}
