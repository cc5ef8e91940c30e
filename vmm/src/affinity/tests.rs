use std::os::unix::fs::symlink;

use event_manager::{EventManager, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;

use super::*;

/// A fake host with the interrupts 24 and 25 of a PCI function, shown as `eth0` too, and 30 of nobody.
struct Host {
    directory: tempfile::TempDir,
}

const FUNCTION: &str = "0000:01:10.0";

impl Host {
    fn new() -> Host {
        let host = Host { directory: tempfile::tempdir().unwrap() };
        let roots = host.roots();
        for (irq, list) in [(24, "0-3"), (25, "1"), (30, "0-3")] {
            fs::create_dir_all(roots.irqs.join(irq.to_string())).unwrap();
            host.set(irq, list);
        }
        let function = roots.pci_devices.join(FUNCTION);
        fs::create_dir_all(function.join("msi_irqs")).unwrap();
        for irq in ["24", "25"] {
            fs::write(function.join("msi_irqs").join(irq), "msix").unwrap();
        }
        fs::create_dir_all(function.join("virtio0")).unwrap();
        for (name, device) in
            [("eth0", Some(function.clone())), ("virt0", Some(function.join("virtio0"))), ("tap0", None)]
        {
            let interface = roots.interfaces.join(name);
            fs::create_dir_all(&interface).unwrap();
            if let Some(device) = device {
                symlink(device, interface.join("device")).unwrap();
            }
        }
        host
    }

    fn roots(&self) -> Roots {
        let root = self.directory.path();
        Roots {
            irqs: root.join("irq"),
            pci_devices: root.join("pci"),
            interfaces: root.join("net"),
            journals: root.join("run/ivcpu"),
        }
    }

    fn set(&self, irq: u32, list: &str) {
        set_affinity(&self.roots(), irq, &format!("{list}\n")).unwrap();
    }

    /// The affinities of 24, 25 and 30.
    fn affinities(&self) -> [String; 3] {
        [24, 25, 30].map(|irq| affinity(&self.roots(), irq).unwrap().unwrap().allowed)
    }

    fn move_to(&self, pcpu: usize, source: &str) -> Result<HostIrqs, Error> {
        HostIrqs::move_in(self.roots(), pcpu, vec![source.parse().unwrap()])
    }

    fn journals(&self) -> usize {
        fs::read_dir(self.roots().journals)
            .map_or(0, |entries| entries.flatten().filter(|entry| entry.file_name() != "lock").count())
    }
}

/// What a kill does: the guard's lock goes, its journal and the affinities stay.
fn kill(mut irqs: HostIrqs) {
    irqs.journal = None;
}

#[test]
fn every_interrupt_of_a_device_moves_and_returns() {
    for source in [FUNCTION, "eth0", "virt0"] {
        let host = Host::new();
        let irqs = host.move_to(3, source).unwrap();
        assert_eq!(host.affinities(), ["3", "3", "0-3"], "{source}");
        assert_eq!(irqs.moved().collect::<Vec<_>>(), [24, 25]);
        drop(irqs);
        assert_eq!(host.affinities(), ["0-3", "1", "0-3"], "{source}");
        assert_eq!(host.journals(), 0);
    }
}

#[test]
fn without_interrupts_nothing_is_touched() {
    let host = Host::new();
    let irqs = HostIrqs::move_in(host.roots(), 3, Vec::new()).unwrap();
    assert_eq!(irqs.moved().count(), 0);
    assert!(!host.roots().journals.exists());
}

#[test]
fn devices_without_interrupts_are_errors() {
    let host = Host::new();
    assert!(matches!(host.move_to(3, "0000:99:00.0"), Err(Error::NoDevice { .. })));
    assert!(matches!(host.move_to(3, "eth9"), Err(Error::NoDevice { .. })));
    assert!(matches!(host.move_to(3, "tap0"), Err(Error::NoHardware { name }) if name == "tap0"));
}

#[test]
fn an_interrupt_that_appears_later_is_moved_by_an_update() {
    let host = Host::new();
    let mut irqs = host.move_to(3, FUNCTION).unwrap();
    fs::write(host.roots().pci_devices.join(FUNCTION).join("msi_irqs/30"), "msix").unwrap();
    host.set(24, "0-3"); // a balancer at work
    irqs.update().unwrap();
    assert_eq!(host.affinities(), ["3", "3", "3"]);
    drop(irqs);
    assert_eq!(host.affinities(), ["0-3", "1", "0-3"]);
}

#[test]
fn the_event_loop_looks_again() {
    let host = Host::new();
    let mut events = EventManager::new().unwrap();
    let changed = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let irqs = host.move_to(3, FUNCTION).unwrap();
    events.add_subscriber(refresh::Refresh::new(irqs, changed.try_clone().unwrap()).unwrap());
    host.set(24, "0-3"); // a balancer at work
    assert_eq!(events.run_with_timeout(10_000).unwrap(), 1);
    assert_eq!(host.affinities(), ["3", "3", "0-3"]);
    let before = std::time::Instant::now();
    host.set(25, "0-3"); // the function got this interrupt just now
    changed.write(1).unwrap();
    assert_eq!(events.run_with_timeout(10_000).unwrap(), 1);
    assert_eq!(host.affinities(), ["3", "3", "0-3"]);
    assert!(before.elapsed() < refresh::PERIOD, "at once");
    drop(events);
    assert_eq!(host.affinities(), ["0-3", "1", "0-3"]);
}

#[test]
fn an_update_leaves_a_shared_interrupt_to_the_vmm_that_came_last() {
    let host = Host::new();
    let mut first = host.move_to(3, "24").unwrap();
    let mut second = host.move_to(2, "24").unwrap();
    for vmm in [&mut first, &mut second] {
        vmm.update().unwrap();
        assert_eq!(host.affinities()[0], "2");
    }
    host.set(24, "0-3"); // a balancer at work
    second.update().unwrap();
    assert_eq!(host.affinities()[0], "2");
}

#[test]
fn a_killed_run_is_undone_by_the_next() {
    let host = Host::new();
    kill(host.move_to(3, FUNCTION).unwrap());
    assert_eq!(host.affinities(), ["3", "3", "0-3"]);
    recover_in(&host.roots()).unwrap();
    assert_eq!(host.affinities(), ["0-3", "1", "0-3"]);
    assert_eq!(host.journals(), 0);
}

#[test]
fn a_running_vmm_is_not_undone_by_the_next() {
    let host = Host::new();
    let running = host.move_to(3, FUNCTION).unwrap();
    let next = host.move_to(2, "30").unwrap();
    assert_eq!(host.affinities(), ["3", "3", "2"]);
    drop(next);
    assert_eq!(host.affinities(), ["3", "3", "0-3"]);
    drop(running);
    assert_eq!(host.affinities(), ["0-3", "1", "0-3"]);
}

#[test]
fn vmms_that_share_an_interrupt_restore_what_was_before_both() {
    for first_leaves_first in [true, false] {
        let host = Host::new();
        let first = host.move_to(3, "24").unwrap();
        let second = host.move_to(2, "24").unwrap();
        assert_eq!(host.affinities()[0], "2");
        let (leaves, stays, stays_on) =
            if first_leaves_first { (first, second, "2") } else { (second, first, "3") };
        drop(leaves);
        assert_eq!(host.affinities()[0], stays_on);
        drop(stays);
        assert_eq!(host.affinities()[0], "0-3");
    }
}

#[test]
fn a_shared_interrupt_survives_the_kill_of_one_vmm() {
    let host = Host::new();
    let first = host.move_to(3, "24").unwrap();
    kill(host.move_to(2, "24").unwrap());
    recover_in(&host.roots()).unwrap();
    assert_eq!(host.affinities()[0], "3");
    drop(first);
    assert_eq!(host.affinities()[0], "0-3");
}

#[test]
fn an_affinity_set_by_somebody_else_is_left_alone() {
    let host = Host::new();
    let irqs = host.move_to(3, FUNCTION).unwrap();
    host.set(24, "0");
    drop(irqs);
    assert_eq!(host.affinities(), ["0", "1", "0-3"]);
}

#[test]
fn a_device_that_is_gone_does_not_stop_the_others_from_being_restored() {
    let host = Host::new();
    let irqs = host.move_to(3, FUNCTION).unwrap();
    fs::remove_dir_all(host.roots().irqs.join("24")).unwrap();
    drop(irqs);
    assert_eq!(affinity(&host.roots(), 25).unwrap().unwrap().allowed, "1");
    assert_eq!(host.journals(), 0);
}

#[test]
fn sources_are_told_apart_by_their_form() {
    let source = |text: &str| text.parse::<IrqSource>().unwrap();
    assert_eq!(source("24"), IrqSource::Irq(24));
    assert_eq!(source(FUNCTION), IrqSource::PciDevice(FUNCTION.into()));
    assert_eq!(source("enp1s0"), IrqSource::Interface("enp1s0".into()));
}
