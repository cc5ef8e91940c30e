use std::collections::BTreeMap;
use std::sync::Mutex;

use proptest::prelude::*;
use vfio_ioctls::VfioError;

use super::super::hardware::{Region, VectorKind};
use super::*;
use crate::gsi::Message;
use crate::pci::msix::tests::Recorder;

const ABOVE: u64 = 0x1_0000_0000;
const MSIX: usize = 0x70;
const MSI: usize = 0x50;
const PM: usize = 0x40;

/// A virtual function like the 82576's: two BARs of 16 KiB with 64 bits of address, three MSI-X vectors in the second; and
/// with MSI of two vectors, which that one has not.
struct Fake {
    bytes: [u8; 256],
    seen: Arc<Seen>,
    /// Whether the host can add vectors to those it gave.
    grows: bool,
}

#[derive(Default)]
struct Seen {
    config_writes: Mutex<Vec<(usize, Vec<u8>)>>,
    bar_writes: Mutex<Vec<(usize, u64, Vec<u8>)>>,
    vectors: Mutex<BTreeMap<u8, Vec<usize>>>,
    /// What the function writes now.
    events: Mutex<Vec<EventFd>>,
}

impl Seen {
    /// How many vectors the host was asked for, one number a request.
    fn requests(&self, kind: VectorKind) -> Vec<usize> {
        self.vectors.lock().unwrap().get(&(kind as u8)).cloned().unwrap_or_default()
    }
}

impl Fake {
    fn new() -> Self {
        let mut bytes = [0; 256];
        let mut set = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        set(0x00, &[0x86, 0x80, 0xca, 0x10]);
        set(0x06, &[0x10, 0]);
        set(0x10, &[0x0c]);
        set(0x1c, &[0x0c]);
        set(0x30, &[1, 0, 0xf0, 0xff]);
        set(0x34, &[PM as u8]);
        set(0x3d, &[1]);
        set(PM, &[0x01, MSI as u8, 3, 0, 8, 0, 0, 0]);
        set(MSI, &[0x05, MSIX as u8, 0x82, 0x01]);
        set(MSIX, &[0x11, 0, 2, 0, 3, 0, 0, 0, 3, 0x20, 0, 0]);
        Self { bytes, seen: Arc::default(), grows: true }
    }
}

impl Hardware for Fake {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        data.copy_from_slice(&self.bytes[offset..offset + data.len()]);
    }
    fn config_write(&self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= 256);
        self.seen.config_writes.lock().unwrap().push((offset, data.to_vec()));
    }
    fn region(&self, bar: usize) -> Region {
        let size = if matches!(bar, 0 | 3) { 0x4000 } else { 0 };
        Region { size, mappable: vec![Range { start: 0, size }] }
    }
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        assert!(offset + data.len() as u64 <= self.region(bar).size);
        data.fill(0x5a);
    }
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        assert!(offset + data.len() as u64 <= self.region(bar).size);
        self.seen.bar_writes.lock().unwrap().push((bar, offset, data.to_vec()));
    }
    fn vectors(&self, kind: VectorKind) -> u32 {
        if kind == VectorKind::MsiX { 3 } else { 2 }
    }
    fn set_vectors(&self, kind: VectorKind, events: &[&EventFd]) -> Result<(), VfioError> {
        let mut vectors = self.seen.vectors.lock().unwrap();
        let requests = vectors.entry(kind as u8).or_default();
        let given = requests.last().copied().unwrap_or(0);
        if !self.grows && given != 0 && events.len() > given {
            return Err(VfioError::VfioDeviceEnableIrq);
        }
        requests.push(events.len());
        *self.seen.events.lock().unwrap() = events.iter().map(|event| event.try_clone().unwrap()).collect();
        Ok(())
    }
}

/// A slot: where its part of the BAR was placed.
struct Place {
    bar: usize,
    range: Range,
    now: Arc<Mutex<BTreeMap<(usize, u64), u64>>>,
}

impl Slot for Place {
    fn place(&mut self, address: Option<u64>) -> Result<(), kvm_ioctls::Error> {
        let mut now = self.now.lock().unwrap();
        match address {
            Some(address) => now.insert((self.bar, self.range.start), address),
            None => now.remove(&(self.bar, self.range.start)),
        };
        Ok(())
    }
}

struct Guest {
    function: Passthrough<Fake, Place>,
    seen: Arc<Seen>,
    recorder: Arc<Recorder>,
    places: Arc<Mutex<BTreeMap<(usize, u64), u64>>>,
    changed: EventFd,
}

