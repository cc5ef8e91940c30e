//! GSIs: a message-signalled interrupt REACHES the guest. An eventfd, tied to a GSI by KVM_IRQFD, and a route from that GSI to the
//! message (address and data) the guest chose. From then on whoever writes the eventfd interrupts the guest without
//! passing through this process.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vm_allocator::IdAllocator;
use vmm_sys_util::eventfd::EventFd;

/// Lines of the interrupt controllers; the GSIs above are for messages.
const LINES: u32 = 24;
/// Highest GSI that KVM routes.
const LAST_GSI: u32 = 4095;

/// A message a function writes to interrupt a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Message {
    /// Where: the local APIC, by destination.
    pub address: u64,
    /// What: vector and mode.
    pub data: u32,
}

/// What can go wrong with GSIs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// All are in use.
    #[error("no interrupt line (GSI) is left for another vector; give the VM fewer devices or queues")]
    Exhausted,
    /// An eventfd could not be made.
    #[error("cannot make the eventfd of an interrupt vector")]
    EventFd(#[source] std::io::Error),
    /// KVM refused the routes.
    #[error("KVM refuses the interrupt routes")]
    Routes(#[source] kvm_ioctls::Error),
    /// KVM refused to tie or untie an eventfd.
    #[error("KVM refuses the eventfd of GSI {gsi}")]
    IrqFd {
        /// The GSI.
        gsi: u32,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
}

/// What MSI-X needs from the hypervisor.
pub trait MessageRouter: Send + Sync {
    /// Reserves a GSI.
    fn allocate(&self) -> Result<u32, Error>;
    /// Points a GSI at `message`.
    fn route(&self, gsi: u32, message: Message) -> Result<(), Error>;
    /// From now on a write of `event` raises the GSI; if it was written before, that counts.
    fn connect(&self, gsi: u32, event: &EventFd) -> Result<(), Error>;
    /// From now on writes of `event` stay in it.
    fn disconnect(&self, gsi: u32, event: &EventFd) -> Result<(), Error>;
}

/// The GSIs of a VM in KVM.
pub struct KvmRouter {
    vm: Arc<VmFd>,
    state: Mutex<State>,
}

struct State {
    free: IdAllocator,
    messages: BTreeMap<u32, Message>,
}

impl KvmRouter {
    /// All GSIs above the lines are free.
    pub fn new(vm: Arc<VmFd>) -> Result<Self, Error> {
        let free = IdAllocator::new(LINES, LAST_GSI).map_err(|_| Error::Exhausted)?;
        Ok(Self { vm, state: Mutex::new(State { free, messages: BTreeMap::new() }) })
    }
}

impl MessageRouter for KvmRouter {
    fn allocate(&self) -> Result<u32, Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.free.allocate_id().map_err(|_| Error::Exhausted)
    }

    fn route(&self, gsi: u32, message: Message) -> Result<(), Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.messages.insert(gsi, message) == Some(message) {
            return Ok(());
        }
        // KVM takes the whole table or nothing.
        let entries: Vec<_> = line_routes()
            .chain(state.messages.iter().map(|(&gsi, &message)| message_route(gsi, message)))
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| Error::Exhausted)?;
        self.vm.set_gsi_routing(&table).map_err(Error::Routes)
    }

    fn connect(&self, gsi: u32, event: &EventFd) -> Result<(), Error> {
        self.vm.register_irqfd(event, gsi).map_err(|source| Error::IrqFd { gsi, source })
    }

    fn disconnect(&self, gsi: u32, event: &EventFd) -> Result<(), Error> {
        self.vm.unregister_irqfd(event, gsi).map_err(|source| Error::IrqFd { gsi, source })
    }
}

/// The routes KVM starts with: each line to the I/O APIC, the first 16 to the two 8259s as well.
fn line_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let legacy = (0..16).map(|line| {
        let (chip, pin) =
            if line < 8 { (KVM_IRQCHIP_PIC_MASTER, line) } else { (KVM_IRQCHIP_PIC_SLAVE, line - 8) };
        line_route(line, chip, pin)
    });
    legacy.chain((0..LINES).map(|line| line_route(line, KVM_IRQCHIP_IOAPIC, line)))
}

fn line_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    let u = kvm_irq_routing_entry__bindgen_ty_1 { irqchip };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, u, ..Default::default() }
}

fn message_route(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    let u = kvm_irq_routing_entry__bindgen_ty_1 { msi };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, u, ..Default::default() }
}
