//! Registers of the first vCPU at a kernel's entry point, interrupts off. At Linux's 64-bit one: long mode, paging on, the first
//! GiB mapped to itself, `rsi` at the zero page. At that of PVH: protected mode, no paging, `ebx` at the start info. All other vCPUs wait in KVM for their start-up IPI.

use kvm_bindings::{kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::{Entry, layout};
use crate::memory::GuestMemory;

const CR0_PROTECTION: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;

/// Offsets of the two local interrupt pins in the local APIC's register page.
const APIC_LINT0: usize = 0x350;
const APIC_LINT1: usize = 0x360;
const DELIVERY_MODE_NMI: u32 = 0x400;
const DELIVERY_MODE_EXTINT: u32 = 0x700;

/// What can go wrong while the registers are set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The descriptor table or page tables did not fit in guest memory.
    #[error("cannot write the first page tables to guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// KVM refused a register set.
    #[error("KVM refuses the start registers ({step})")]
    Kvm {
        /// Which set.
        step: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
}

/// Writes descriptor table and page tables, and points the first vCPU at `entry`.
pub fn set_up_first(vcpu: &VcpuFd, memory: &GuestMemory, entry: Entry) -> Result<(), Error> {
    let kvm = |step| move |source| Error::Kvm { step, source };
    let mut sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
    let regs = match entry {
        Entry::Linux64(rip) => {
            write_descriptors(memory, FLAT_CODE_64)?;
            write_page_tables(memory)?;
            enter_long_mode(&mut sregs);
            let (rsp, rbp, rsi) = (layout::STACK_TOP, layout::STACK_TOP, layout::ZERO_PAGE);
            kvm_regs { rflags: 2, rip, rsp, rbp, rsi, ..Default::default() }
        }
        Entry::Pvh(rip) => {
            write_descriptors(memory, FLAT_CODE_32)?;
            enter_protected_mode(&mut sregs);
            kvm_regs { rflags: 2, rip, rbx: layout::PVH_START_INFO, ..Default::default() }
        }
    };
    vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(kvm("KVM_SET_REGS"))
}

/// Wires the local interrupt pins as PC firmware leaves them: LINT0 to the 8259, LINT1 to NMI.
pub fn set_up_local_apic(vcpu: &VcpuFd) -> Result<(), Error> {
    let kvm = |step| move |source| Error::Kvm { step, source };
    let mut lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
    set_delivery_mode(&mut lapic, APIC_LINT0, DELIVERY_MODE_EXTINT);
    set_delivery_mode(&mut lapic, APIC_LINT1, DELIVERY_MODE_NMI);
    vcpu.set_lapic(&lapic).map_err(kvm("KVM_SET_LAPIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, offset: usize, mode: u32) {
    let bytes: [u8; 4] = std::array::from_fn(|index| lapic.regs[offset + index] as u8);
    let value = (u32::from_le_bytes(bytes) & !0x700) | mode;
    for (index, byte) in value.to_le_bytes().into_iter().enumerate() {
        lapic.regs[offset + index] = byte as _;
    }
}

const FLAT_CODE_64: u64 = 0x00af_9b00_0000_ffff;
const FLAT_CODE_32: u64 = 0x00cf_9b00_0000_ffff;

/// Selectors as the boot protocol wants them: code at 0x10, data at 0x18, both flat.
fn write_descriptors(memory: &GuestMemory, code: u64) -> Result<(), vm_memory::GuestMemoryError> {
    const FLAT_DATA: u64 = 0x00cf_9300_0000_ffff;
    for (index, entry) in [0, 0, code, FLAT_DATA].into_iter().enumerate() {
        memory.write_obj(entry, GuestAddress(layout::GDT + 8 * index as u64))?;
    }
    Ok(())
}

/// One table of each level, and 512 large pages: the first GiB mapped to itself.
fn write_page_tables(memory: &GuestMemory) -> Result<(), vm_memory::GuestMemoryError> {
    let (level4, level3, level2) =
        (layout::PAGE_TABLES, layout::PAGE_TABLES + 0x1000, layout::PAGE_TABLES + 0x2000);
    memory.write_obj(level3 | PAGE_PRESENT_WRITABLE, GuestAddress(level4))?;
    memory.write_obj(level2 | PAGE_PRESENT_WRITABLE, GuestAddress(level3))?;
    for page in 0..512u64 {
        let entry = (page << 21) | PAGE_PRESENT_WRITABLE | PAGE_LARGE;
        memory.write_obj(entry, GuestAddress(level2 + 8 * page))?;
    }
    Ok(())
}

fn enter_long_mode(sregs: &mut kvm_sregs) {
    set_segments(sregs);
    (sregs.cs.l, sregs.cs.db) = (1, 0);
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 |= CR4_PHYSICAL_ADDRESS_EXTENSION;
    sregs.cr0 |= CR0_PROTECTION | CR0_PAGING;
    sregs.efer |= EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
}

fn enter_protected_mode(sregs: &mut kvm_sregs) {
    set_segments(sregs);
    // A 32-bit task state segment, which PVH wants to be there.
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    sregs.cr0 |= CR0_PROTECTION;
}

/// Flat segments, code for 32 bits, and no interrupt descriptors.
fn set_segments(sregs: &mut kvm_sregs) {
    let flat = kvm_segment { base: 0, limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x10, type_: 0xb, db: 1, ..flat };
    let data = kvm_segment { selector: 0x18, type_: 0x3, db: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_tables_map_the_first_gibibyte_to_itself() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_page_tables(&memory).unwrap();
        for address in [0u64, 0x10_0000, 0x3fff_ffff] {
            let mut table = layout::PAGE_TABLES;
            for level in [39, 30, 21] {
                let index = (address >> level) & 0x1ff;
                let entry: u64 = memory.read_obj(GuestAddress(table + 8 * index)).unwrap();
                assert_eq!(entry & PAGE_PRESENT_WRITABLE, PAGE_PRESENT_WRITABLE);
                table = entry & !0xfff;
            }
            assert_eq!(table, address & !0x1f_ffff);
        }
    }

    #[test]
    fn a_local_interrupt_pin_keeps_its_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[APIC_LINT0 + 2] = 1;
        set_delivery_mode(&mut lapic, APIC_LINT0, DELIVERY_MODE_EXTINT);
        assert_eq!(lapic.regs[APIC_LINT0..APIC_LINT0 + 4], [0, 7, 1, 0]);
    }
}
