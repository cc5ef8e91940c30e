//! The real-mode entry at 0xffff0, where PC firmware would restart the machine.
//!
//! Linux goes there to reboot: with hardware-reduced ACPI it prefers EFI's reset, and where there is no EFI the BIOS's, and
//! never tries the reset register of the FADT. Without this code it would run on in zeros for ever.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::memory::GuestMemory;
use crate::power;

/// Writes the code: reset through the port of the FADT's reset register.
pub fn write(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    let [low, high] = power::RESET_PORT.to_le_bytes();
    let code = [
        0xba,
        low,
        high, // mov dx, RESET_PORT
        0xb0,
        power::RESET_VALUE, // mov al, RESET_VALUE
        0xee,               // out dx, al
        0xf4,               // halt: hlt
        0xeb,
        0xfd, // jmp halt
    ];
    memory.write_slice(&code, GuestAddress(layout::RESET_VECTOR))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_resets_and_stays_below_one_mebibyte() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&memory).unwrap();
        let mut code = [0; 6];
        memory.read_slice(&mut code, GuestAddress(0xf_fff0)).unwrap();
        assert_eq!(code, [0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee]);
    }
}
