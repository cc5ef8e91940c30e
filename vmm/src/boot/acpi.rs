//! ACPI tables: how the guest finds its CPUs, the PCI bus and the serial port, and how it switches itself off.
//!
//! The hardware-reduced profile: no SCI, no PM timer, no 8259 and PIT to look for. Power-off is the sleep control
//! register, reboot the reset register; both are ports that [`crate::power`] serves. The power button is a device of its own
//! (PNP0C0C), and a generic event device (ACPI 6.5, section 5.6.9) turns its interrupt into a notification of that. PCI
//! functions have no interrupt pins, so there is no `_PRT`.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name,
    Notify, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::memory::{ECAM_SIZE, ECAM_START, GuestMemory, PCI_WINDOW_32};
use crate::{power, serial};

const OEM: [u8; 6] = *b"IVCPU ";
const TABLE: [u8; 8] = *b"IVCPUVMM";
const REVISION: u32 = 1;
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// Bits of `IAPC_BOOT_ARCH`: no VGA to probe, no CMOS clock.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// The value of a notification that says a button was pressed (ACPI 6.5, table 5.161).
const BUTTON_PRESSED: u8 = 0x80;
const BOOT_ARCH_NO_CMOS_CLOCK: u16 = 1 << 5;

/// What can go wrong while the tables are placed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// They do not fit where they belong.
    #[error("the ACPI tables need {needed:#x} bytes and have {available:#x}; give the VM fewer vCPUs")]
    TooLarge {
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        available: u64,
    },
    /// Guest memory refused the write.
    #[error("cannot write the ACPI tables to guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What the tables describe.
#[derive(Debug, Clone, Copy)]
pub struct Platform {
    /// vCPUs, the IVCPU included; local APIC ids are 0 to N-1.
    pub vcpus: u8,
    /// The 64-bit PCI window, inclusive start and exclusive end.
    pub pci_window_64: (u64, u64),
}

/// Writes all tables to guest memory and returns the address of the root pointer (RSDP).
pub fn write(memory: &GuestMemory, platform: Platform) -> Result<u64, Error> {
    let image = build(platform, layout::ACPI);
    if image.len() as u64 > layout::ACPI_SIZE {
        return Err(Error::TooLarge { needed: image.len() as u64, available: layout::ACPI_SIZE });
    }
    memory.write_slice(&image, GuestAddress(layout::ACPI))?;
    Ok(layout::ACPI)
}

/// The tables as they lie in memory from `base` on, root pointer first.
fn build(platform: Platform, base: u64) -> Vec<u8> {
    let mut image = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut place = |table: &dyn Aml| {
        let address = base + image.len() as u64;
        table.to_aml_bytes(&mut image);
        image.resize(image.len().next_multiple_of(16), 0);
        address
    };
    let dsdt = place(&dsdt(platform));
    let fadt = place(&fadt(dsdt));
    let madt = place(&madt(platform.vcpus));
    let mcfg = place(&mcfg());
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    for address in [fadt, madt, mcfg] {
        xsdt.add_entry(address);
    }
    let xsdt = place(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    image[..root.len()].copy_from_slice(&root);
    image
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION).dsdt_64(dsdt);
    fadt.flags = (Flags::HwReducedAcpi as u32
        | Flags::ResetRegSup as u32
        | Flags::PwrButton as u32
        | Flags::SlpButton as u32)
        .into();
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_CMOS_CLOCK).into();
    fadt.reset_reg = port(power::RESET_PORT);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, 0);
    mcfg
}

fn dsdt(platform: Platform) -> Sdt {
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    let mut body = Vec::new();
    let cpus: Vec<_> = (0..platform.vcpus).map(cpu).collect();
    let mut system_bus = cpus.concat();
    system_bus.extend(pci_host_bridge(platform.pci_window_64));
    system_bus.extend(ecam_reservation());
    system_bus.extend(serial_port());
    system_bus.extend(power_button());
    body.extend(Scope::raw("_SB_".into(), system_bus));
    // The one sleep state: off. The value is what the guest writes to the sleep control register.
    Name::new("_S5_".into(), &Package::new(vec![&power::SLEEP_TYPE_OFF])).to_aml_bytes(&mut body);
    table.append_slice(&body);
    table
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// The processor object that goes with the MADT entry of the same number.
fn cpu(id: u8) -> Vec<u8> {
    let name = format!("C{id:03X}");
    bytes(&Device::new(
        name.as_str().into(),
        vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)],
    ))
}

fn pci_host_bridge(window_64: (u64, u64)) -> Vec<u8> {
    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let ports_low = AddressSpace::new_io(0u16, 0xcf7, None);
    let ports_high = AddressSpace::new_io(0xd00u16, 0xffff, None);
    let memory_32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_WINDOW_32.0 as u32,
        (PCI_WINDOW_32.1 - 1) as u32,
        None,
    );
    let memory_64 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        window_64.0,
        window_64.1.saturating_sub(1),
        None,
    );
    let mut windows: Vec<&dyn Aml> = vec![&buses, &config_ports, &ports_low, &ports_high, &memory_32];
    if window_64.0 < window_64.1 {
        windows.push(&memory_64);
    }
    bytes(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_CCA".into(), &1u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(windows)),
        ],
    ))
}

