//! Registers and tables that start the guest where it stays: in long mode, in user mode.
//!
//! A hypervisor in hardware does not care. One in software runs user mode natively and interprets kernel mode, and
//! so the guest's own speed is measured on both. Only the interrupt handler runs in kernel mode.

use std::mem::size_of;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::mailbox::{INTERRUPT_AT, Job, STACK_TOP};

const GDT_AT: u64 = 0x1000;
const TASK_STATE_AT: u64 = 0x2000;
const IDT_AT: u64 = 0x3000;
const INTERRUPT_STACK_TOP: u64 = 0x8000;
/// Three tables, one of each level.
const PAGE_TABLES_AT: u64 = 0x8000;

/// The vector of the guest's only interrupt.
pub(crate) const VECTOR: u8 = 0x50;

const KERNEL_CODE: u16 = 0x08;
const USER_DATA: u16 = 0x2b;
const USER_CODE: u16 = 0x33;
const TASK: u16 = 0x40;
/// Bytes of a 64-bit task state segment, and where in it the kernel's stack pointer is.
const TASK_STATE_SIZE: usize = 104;
const TASK_STATE_STACK: u64 = 4;

/// Descriptors by selector: null, kernel code and data, three unused, user data and code, unused, the task in two.
const GDT: [u64; 10] = {
    let task = (TASK_STATE_AT << 16) | (TASK_STATE_SIZE as u64 - 1) | (0x8b << 40);
    let (code, data) = (0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff);
    let user = 3 << 45;
    [0, code, data, 0, 0, data | user, code | user, 0, task, 0]
};

const PRESENT_WRITABLE_USER: u64 = 0b111;
const LARGE_PAGE: u64 = 1 << 7;

/// Writes descriptors, page tables and the interrupt gate.
pub(crate) fn write_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_obj(GDT, GuestAddress(GDT_AT))?;
    memory.write_obj(INTERRUPT_STACK_TOP, GuestAddress(TASK_STATE_AT + TASK_STATE_STACK))?;
    let gate =
        0x8e00 << 32 | u64::from(KERNEL_CODE) << 16 | INTERRUPT_AT & 0xffff | (INTERRUPT_AT >> 16) << 48;
    memory.write_obj([gate, 0], GuestAddress(IDT_AT + 16 * u64::from(VECTOR)))?;
    // The first 16 MiB, mapped to themselves.
    let [level4, level3, level2] = [0, 1, 2].map(|level| PAGE_TABLES_AT + 0x1000 * level);
    memory.write_obj(level3 | PRESENT_WRITABLE_USER, GuestAddress(level4))?;
    memory.write_obj(level2 | PRESENT_WRITABLE_USER, GuestAddress(level3))?;
    let pages: [u64; 8] =
        std::array::from_fn(|page| (page as u64) << 21 | PRESENT_WRITABLE_USER | LARGE_PAGE);
    memory.write_obj(pages, GuestAddress(level2))
}

/// Changes the registers of a new vCPU to long mode, user mode, SSE and x2APIC on.
pub(crate) fn enter_user_mode(registers: &mut kvm_sregs) {
    const CR0: u64 = 0x8005_0033;
    const CR4_PAE_SSE: u64 = 1 << 5 | 1 << 9 | 1 << 10;
    const EFER: u64 = 0xd01;
    const X2APIC: u64 = 1 << 10;
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, dpl: 3, ..Default::default() };
    let data = kvm_segment { selector: USER_DATA, type_: 0x3, db: 1, ..flat };
    registers.cs = kvm_segment { selector: USER_CODE, type_: 0xb, l: 1, ..flat };
    (registers.ds, registers.es, registers.fs, registers.gs, registers.ss) = (data, data, data, data, data);
    registers.tr = kvm_segment {
        selector: TASK,
        base: TASK_STATE_AT,
        limit: TASK_STATE_SIZE as u32 - 1,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    registers.gdt = kvm_dtable { base: GDT_AT, limit: size_of_val(&GDT) as u16 - 1, ..Default::default() };
    registers.idt = kvm_dtable { base: IDT_AT, limit: 256 * 16 - 1, ..Default::default() };
    registers.cr0 = CR0;
    registers.cr3 = PAGE_TABLES_AT;
    registers.cr4 = CR4_PAE_SSE;
    registers.efer = EFER;
    registers.apic_base |= X2APIC;
}

/// The registers with which a job starts at `entry`.
pub(crate) fn of_job(entry: u64, job: Job, count: u64) -> kvm_regs {
    const ALWAYS_SET: u64 = 1 << 1;
    const INTERRUPTS_ON: u64 = 1 << 9;
    let interrupts = if job == Job::Interrupt { INTERRUPTS_ON } else { 0 };
    kvm_regs {
        rip: entry,
        // As after a call: a function expects its return address there.
        rsp: STACK_TOP - size_of::<u64>() as u64,
        rdi: job as u64,
        rsi: count,
        rflags: ALWAYS_SET | interrupts,
        ..Default::default()
    }
}
