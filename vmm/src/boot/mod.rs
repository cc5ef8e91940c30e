//! What a vCPU and guest memory look like when the guest starts: the part firmware would play.

pub mod acpi;
pub mod cpuid;
pub mod files;
pub mod kernel;
pub mod mtrr;
mod pvh;
pub mod registers;
pub mod reset_vector;

/// The guest's first instruction, and how it is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// In 64-bit mode, as Linux's boot protocol has it.
    Linux64(u64),
    /// In 32-bit protected mode, as PVH has it.
    Pvh(u64),
}

/// Guest-physical addresses of what is put below 1 MiB before the guest starts.
pub mod layout {
    /// The global descriptor table of the first vCPU.
    pub const GDT: u64 = 0x500;
    /// The start info of a kernel that is entered as PVH has it.
    pub const PVH_START_INFO: u64 = 0x6000;
    /// Its list of modules: the initrd.
    pub const PVH_MODULES: u64 = 0x6100;
    /// Its memory map.
    pub const PVH_MEMORY_MAP: u64 = 0x6200;
    /// The zero page (`struct boot_params`).
    pub const ZERO_PAGE: u64 = 0x7000;
    /// Top of the first stack.
    pub const STACK_TOP: u64 = 0x8ff0;
    /// First of the page tables that map the first GiB to itself.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// The kernel command line.
    pub const COMMAND_LINE: u64 = 0x2_0000;
    /// Most bytes of command line, its terminating zero included.
    pub const COMMAND_LINE_SIZE: usize = 2048;
    /// End of low memory; the tables of ACPI begin here.
    pub const LOW_MEMORY_END: u64 = 0x9_fc00;
    /// The ACPI tables, in the area PC firmware uses for them.
    pub const ACPI: u64 = 0xe_0000;
    /// Room for the ACPI tables.
    pub const ACPI_SIZE: u64 = 0x1_0000;
    /// Where a real-mode jump to the firmware restarts the machine.
    pub const RESET_VECTOR: u64 = 0xf_fff0;
    /// Start of memory above 1 MiB.
    pub const HIGH_MEMORY: u64 = 0x10_0000;
}
