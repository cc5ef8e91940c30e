//! A driver, friendly and hostile, against the transport.

use std::collections::BTreeMap;
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::pci::msix::tests::Recorder;

const BAR: u64 = 0x1_0000_0000;
const VERSION_1: u64 = 1 << 32;

#[derive(Default)]
struct Kicks(Mutex<BTreeMap<u64, EventFd>>);

impl KickRouter for Kicks {
    fn connect(&self, address: u64, event: &EventFd) -> Result<(), kvm_ioctls::Error> {
        let taken = self.0.lock().unwrap().insert(address, event.try_clone().unwrap());
        assert!(taken.is_none(), "one address, two eventfds");
        Ok(())
    }
    fn disconnect(&self, address: u64, _: &EventFd) -> Result<(), kvm_ioctls::Error> {
        assert!(self.0.lock().unwrap().remove(&address).is_some());
        Ok(())
    }
}

#[derive(Default)]
struct Seen {
    activations: Vec<Activation>,
    resets: usize,
    kicked: Vec<u16>,
}

/// A device with two queues for somebody else and a third it serves itself.
#[derive(Clone, Default)]
struct Probe(Arc<Mutex<Seen>>);

impl Device for Probe {
    fn id(&self) -> u16 {
        1
    }
    fn class(&self) -> u32 {
        0x02_0000
    }
    fn features(&self) -> u64 {
        0b11
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 256, 64]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn activate(&mut self, activation: Activation) {
        let mut seen = self.0.lock().unwrap();
        assert_eq!(seen.activations.len(), seen.resets, "activated twice");
        seen.activations.push(activation);
    }
    fn serves(&self, queue: u16) -> bool {
        queue == 2
    }
    fn kicked(&mut self, queue: u16) {
        self.0.lock().unwrap().kicked.push(queue);
    }
    fn reset(&mut self) {
        self.0.lock().unwrap().resets += 1;
    }
}

struct Rig {
    transport: Transport<Probe>,
    probe: Probe,
    kicks: Arc<Kicks>,
    recorder: Arc<Recorder>,
}

impl Rig {
    fn new() -> Self {
        let (probe, kicks, recorder) =
            (Probe::default(), Arc::new(Kicks::default()), Arc::new(Recorder::default()));
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let wiring = Wiring {
            memory,
            messages: Arc::clone(&recorder) as Arc<dyn MessageRouter>,
            kicks: Arc::clone(&kicks) as Arc<dyn KickRouter>,
        };
        let mut transport = Transport::new(probe.clone(), wiring, BAR).unwrap();
        transport.config_write(4, &[6, 0]);
        Self { transport, probe, kicks, recorder }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.transport.bar_write(0, offset, bytes);
    }

    fn read(&mut self, offset: u64) -> u8 {
        let mut byte = [0];
        self.transport.bar_read(0, offset, &mut byte);
        byte[0]
    }

    /// Brings the device up as a driver does, with queue `index` at `base`, vector 1 + index.
    fn bring_up(&mut self, base: u64) {
        self.write(0x14, &[3]);
        self.write(0x08, &1u32.to_le_bytes());
        self.write(0x0c, &((VERSION_1 >> 32) as u32).to_le_bytes());
        self.write(0x14, &[0xb]);
        self.write(0x10, &0u16.to_le_bytes());
        for index in 0..3u16 {
            let start = base + 0x4000 * u64::from(index);
            self.write(0x16, &index.to_le_bytes());
            self.write(0x1a, &(index + 1).to_le_bytes());
            self.write(0x20, &start.to_le_bytes());
            self.write(0x28, &(start + 0x1000).to_le_bytes());
            self.write(0x30, &(start + 0x2000).to_le_bytes());
            self.write(0x1c, &1u16.to_le_bytes());
        }
        self.write(0x14, &[0xf]);
    }
}

#[test]
fn a_driver_that_is_ready_activates_the_device_and_wires_its_kicks() {
    let mut rig = Rig::new();
    rig.bring_up(0x1_0000);
    let seen = rig.probe.0.lock().unwrap();
    let queues: Vec<_> = seen.activations[0].queues.iter().map(|q| (q.index, q.descriptors)).collect();
    assert_eq!(queues, [(0, 0x1_0000), (1, 0x1_4000), (2, 0x1_8000)]);
    let wired: Vec<_> = rig.kicks.0.lock().unwrap().keys().copied().collect();
    assert_eq!(wired, [BAR + 0x3000, BAR + 0x3004], "not the one the device serves itself");
}

#[test]
fn calls_and_kicks_meet_at_the_eventfds() {
    let mut rig = Rig::new();
    rig.transport.config_write(rig.transport.msix_capability + 2, &[0, 0x80]);
    rig.write(MSIX_TABLE + 2 * 16, &0xfee0_0000u64.to_le_bytes());
    rig.write(MSIX_TABLE + 2 * 16 + 8, &0x33u64.to_le_bytes());
    rig.bring_up(0x1_0000);
    assert_eq!(rig.recorder.message(2).unwrap().data, 0x33, "vector 2 of queue 1 is live");
    let seen = rig.probe.0.lock().unwrap();
    seen.activations[0].queues[1].call.write(1).unwrap();
    assert_eq!(rig.transport.msix.event(2).unwrap().read().unwrap(), 1);
    rig.kicks.0.lock().unwrap()[&(BAR + 0x3004)].write(1).unwrap();
    assert_eq!(seen.activations[0].queues[1].kick.read().unwrap(), 1);
}

