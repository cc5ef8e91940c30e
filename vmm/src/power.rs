//! Power: the ports where a guest switches itself off or asks for a reset, the button that asks it to, and why a VM ended.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

/// Reset register: the PCI reset control register, which Linux also tries on its own.
pub const RESET_PORT: u16 = 0xcf9;
/// What ACPI tells the guest to write there: full reset.
pub const RESET_VALUE: u8 = 0x06;
/// ACPI sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// The sleep type that means off.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// Command port of the keyboard controller, whose pulse on the reset line is the oldest way to reboot a PC.
pub const KEYBOARD_PORT: u16 = 0x64;

/// The interrupt line of the power button: edge, above those of the PC's own devices.
pub const BUTTON_GSI: u32 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const RESET_CPU: u8 = 1 << 2;
const KEYBOARD_PULSE_RESET: u8 = 0xfe;

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reboot,
    /// A signal told the VMM to end.
    Signal(i32),
    /// Somebody asked for it through the API.
    Asked,
    /// A vCPU triple-faulted.
    TripleFault {
        /// Its number.
        vcpu: u8,
    },
    /// A vCPU could not go on.
    Failed {
        /// Its number.
        vcpu: u8,
        /// What KVM said.
        reason: String,
    },
    /// The thread of a disk panicked.
    LostDisk(String),
}

impl Ending {
    /// The exit status of the process: 0 when the guest ended itself in order or the API was asked to end it, 128 + n for signal n, else 1.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Reboot | Self::Asked => 0,
            Self::Signal(number) => 128u8.saturating_add(u8::try_from(*number).unwrap_or(127)),
            Self::TripleFault { .. } | Self::Failed { .. } | Self::LostDisk(_) => 1,
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => write!(f, "guest powered off"),
            Self::Reboot => write!(f, "guest rebooted: the VM ends here, start it again to boot"),
            Self::Signal(number) => write!(f, "ended by signal {number}"),
            Self::Asked => write!(f, "shut down through the API"),
            Self::TripleFault { vcpu } => {
                write!(f, "vCPU {vcpu} triple-faulted: the guest crashed; look at its console output")
            }
            Self::LostDisk(disk) => write!(f, "the thread of {disk} panicked; this is a bug"),
            Self::Failed { vcpu, reason } => write!(f, "vCPU {vcpu} cannot go on: {reason}"),
        }
    }
}

/// Where the reason of the end is kept and the main loop is told of it. The first one to tell wins.
#[derive(Debug)]
pub struct EndSignal {
    ending: Mutex<Option<Ending>>,
    event: EventFd,
}

impl EndSignal {
    /// A signal nobody gave yet.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { ending: Mutex::new(None), event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)? })
    }

    /// Ends the VM for this reason, unless it is ending already.
    pub fn give(&self, ending: Ending) {
        let mut slot = self.ending.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        slot.get_or_insert(ending);
        // The counter of an eventfd overflows only after 2^64 - 2 endings.
        let _ = self.event.write(1);
    }

    /// The reason, once there is one.
    pub fn ending(&self) -> Option<Ending> {
        self.ending.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Readable once the VM ends.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// The ACPI power button: an eventfd that KVM turns into an edge on [`BUTTON_GSI`], where the guest's generic event device
/// (`boot/acpi.rs`) tells the button driver.
#[derive(Debug, Clone)]
pub struct PowerButton(Arc<EventFd>);

impl PowerButton {
    /// A button wired to nothing yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?)))
    }

    /// The eventfd to be wired to [`BUTTON_GSI`].
    pub fn interrupt(&self) -> &EventFd {
        &self.0
    }

    /// Asks the guest to switch itself off. Whether it listens is its own business.
    pub fn press(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// What a write to one of the power ports asks for.
pub fn port_written(port: u16, value: u8) -> Option<Ending> {
    match port {
        SLEEP_CONTROL_PORT if value == SLEEP_ENABLE | (SLEEP_TYPE_OFF << 2) => Some(Ending::PowerOff),
        RESET_PORT if value & RESET_CPU != 0 => Some(Ending::Reboot),
        KEYBOARD_PORT if value == KEYBOARD_PULSE_RESET => Some(Ending::Reboot),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_words_end_the_vm() {
        assert_eq!(port_written(SLEEP_CONTROL_PORT, 0x34), Some(Ending::PowerOff));
        assert_eq!(port_written(SLEEP_CONTROL_PORT, 0x14), None, "sleep type without the enable bit");
        assert_eq!(port_written(RESET_PORT, RESET_VALUE), Some(Ending::Reboot));
        assert_eq!(port_written(RESET_PORT, 0x02), None, "reset type without the reset bit");
        assert_eq!(port_written(KEYBOARD_PORT, 0xfe), Some(Ending::Reboot));
        assert_eq!(port_written(0x80, 0x34), None);
    }

    #[test]
    fn the_first_reason_stays() {
        let signal = EndSignal::new().unwrap();
        assert_eq!(signal.ending(), None);
        signal.give(Ending::Reboot);
        signal.give(Ending::TripleFault { vcpu: 0 });
        assert_eq!(signal.ending(), Some(Ending::Reboot));
        assert_eq!(signal.event().read().unwrap(), 2);
    }

    #[test]
    fn exit_status_tells_order_from_crash() {
        assert_eq!(Ending::PowerOff.exit_status(), 0);
        assert_eq!(Ending::Reboot.exit_status(), 0);
        assert_eq!(Ending::Asked.exit_status(), 0);
        assert_eq!(Ending::Signal(15).exit_status(), 143);
        assert_eq!(Ending::TripleFault { vcpu: 1 }.exit_status(), 1);
    }
}
