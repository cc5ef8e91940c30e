//! The interrupt handler. It runs in kernel mode, on the stack the host names in the task state segment.

use core::mem::offset_of;

use crate::mailbox::{MAILBOX_AT, Mailbox};

core::arch::global_asm!(
    ".section .text.interrupt, \"ax\"",
    ".globl interrupt",
    "interrupt:",
    "push rax",
    "push rdx",
    "push rcx",
    // Its time first: this may be interpreted, and every instruction then takes long.
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov [{interrupted_at}], rax",
    "inc qword ptr [{interrupts}]",
    // End of interrupt, to the local APIC in x2APIC mode.
    "xor eax, eax",
    "xor edx, edx",
    "mov ecx, 0x80b",
    "wrmsr",
    "pop rcx",
    "pop rdx",
    "pop rax",
    "iretq",
    interrupted_at = const MAILBOX_AT as usize + offset_of!(Mailbox, interrupted_at),
    interrupts = const MAILBOX_AT as usize + offset_of!(Mailbox, interrupts),
);