#[test]
fn a_kick_that_comes_out_to_user_space_is_served() {
    let mut rig = Rig::new();
    rig.write(NOTIFY, &[0, 0]);
    rig.bring_up(0x1_0000);
    rig.write(NOTIFY + 8, &[2, 0]);
    rig.write(NOTIFY, &[0, 0]);
    rig.write(NOTIFY + 0xffc, &[0, 0]);
    let seen = rig.probe.0.lock().unwrap();
    assert_eq!(seen.kicked, [2]);
    assert_eq!(
        seen.activations[0].queues[0].kick.read().unwrap(),
        1,
        "once: the first came before the device ran"
    );
}

#[test]
fn a_ring_outside_memory_stops_the_device() {
    let mut rig = Rig::new();
    rig.bring_up(0xf_8000);
    assert!(rig.probe.0.lock().unwrap().activations.is_empty());
    assert_ne!(rig.read(0x14) & 0x40, 0, "needs reset");
    assert_eq!(rig.transport.msix.event(0).unwrap().read().unwrap(), 1, "and says so");
    assert!(rig.kicks.0.lock().unwrap().is_empty());
    rig.write(0x14, &[0]);
    assert_eq!(rig.read(0x14), 0);
}

#[test]
fn a_device_that_meets_nonsense_asks_once_for_a_reset() {
    let mut rig = Rig::new();
    rig.bring_up(0x1_0000);
    for _ in 0..2 {
        rig.probe.0.lock().unwrap().activations[0].queues[1].config_change.ask_for_reset();
    }
    assert_ne!(rig.read(0x14) & 0x40, 0, "needs reset");
    assert_eq!(rig.transport.msix.event(0).unwrap().read().unwrap(), 1);
    rig.write(0x14, &[0]);
    assert_eq!(rig.read(0x14), 0);
}

#[test]
fn reset_cuts_everything_and_a_second_driver_can_come() {
    let mut rig = Rig::new();
    for round in 1..=2 {
        rig.bring_up(0x1_0000);
        rig.write(0x14, &[0]);
        assert_eq!(rig.read(0x14), 0);
        assert!(rig.kicks.0.lock().unwrap().is_empty());
        let seen = rig.probe.0.lock().unwrap();
        assert_eq!((seen.activations.len(), seen.resets), (round, round));
    }
}

#[test]
fn kicks_follow_the_bar_of_a_running_device() {
    let mut rig = Rig::new();
    rig.bring_up(0x1_0000);
    rig.transport.config_write(0x14, &2u32.to_le_bytes());
    let wired: Vec<_> = rig.kicks.0.lock().unwrap().keys().copied().collect();
    assert_eq!(wired, [0x2_0000_3000, 0x2_0000_3004]);
    rig.transport.config_write(4, &[0, 0]);
    assert!(rig.kicks.0.lock().unwrap().is_empty(), "memory decoding is off");
}

#[test]
fn a_change_of_the_configuration_interrupts_and_counts() {
    let mut rig = Rig::new();
    rig.bring_up(0x1_0000);
    let before = rig.read(0x15);
    rig.probe.0.lock().unwrap().activations[0].config_change.announce();
    assert_eq!(rig.read(0x15), before.wrapping_add(1));
    assert_eq!(rig.transport.msix.event(0).unwrap().read().unwrap(), 1);
    assert_eq!((rig.read(ISR), rig.read(ISR)), (2, 0), "reading clears");
}

#[test]
fn the_bar_can_be_reached_through_configuration_space() {
    let mut rig = Rig::new();
    let access = rig.transport.access_capability;
    rig.transport.config_write(access + 8, &0x12u32.to_le_bytes());
    rig.transport.config_write(access + 12, &2u32.to_le_bytes());
    let mut data = [0; 4];
    rig.transport.config_read(access + 16, &mut data);
    assert_eq!(data[..2], [3, 0], "number of queues");
    for (offset, length) in [(BAR_SIZE as u32, 4u32), (0xffff_fffc, 4), (1, 2), (0, 3), (0, 0xffff_ffff)] {
        rig.transport.config_write(access + 8, &offset.to_le_bytes());
        rig.transport.config_write(access + 12, &length.to_le_bytes());
        assert_eq!(rig.transport.accessed(), None, "{offset:#x} {length:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_sequence_of_accesses_panics_or_moves_a_live_ring(
        accesses in proptest::collection::vec(
            (0u8..5, 0u64..0x9000, any::<u64>(), 0usize..9), 0..200)
    ) {
        let mut rig = Rig::new();
        rig.bring_up(0x1_0000);
        for (kind, offset, value, length) in accesses {
            let mut data = value.to_le_bytes().to_vec();
            data.truncate(length);
            match kind {
                0 => rig.transport.bar_read(0, offset, &mut data),
                1 => rig.transport.bar_write(0, offset, &data),
                // The common registers, with values that mean something, over and over.
                2 => rig.transport.bar_write(0, offset % 0x40, &data.iter().map(|b| b % 16).collect::<Vec<_>>()),
                3 => rig.transport.config_read(offset as usize % 300, &mut data),
                _ => rig.transport.config_write(offset as usize % 300, &data),
            }
        }
        // Every activation got rings inside memory, whatever was written.
        for activation in &rig.probe.0.lock().unwrap().activations {
            for queue in &activation.queues {
                prop_assert!(queue.descriptors + 16 * u64::from(queue.size) <= 0x10_0000);
                prop_assert!(queue.used + 6 + 8 * u64::from(queue.size) <= 0x10_0000);
            }
        }
    }
}