fn try_guest(fake: Fake) -> Result<Guest, Error> {
    let (seen, recorder) = (Arc::clone(&fake.seen), Arc::new(Recorder::default()));
    let places = Arc::new(Mutex::new(BTreeMap::new()));
    let changed = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let mut above = Window::new((ABOVE, ABOVE << 1));
    let mut below = Window::new((0xc000_0000, 0xe000_0000));
    let function = Passthrough::new(
        fake,
        &(Arc::clone(&recorder) as Arc<dyn MessageRouter>),
        changed.try_clone().unwrap(),
        Windows { below_4_gib: &mut below, above_4_gib: &mut above },
        |_, bar, range| Ok(Place { bar, range, now: Arc::clone(&places) }),
    )?;
    Ok(Guest { function, seen, recorder, places, changed })
}

fn guest() -> Guest {
    try_guest(Fake::new()).unwrap()
}

impl Guest {
    fn read(&mut self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.function.config_read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        self.function.config_write(offset, data);
    }

    /// Writes a message into an entry of the MSI-X table.
    fn message(&mut self, vector: u64, data: u32) {
        self.function.bar_write(3, vector * 16, &0xfee0_0000u64.to_le_bytes());
        self.function.bar_write(3, vector * 16 + 8, &data.to_le_bytes());
    }

    fn unmask(&mut self, vector: u64) {
        self.function.bar_write(3, vector * 16 + 12, &[0; 4]);
    }

    fn msix_control(&mut self, control: u16) {
        self.write(MSIX + 2, &control.to_le_bytes());
    }
}

#[test]
fn the_guest_sees_the_function_without_rom_and_pin() {
    let mut guest = guest();
    assert_eq!(guest.read(0), 0x10ca_8086);
    assert_eq!((guest.read(0x30), guest.read(0x3c)), (0, 0));
    assert_eq!(guest.read(0x100), u32::MAX, "no extended configuration space");
    assert_eq!([guest.read(0x10), guest.read(0x14)], [0xc, 1]);
    assert_eq!([guest.read(0x1c), guest.read(0x20)], [0x400c, 1]);
    guest.write(0x10, &[0xff; 8]);
    assert_eq!(guest.read(0x10), 0xffff_c00c);
}

#[test]
fn registers_are_direct_except_the_pages_with_table_and_pending_bits() {
    let mut guest = guest();
    assert!(guest.places.lock().unwrap().is_empty(), "decoding is off");
    guest.write(0x04, &[6, 0]);
    let expected = [((0, 0), ABOVE), ((3, 0x1000), ABOVE + 0x5000), ((3, 0x3000), ABOVE + 0x7000)];
    assert_eq!(*guest.places.lock().unwrap(), BTreeMap::from(expected));
    guest.write(0x10, &0x8000_0000u32.to_le_bytes());
    assert_eq!(guest.places.lock().unwrap()[&(0, 0)], 0x1_8000_0000);
    guest.write(0x04, &[0, 0]);
    assert!(guest.places.lock().unwrap().is_empty());
    let command: Vec<_> = guest.seen.config_writes.lock().unwrap().clone();
    assert_eq!(command, [(4, vec![0, 0]), (4, vec![6, 0]), (4, vec![0, 0])], "and no BAR");
}

#[test]
fn the_host_gives_as_many_vectors_as_the_driver_prepared() {
    let mut guest = guest();
    guest.msix_control(0xc000);
    guest.message(0, 0x41);
    guest.message(1, 0x42);
    assert_eq!(guest.seen.requests(VectorKind::MsiX), [0usize; 0]);
    guest.msix_control(0x8000);
    assert_eq!(guest.seen.requests(VectorKind::MsiX), [2]);
    guest.unmask(1);
    assert_eq!(guest.recorder.message(1), Some(Message { address: 0xfee0_0000, data: 0x42 }));
    assert_eq!(guest.changed.read().unwrap(), 1, "said once");
    guest.unmask(2);
    assert_eq!(guest.seen.requests(VectorKind::MsiX), [2, 3], "one more than it prepared");
    guest.msix_control(0);
    assert_eq!(guest.seen.requests(VectorKind::MsiX), [2, 3, 0]);
    assert_eq!(guest.recorder.message(1), None);
}

#[test]
fn a_host_that_cannot_add_vectors_gives_all_anew() {
    let mut guest = try_guest(Fake { grows: false, ..Fake::new() }).unwrap();
    guest.msix_control(0x8000);
    guest.message(0, 0x41);
    guest.message(2, 0x43);
    assert_eq!(guest.seen.requests(VectorKind::MsiX), [1, 0, 3]);
}

