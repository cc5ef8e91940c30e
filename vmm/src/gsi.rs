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
    messages: Messages,
}

/// The messages that KVM has routes to.
#[derive(Default)]
struct Messages(BTreeMap<u32, Message>);

impl Messages {
    /// Points a GSI at `message`, if `set` gets the table with it into KVM. One that is refused must not stay: KVM takes
    /// the whole table or nothing, so it would spoil every later one.
    fn insert(
        &mut self,
        gsi: u32,
        message: Message,
        set: impl FnOnce(&[kvm_irq_routing_entry]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let former = self.0.insert(gsi, message);
        if former == Some(message) {
            return Ok(());
        }
        let messages = self.0.iter().map(|(&gsi, &message)| message_route(gsi, message));
        let entries: Vec<_> = line_routes().chain(messages).collect();
        set(&entries).inspect_err(|_| match former {
            Some(former) => {
                self.0.insert(gsi, former);
            }
            None => {
                self.0.remove(&gsi);
            }
        })
    }
}

impl KvmRouter {
    /// All GSIs above the lines are free.
    pub fn new(vm: Arc<VmFd>) -> Result<Self, Error> {
        let free = IdAllocator::new(LINES, LAST_GSI).map_err(|_| Error::Exhausted)?;
        Ok(Self { vm, state: Mutex::new(State { free, messages: Messages::default() }) })
    }
}

impl MessageRouter for KvmRouter {
    fn allocate(&self) -> Result<u32, Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.free.allocate_id().map_err(|_| Error::Exhausted)
    }

    fn route(&self, gsi: u32, message: Message) -> Result<(), Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.messages.insert(gsi, message, |entries| {
            let table = KvmIrqRouting::from_entries(entries).map_err(|_| Error::Exhausted)?;
            self.vm.set_gsi_routing(&table).map_err(Error::Routes)
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    const LINE_ROUTES: usize = 16 + LINES as usize;

    fn message(data: u32) -> Message {
        Message { address: 0xfee0_0000, data }
    }

    #[test]
    fn a_refused_message_does_not_spoil_later_tables() {
        let mut messages = Messages::default();
        let refuse = |_: &[kvm_irq_routing_entry]| Err(Error::Exhausted);
        let expect = |gsis: &'static [u32]| {
            move |entries: &[kvm_irq_routing_entry]| {
                let there: Vec<_> = entries[LINE_ROUTES..].iter().map(|entry| entry.gsi).collect();
                assert_eq!(there, gsis);
                Ok(())
            }
        };
        messages.insert(24, message(1), refuse).unwrap_err();
        messages.insert(25, message(2), expect(&[25])).unwrap();
        messages.insert(25, message(3), refuse).unwrap_err();
        assert_eq!(messages.0.get(&25), Some(&message(2)), "as KVM still has it");
        messages.insert(25, message(2), refuse).unwrap();
        messages.insert(24, message(3), expect(&[24, 25])).unwrap();
    }
}
