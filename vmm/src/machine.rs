//! What a VM is made of, and how it runs to its end. Wiring only: each part is a module of its own.

mod error;
mod options;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use kvm_ioctls::VmFd;
use nix::sys::signalfd::SignalFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::affinity::refresh::Refresh;
use crate::affinity::{self, HostIrqs, IrqSource};
use crate::api::Api;
use crate::boot::{Entry, acpi, cpuid, kernel, mtrr, registers, reset_vector};
use crate::chain::Chain;
use crate::devices::Devices;
use crate::exits::{self, lifetime::Lifetime};
use crate::fifo::Fifo;
use crate::gsi::{KvmRouter, MessageRouter};
use crate::ivcpu;
use crate::ivshmem::{self, Ivshmem};
use crate::kvm;
use crate::memory::{self, FreeSlots, GuestMemory};
use crate::pause::{Gate, Pausable, Pause};
use crate::pci::bus::Bus;
use crate::pci::window::Window;
use crate::pin;
use crate::placement::{Placement, VcpuThread};
use crate::power::{self, EndSignal, Ending, PowerButton};
use crate::sandbox::{self, Role, landlock};
use crate::serial::{self, SerialMode};
use crate::signals::{self, EndWatch};
use crate::slot::KvmSlot;
use crate::terminal::RawMode;
use crate::vcpu::{self, Running, Vcpu};
use crate::vfio::attach::{self, attach};
use crate::vfio::function::Windows;
use crate::vfio::sysfs::Sysfs;
use crate::virtio;
use crate::virtio::block::image::Image;
use crate::virtio::block::options::DiskOptions;
use crate::virtio::block::worker::Worker;
use crate::virtio::block::{self, Block};
use crate::virtio::console::{Console, ConsoleMode};
use crate::virtio::net_options::NetOptions;
use crate::virtio::rng::Rng;
use crate::virtio::transport::{self, KickRouter, Transport, Wiring};
use crate::virtio::vhost_user_net::VhostUserNet;

pub use error::Error;
pub use options::MachineOptions;

/// How long vCPU threads may take to leave the guest. One that is stuck writing to a blocked console is left behind;
/// the end of the process takes it along.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// Who has the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interactive {
    Serial,
    Console,
}

/// A VM ready to run.
pub struct Machine {
    // Dropped in this order: vCPUs before the VM, the VM before its memory.
    vcpus: Vec<Vcpu>,
    devices: Arc<Devices>,
    net: Vec<VhostUserNet>,
    disks: Vec<Worker>,
    console: Option<Console>,
    signals: SignalFd,
    end: Arc<EndSignal>,
    gate: Arc<Gate>,
    /// Devices that rest while the VM is paused.
    pausable: Vec<Box<dyn Pausable>>,
    button: PowerButton,
    api: Option<Api>,
    /// What of the file system is needed from now on; `None` for all of it.
    needs: Option<landlock::Needs>,
    interactive: Option<Interactive>,
    exits: Option<exits::lifetime::Format>,
    /// The host's interrupts that were moved; restored when this is dropped.
    host_irqs: Option<HostIrqs>,
    /// Written when passed-through functions get other interrupts of the host.
    interrupts_changed: EventFd,
    _vm: Arc<VmFd>,
    _memory: GuestMemory,
    _fifo: Option<Fifo>,
}