/// A motherboard resource over the ECAM window: without it (or an e820 entry) Linux does not use the window.
fn ecam_reservation() -> Vec<u8> {
    bytes(&Device::new(
        "MCFG".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(true, ECAM_START as u32, ECAM_SIZE as u32)]),
            ),
        ],
    ))
}

fn serial_port() -> Vec<u8> {
    bytes(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(serial::PORT, serial::PORT, 1, serial::PORTS as u8),
                    &Interrupt::new(true, true, false, false, serial::GSI),
                ]),
            ),
        ],
    ))
}

/// The button, and the device that notifies it when the line rises.
fn power_button() -> Vec<u8> {
    let mut devices =
        bytes(&Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]));
    devices.extend(bytes(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, power::BUTTON_GSI)]),
            ),
            // Its argument is the number of the line, of which there is one.
            &Method::new("_EVT".into(), 1, true, vec![&Notify::new(&Path::new("PWRB"), &BUTTON_PRESSED)]),
        ],
    )));
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xe_0000;

    fn image(vcpus: u8) -> Vec<u8> {
        build(Platform { vcpus, pci_window_64: (1 << 32, 1 << 36) }, BASE)
    }

    fn u32_at(image: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(image[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(image: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(image[offset..offset + 8].try_into().unwrap())
    }

    /// The table at this guest-physical address, its checksum checked.
    fn table(image: &[u8], address: u64) -> &[u8] {
        let start = (address - BASE) as usize;
        let length = u32_at(image, start + 4) as usize;
        let table = &image[start..start + length];
        assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0, "checksum of {:?}", &table[..4]);
        table
    }

    #[test]
    fn all_tables_are_reachable_from_the_root_and_their_checksums_hold() {
        for vcpus in [1, 3, 64, 254] {
            let image = image(vcpus);
            assert!(image.len() as u64 <= layout::ACPI_SIZE, "{vcpus} vCPUs: {:#x}", image.len());
            assert_eq!(&image[..8], b"RSD PTR ");
            assert_eq!(image[..20].iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
            assert_eq!(image[..36].iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
            let xsdt = table(&image, u64_at(&image, 24));
            let names: Vec<_> = xsdt[36..]
                .chunks(8)
                .map(|entry| table(&image, u64::from_le_bytes(entry.try_into().unwrap()))[..4].to_vec())
                .collect();
            assert_eq!(names, [b"FACP".to_vec(), b"APIC".to_vec(), b"MCFG".to_vec()]);
        }
    }

    #[test]
    fn the_fadt_points_at_the_dsdt_and_at_the_power_ports() {
        let image = image(2);
        let xsdt = table(&image, u64_at(&image, 24));
        let fadt = table(&image, u64_at(xsdt, 36));
        assert_eq!(&table(&image, u64_at(fadt, 140))[..4], b"DSDT");
        assert_ne!(u32_at(fadt, 112) & (1 << 20), 0, "hardware reduced");
        assert_ne!(u32_at(fadt, 112) & (1 << 10), 0, "reset register");
        assert_eq!(u64_at(fadt, 120), u64::from(power::RESET_PORT));
        assert_eq!(u64_at(fadt, 248), u64::from(power::SLEEP_CONTROL_PORT));
        assert_eq!(u64_at(fadt, 260), u64::from(power::SLEEP_STATUS_PORT));
    }

    #[test]
    fn the_madt_has_an_entry_for_each_vcpu() {
        let image = image(3);
        let xsdt = table(&image, u64_at(&image, 24));
        let madt = table(&image, u64_at(xsdt, 44));
        let ids: Vec<_> = madt[44..].chunks(8).take(3).map(|e| (e[0], e[2], e[3])).collect();
        assert_eq!(ids, [(0, 0, 0), (0, 1, 1), (0, 2, 2)]);
        assert_eq!(madt[44 + 24], 1, "then the I/O APIC");
    }

    #[test]
    fn the_power_button_is_notified_by_its_line() {
        let image = image(1);
        let has = |bytes: &[u8]| image.windows(bytes.len()).any(|window| window == bytes);
        assert!(has(b"ACPI0013"));
        assert!(has(b"_EVT\x09\x86PWRB\x0a\x80"), "one argument, serialized: Notify (PWRB, 0x80)");
        // An extended interrupt descriptor: consumer, edge, active high, exclusive, one line.
        assert!(has(&[0x89, 6, 0, 0x03, 1, power::BUTTON_GSI as u8, 0, 0, 0]));
    }
}
