//! Why there is no VM.

use std::io;

use crate::boot::{acpi, cpuid, kernel, mtrr, registers};
use crate::pci::{bus, window};
use crate::vfio::attach;
use crate::virtio::{block, rng, session, transport};
use crate::{affinity, api, exits, fifo, gsi, kvm, memory, pin, placement, sandbox, serial};

/// What can go wrong before a VM runs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// The boot files.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] acpi::Error),
    /// The code at the reset vector.
    #[error("cannot write the reset vector to guest memory")]
    ResetVector(#[source] vm_memory::GuestMemoryError),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] cpuid::Error),
    /// MSRs.
    #[error(transparent)]
    Mtrr(#[from] mtrr::Error),
    /// Start registers.
    #[error(transparent)]
    Registers(#[from] registers::Error),
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] serial::Error),
    /// Interrupt lines.
    #[error(transparent)]
    Gsi(#[from] gsi::Error),
    /// A vhost-user backend.
    #[error(transparent)]
    Session(#[from] session::Error),
    /// A virtio device.
    #[error(transparent)]
    Transport(#[from] transport::Error),
    /// A disk.
    #[error(transparent)]
    Block(#[from] block::Error),
    /// The entropy device.
    #[error(transparent)]
    Rng(#[from] rng::Error),
    /// One terminal for two.
    #[error("--serial tty and --console tty both want the terminal; say --serial null, or off, as well")]
    TwoTerminals,
    /// Too many devices.
    #[error(transparent)]
    Bus(#[from] bus::Full),
    /// No place for a BAR.
    #[error(transparent)]
    Window(#[from] window::Full),
    /// A passed-through function.
    #[error(transparent)]
    Attach(#[from] attach::Error),
    /// The FIFO region.
    #[error(transparent)]
    Fifo(#[from] fifo::Error),
    /// pCPUs.
    #[error(transparent)]
    Pin(#[from] pin::Error),
    /// vCPUs that cannot run where they are wanted.
    #[error(transparent)]
    Placement(#[from] placement::Error),
    /// The host's interrupts.
    #[error(transparent)]
    HostIrqs(#[from] affinity::Error),
    /// The count of exits.
    #[error(transparent)]
    Exits(#[from] exits::Error),
    /// The API's socket.
    #[error(transparent)]
    Api(#[from] api::socket::Error),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// Signals, threads and event files of the VMM itself.
    #[error("cannot {step}")]
    System {
        /// What was being done.
        step: &'static str,
        /// The error.
        source: io::Error,
    },
    /// The event loop.
    #[error("the event loop of the VMM failed: {0:?}")]
    Events(event_manager::Error),
}