impl Machine {
    /// Makes the VM: memory, CPUs, devices, and the guest's first instruction.
    pub fn new(options: &MachineOptions) -> Result<Self, Error> {
        // Before the first thread starts, because threads inherit which signals are blocked.
        let signals = signals::block().map_err(system("block the signals that end a VM"))?;
        let placement = Placement::check(&options.cpus, options.ivcpu.as_ref(), &pin::online()?)?;
        // What a run that was killed left moved may be on a pCPU this one uses, with an IVCPU or without.
        if let Err(error) = affinity::recover() {
            tracing::warn!("host interrupts that a killed run moved stay there: {}", Chain(&error));
        }
        let functions = attach::check(&Sysfs::default(), &options.devices)?;
        // Before any backend is connected to: it looks for the region when its session starts.
        let fifo_options = options.ivcpu.as_ref().and_then(|ivcpu| ivcpu.fifo.as_ref());
        let fifo = fifo_options.map(Fifo::open).transpose()?;
        let interactive = match (&options.serial, &options.console) {
            (SerialMode::Tty, ConsoleMode::Tty) => return Err(Error::TwoTerminals),
            (SerialMode::Tty, _) => Some(Interactive::Serial),
            (_, ConsoleMode::Tty) => Some(Interactive::Console),
            _ => None,
        };
        let images = options
            .disks
            .iter()
            .map(Image::open)
            .collect::<Result<Vec<_>, _>>()
            .map_err(block::Error::from)?;
        let boot_files = options.kernel.open().map_err(kernel::Error::from)?;
        pin::keep_off(&placement.taken())?;
        sandbox::arm(options.sandbox)?;
        let kvm = kvm::open()?;
        let vm = Arc::new(kvm::create_vm(&kvm)?);
        let memory = memory::allocate(&options.memory)?;
        memory::register(&vm, &memory)?;

        let dedicated = placement.is_dedicated();
        let profile = cpuid::Profile { vcpus: placement.vcpus(), pv_eoi: options.cpus.pv_eoi, dedicated };
        let template = cpuid::Template::new(&kvm, profile)?;
        let pci_window_64 = memory::pci_window_64(&memory, template.physical_bits());

        reset_vector::write(&memory).map_err(Error::ResetVector)?;
        let rsdp = acpi::write(&memory, acpi::Platform { vcpus: placement.vcpus(), pci_window_64 })?;
        let mut command_line = options.kernel.command_line.clone();
        if let Some(number) = placement.ivcpu {
            command_line = format!("{command_line} {}", ivcpu::guest_command_line(number));
        }
        let entry = kernel::load(&memory, boot_files, &command_line, rsdp)?;

        let serial = serial::Port::new(&options.serial)?;
        if let Some(port) = &serial {
            vm.register_irqfd(port.interrupt(), serial::GSI).map_err(kvm::refused("the serial interrupt"))?;
        }
        let button = PowerButton::new().map_err(system("make an eventfd"))?;
        vm.register_irqfd(button.interrupt(), power::BUTTON_GSI)
            .map_err(kvm::refused("the power button's interrupt"))?;
        let wiring = Wiring {
            memory: memory.clone(),
            messages: Arc::new(KvmRouter::new(Arc::clone(&vm))?) as Arc<dyn MessageRouter>,
            kicks: Arc::clone(&vm) as Arc<dyn KickRouter>,
        };
        if fifo.is_some() {
            ivcpu::keep_pause_inside(&vm);
        }
        let mut pci = Bus::default();
        let mut window = Window::new(pci_window_64);
        let mut slots = FreeSlots::beside(&memory);
        let interrupts_changed =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(system("make an eventfd"))?;
        let net = add_net(&mut pci, &wiring, &options.net, &mut window)?;
        let images = options.disks.iter().zip(images);
        let mut pausable: Vec<Box<dyn Pausable>> = Vec::new();
        let disks = add_disks(&mut pci, &wiring, images, placement.vcpus(), &mut window, &mut pausable)?;
        pausable.extend(net.iter().map(|net| Box::new(net.clone()) as Box<dyn Pausable>));
        if let Some(fifo) = &fifo {
            let slot = KvmSlot::new(Arc::clone(&vm), slots.take(), fifo.mapping());
            add_fifo(&mut pci, fifo, slot, &mut window)?;
        }
        let mut window_32 = Window::new(memory::PCI_WINDOW_32);
        let passthrough = attach::Wiring {
            vm: &vm,
            memory: &memory,
            messages: &wiring.messages,
            windows: Windows { below_4_gib: &mut window_32, above_4_gib: &mut window },
            slots: &mut slots,
            changed: &interrupts_changed,
        };
        attach(&mut pci, functions, passthrough)?;
        // Last, so that a device there is by default moves no other one.
        let console = Console::new(&options.console, memory.clone())?;
        if let Some(console) = &console {
            pausable.push(Box::new(console.clone()));
            add_virtio(&mut pci, &wiring, console.clone(), &mut window)?;
        }
        if let Some(source) = &options.rng.source {
            add_virtio(&mut pci, &wiring, Rng::new(source.clone(), memory.clone())?, &mut window)?;
        }
        let devices = Arc::new(Devices { serial, pci });

        let mut vcpus = Vec::new();
        for thread in placement.threads {
            vcpus.push(create_vcpu(&vm, &memory, &template, thread, entry)?);
        }
        Ok(Self {
            vcpus,
            devices,
            net,
            disks,
            console,
            signals,
            end: Arc::new(EndSignal::new().map_err(system("make an eventfd"))?),
            gate: Arc::default(),
            pausable,
            button,
            api: options.api_socket.as_deref().map(|path| Api::open(path, options)).transpose()?,
            needs: options.sandbox.landlock.then(|| options.into()),
            interactive,
            exits: options.exits,
            host_irqs: move_host_irqs(options)?,
            interrupts_changed,
            _vm: vm,
            _memory: memory,
            _fifo: fifo,
        })
    }