#[test]
fn msi_takes_its_message_from_configuration_space() {
    let mut guest = guest();
    guest.write(MSI + 4, &0xfee0_1000u32.to_le_bytes());
    guest.write(MSI + 12, &[0x50, 0]);
    guest.write(MSI + 2, &0x0011u16.to_le_bytes());
    assert_eq!(guest.seen.requests(VectorKind::Msi), [2]);
    // The three vectors of MSI-X come first.
    assert_eq!(guest.recorder.message(4), Some(Message { address: 0xfee0_1000, data: 0x51 }));
    guest.write(MSI + 16, &[0b10, 0, 0, 0]);
    assert_eq!(guest.recorder.message(4), None, "masked");
    guest.seen.events.lock().unwrap()[1].write(1).unwrap();
    assert_eq!(guest.read(MSI + 20), 0b10, "pending");
    guest.write(MSI + 2, &[0, 0]);
    assert_eq!(guest.seen.requests(VectorKind::Msi), [2, 0]);
}

#[test]
fn power_stays_on() {
    let mut guest = guest();
    guest.write(PM + 4, &[3, 0]);
    assert_eq!(guest.read(PM + 4) & 3, 0);
    assert_eq!(
        guest.seen.config_writes.lock().unwrap().len(),
        1,
        "only the first one, of the command register"
    );
}

#[test]
fn what_is_not_emulated_reaches_the_function() {
    let mut guest = guest();
    let mut data = [0; 4];
    guest.function.bar_read(0, 8, &mut data);
    assert_eq!(data, [0x5a; 4]);
    guest.function.bar_write(0, 8, &[1; 4]);
    guest.function.bar_write(3, 0x2000, &[1; 4]);
    assert_eq!(*guest.seen.bar_writes.lock().unwrap(), [(0, 8, vec![1; 4])], "pending bits are read-only");
    guest.function.bar_read(3, 0, &mut data);
    assert_eq!(data, [0; 4], "the table is ours");
}

#[test]
fn a_function_with_an_interrupt_pin_only_is_refused() {
    let mut fake = Fake::new();
    fake.bytes[0x34] = 0;
    let error = try_guest(fake).err().unwrap().to_string();
    assert!(error.contains("neither MSI nor MSI-X"), "{error}");
}

#[test]
fn structures_outside_the_bars_are_refused() {
    let mut fake = Fake::new();
    fake.bytes[MSIX + 4..MSIX + 8].copy_from_slice(&0x3ff3u32.to_le_bytes());
    assert!(matches!(try_guest(fake), Err(Error::Interrupts(interrupts::Error::NoRoom))));
    let mut fake = Fake::new();
    fake.bytes[MSIX + 4] = 7;
    assert!(matches!(try_guest(fake), Err(Error::Interrupts(interrupts::Error::NoRoom))));
}

proptest! {
    #[test]
    fn any_guest_is_safe(
        accesses in proptest::collection::vec(
            (0u8..4, 0usize..0x200, 0u64..0x4008, proptest::collection::vec(any::<u8>(), 0..9)), 0..100)
    ) {
        let mut guest = guest();
        for (kind, offset, at, mut data) in accesses {
            let bar = if at % 2 == 0 { 0 } else { 3 };
            let inside = at + data.len() as u64 <= 0x4000;
            match kind {
                0 => guest.function.config_read(offset, &mut data),
                1 => guest.function.config_write(offset, &data),
                2 if inside => guest.function.bar_read(bar, at, &mut data),
                _ if inside => guest.function.bar_write(bar, at, &data),
                _ => {}
            }
            // The guest's registers are where its BARs are, and the table is nowhere.
            let mappings = guest.function.mappings();
            for ((bar, start), address) in guest.places.lock().unwrap().iter() {
                let mapping = mappings.iter().find(|mapping| mapping.bar == *bar);
                prop_assert_eq!(mapping.map(|mapping| mapping.start + start), Some(*address));
            }
            for (offset, data) in guest.seen.config_writes.lock().unwrap().iter() {
                let ours = |at: usize| (0x10..0x28).contains(&at) || (MSIX..MSIX + 12).contains(&at) || (MSI..MSI + 24).contains(&at);
                prop_assert!(!(*offset..offset + data.len()).any(ours));
            }
            prop_assert!(guest.seen.requests(VectorKind::MsiX).iter().all(|&count| count <= 3));
        }
    }
}