    /// Runs the VM until it ends, and says why it did. The terminal is as before when this returns.
    pub fn run(mut self) -> Result<Ending, Error> {
        vcpu::install_signal_handler().map_err(system("install the vCPU signal handler"))?;
        // Its folder in tracefs has to be made while folders can be.
        let counting = Arc::new(Mutex::new(self.exits.map(Lifetime::start).transpose()?));
        // Open for as long as the rules are to hold: landlock knows files by their inodes, and those of /proc are forgotten
        // when nobody has them.
        let _ruled = self.needs.as_ref().map(landlock::restrict).transpose()?;
        let mut events = EventManager::new().map_err(Error::Events)?;
        let watch = EndWatch {
            end: Arc::clone(&self.end),
            signals: self.signals,
            button: self.button.clone(),
            asked: false,
        };
        events.add_subscriber(Box::new(watch) as Box<dyn MutEventSubscriber>);
        let raw_mode = if self.interactive.is_some() {
            RawMode::enter().map_err(system("put the terminal into raw mode"))?
        } else {
            None
        };
        if let Some(port) = &self.devices.serial {
            events.add_subscriber(Box::new(serial::Flush(Arc::clone(port))));
            if self.interactive == Some(Interactive::Serial) {
                let port = Arc::clone(port);
                read_input(move || port.feed(io::stdin()))?;
            }
        }
        if let (Some(Interactive::Console), Some(console)) = (self.interactive, self.console.take()) {
            read_input(move || console.feed(io::stdin()))?;
        }

        if let Some(irqs) = self.host_irqs.take() {
            let refresh = Refresh::new(irqs, self.interrupts_changed)
                .map_err(system("make the timer that looks after the host's interrupts"))?;
            events.add_subscriber(Box::new(refresh));
        }
        for net in self.net.drain(..) {
            events.add_subscriber(Box::new(net));
        }

        for (number, disk) in self.disks.drain(..).enumerate() {
            // It ends with its device, and there is nothing to wait for: what the guest flushed is on the disk.
            disk.start(format!("disk{number}"), Arc::clone(&self.end))
                .map_err(system("start the thread of a disk"))?;
        }

        let api = self.api.take().map(|api| {
            let pause = Pause::new(Arc::clone(&self.gate), std::mem::take(&mut self.pausable));
            api.serve(&self.vcpus, pause, Arc::clone(&self.end), self.button.clone(), Arc::clone(&counting))
        });
        // The socket's file, removed on return.
        let _socket = api.transpose().map_err(system("start the API thread"))?;
        let mut running = Vec::new();
        for vcpu in std::mem::take(&mut self.vcpus) {
            let started =
                vcpu.start(Arc::clone(&self.devices), Arc::clone(&self.end), Arc::clone(&self.gate));
            match started {
                Ok(vcpu) => running.push(vcpu),
                Err(source) => {
                    stop(running, &self.gate);
                    return Err(Error::System { step: "start a vCPU thread", source });
                }
            }
        }
        // All that run from the start are there; what this thread starts later gets a filter inside this one's.
        if let Err(error) = sandbox::enter(Role::Main) {
            stop(running, &self.gate);
            return Err(error.into());
        }
        let ending = loop {
            if let Some(ending) = self.end.ending() {
                break Ok(ending);
            }
            match events.run() {
                Ok(_) => {}
                // The process was stopped and continued.
                Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => {}
                Err(error) => break Err(Error::Events(error)),
            }
        };
        // Taken from the API, whose thread does not end: its folders in tracefs are removed with it.
        let counting = counting.lock().unwrap_or_else(PoisonError::into_inner).take();
        let report = counting.as_ref().map(Lifetime::report);
        // A vCPU that did not stop may be the one that holds the console.
        if stop(running, &self.gate)
            && let Some(port) = &self.devices.serial
        {
            port.flush(STOP_WITHIN);
        }
        drop(raw_mode);
        if let Some(report) = report {
            print!("{}", report?);
        }
        ending
    }
}

/// Starts the thread that reads standard input for as long as there is some.
fn read_input(feed: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let confined = || {
        sandbox::enter_or_exit(Role::Console);
        feed();
    };
    let started = thread::Builder::new().name("stdin".into()).spawn(confined);
    started.map(drop).map_err(system("start the input thread"))
}

/// Takes all vCPUs out of the guest; says whether all of them went.
fn stop(running: Vec<Running>, gate: &Gate) -> bool {
    for vcpu in &running {
        vcpu.stop();
    }
    // After the flags: who is let go from a pause sees them.
    gate.end();
    let deadline = Instant::now() + STOP_WITHIN;
    // Every thread is waited for, also after one that did not end.
    let left_behind =
        running.into_iter().filter_map(|vcpu| (!vcpu.join_until(deadline)).then_some(())).count();
    left_behind == 0
}

/// Puts a virtio device on the bus.
fn add_virtio<D: virtio::Device + 'static>(
    bus: &mut Bus,
    wiring: &Wiring,
    device: D,
    window: &mut Window,
) -> Result<(), Error> {
    let bar = window.place(transport::BAR_SIZE)?;
    bus.add(Arc::new(Mutex::new(Transport::new(device, wiring.clone(), bar)?)))?;
    Ok(())
}

/// Puts the network devices on the bus.
fn add_net(
    bus: &mut Bus,
    wiring: &Wiring,
    options: &[NetOptions],
    window: &mut Window,
) -> Result<Vec<VhostUserNet>, Error> {
    let mut devices = Vec::new();
    for options in options {
        let net = VhostUserNet::new(options.clone(), wiring.memory.clone())?;
        add_virtio(bus, wiring, net.clone(), window)?;
        devices.push(net);
    }
    Ok(devices)
}

/// Puts the disks on the bus; their threads are still to be started.
fn add_disks<'a>(
    bus: &mut Bus,
    wiring: &Wiring,
    disks: impl Iterator<Item = (&'a DiskOptions, Image)>,
    vcpus: u8,
    window: &mut Window,
    pausable: &mut Vec<Box<dyn Pausable>>,
) -> Result<Vec<Worker>, Error> {
    let mut workers = Vec::new();
    for (number, (options, image)) in disks.enumerate() {
        let (block, worker) = Block::new(options, image, number, vcpus, wiring.memory.clone())?;
        pausable.push(block.pausable());
        add_virtio(bus, wiring, block, window)?;
        workers.push(worker);
    }
    Ok(workers)
}

/// Puts the FIFO region on the bus.
fn add_fifo(bus: &mut Bus, fifo: &Fifo, slot: KvmSlot, window: &mut Window) -> Result<(), Error> {
    let registers = window.place(ivshmem::REGISTERS_SIZE)?;
    let memory = window.place(fifo.size())?;
    bus.add(Arc::new(Mutex::new(Ivshmem::new(slot, fifo.size(), registers, memory))))?;
    Ok(())
}

/// Moves the host interrupts of the VM's devices to the IVCPU's pCPU.
fn move_host_irqs(options: &MachineOptions) -> Result<Option<HostIrqs>, Error> {
    let Some(ivcpu) = &options.ivcpu else { return Ok(None) };
    let Some(pcpu) = ivcpu.interrupt_pcpu() else { return Ok(None) };
    let of_devices = options.devices.iter().map(|device| IrqSource::PciDevice(device.address.to_string()));
    let sources = ivcpu.host_irqs.iter().cloned().chain(of_devices).collect();
    Ok(Some(HostIrqs::move_to(pcpu, sources)?))
}

fn create_vcpu(
    vm: &VmFd,
    memory: &GuestMemory,
    template: &cpuid::Template,
    thread: VcpuThread,
    entry: Entry,
) -> Result<Vcpu, Error> {
    let VcpuThread { number, name, affinity } = thread;
    let fd = vm.create_vcpu(u64::from(number)).map_err(kvm::refused("a new vCPU"))?;
    fd.set_cpuid2(&template.for_vcpu(number)?).map_err(kvm::refused("the CPUID of a vCPU"))?;
    mtrr::set_up(&fd)?;
    registers::set_up_local_apic(&fd)?;
    if number == 0 {
        registers::set_up_first(&fd, memory, entry)?;
    }
    Ok(Vcpu { number, name, fd, affinity })
}

fn system(step: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::System { step, source }
}
