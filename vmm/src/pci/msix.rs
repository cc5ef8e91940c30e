//! MSI-X of one function: the table and pending bits the guest sees, and the [`Line`] behind each vector.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::line::Line;
use crate::gsi::{Error, Message, MessageRouter};

/// Capability id of MSI-X.
pub const CAPABILITY: u8 = 0x11;
/// Bits of the message control word a guest may change: enable and function mask.
pub const CONTROL_WRITABLE: u16 = 0xc000;
/// Bytes of a table entry.
pub const ENTRY_SIZE: u64 = 16;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const ENTRY_MASKED: u32 = 1;

/// A table entry, and what is behind it.
struct Vector {
    message: Message,
    control: u32,
    line: Line,
}

/// The MSI-X state of a function.
pub struct Msix {
    router: Arc<dyn MessageRouter>,
    vectors: Vec<Vector>,
    control: u16,
}

impl Msix {
    /// A table of `count` vectors, all masked.
    pub fn new(router: Arc<dyn MessageRouter>, count: u16) -> Result<Self, Error> {
        let vector = |_| {
            let line = Line::new(&*router)?;
            Ok(Vector { message: Message::default(), control: ENTRY_MASKED, line })
        };
        let vectors = (0..count).map(vector).collect::<Result<_, Error>>()?;
        Ok(Self { router, vectors, control: 0 })
    }

    /// The body of the capability: message control, then where table and pending bits are.
    pub fn capability(&self, bar: u32, table: u32, pending: u32) -> [u8; 10] {
        let mut body = [0; 10];
        let last = (self.vectors.len() as u16).saturating_sub(1);
        body[..2].copy_from_slice(&last.to_le_bytes());
        body[2..6].copy_from_slice(&(table | bar).to_le_bytes());
        body[6..].copy_from_slice(&(pending | bar).to_le_bytes());
        body
    }

    /// Vectors in the table.
    pub fn len(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Whether there is no vector at all.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// The eventfd whose writes interrupt the guest through this vector.
    pub fn event(&self, vector: u16) -> Option<&EventFd> {
        self.vectors.get(usize::from(vector)).map(|vector| vector.line.event())
    }

    /// Whether the guest has switched MSI-X on.
    pub fn is_enabled(&self) -> bool {
        self.control & CONTROL_ENABLE != 0
    }

    /// Whether vectors reach the guest at all: MSI-X is on, and the function is not masked as a whole.
    pub fn delivers(&self) -> bool {
        self.is_enabled() && self.control & CONTROL_FUNCTION_MASK == 0
    }

    /// How many vectors, from the first on, cover every one the guest has given a message or unmasked.
    pub fn in_use(&self) -> u16 {
        let used = |vector: &Vector| vector.message.address != 0 || vector.control & ENTRY_MASKED == 0;
        self.vectors.iter().rposition(used).map_or(0, |last| last as u16 + 1)
    }

    /// The guest wrote the message control word.
    pub fn set_control(&mut self, control: u16) {
        if control != self.control {
            self.control = control;
            (0..self.vectors.len()).for_each(|index| self.apply(index));
        }
    }

    /// The guest reads the table. Aligned 4 and 8 byte accesses; anything else reads as ones.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let Some((index, word)) = self.locate(offset, data.len()) else { return data.fill(0xff) };
        let entry = self.vectors[index].words();
        for (target, word) in data.chunks_mut(4).zip(&entry[word..]) {
            target.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// The guest writes the table. Anything but aligned 4 and 8 byte accesses is ignored.
    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        let Some((index, first)) = self.locate(offset, data.len()) else { return };
        let vector = &mut self.vectors[index];
        for (word, bytes) in (first..).zip(data.chunks(4)) {
            let value = bytes.try_into().map_or(0, u32::from_le_bytes);
            match word {
                // The two lowest bits of the address are reserved.
                0 => vector.message.address = (vector.message.address & !0xffff_ffff) | u64::from(value & !3),
                1 => {
                    vector.message.address = (vector.message.address & 0xffff_ffff) | (u64::from(value) << 32)
                }
                2 => vector.message.data = value,
                _ => vector.control = value & ENTRY_MASKED,
            }
        }
        self.apply(index);
    }

    /// The guest reads the pending bits: those of masked vectors whose eventfd was written.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let first = (offset as usize).saturating_add(index).saturating_mul(8);
            *byte = (0..8).fold(0, |bits, bit| {
                let vector = self.vectors.get(first.saturating_add(bit));
                let pending = vector.is_some_and(|vector| vector.line.is_pending());
                bits | (u8::from(pending) << bit)
            });
        }
    }

    /// Entry and first word of an access, if it is one the table allows.
    fn locate(&self, offset: u64, length: usize) -> Option<(usize, usize)> {
        let (index, at) = ((offset / ENTRY_SIZE) as usize, offset % ENTRY_SIZE);
        let allowed = matches!(length, 4 | 8) && at % length as u64 == 0 && index < self.vectors.len();
        allowed.then_some((index, at as usize / 4))
    }

    /// Ties or cuts one vector so that it matches what the guest wrote.
    fn apply(&mut self, index: usize) {
        let on = self.delivers();
        let vector = &mut self.vectors[index];
        let unmasked = on && vector.control & ENTRY_MASKED == 0;
        vector.line.point(&*self.router, unmasked.then_some(vector.message));
    }
}

impl Vector {
    fn words(&self) -> [u32; 4] {
        [self.message.address as u32, (self.message.address >> 32) as u32, self.message.data, self.control]
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    /// A router that remembers what is tied, as KVM would.
    #[derive(Default)]
    pub(crate) struct Recorder(Mutex<Vec<Line>>);

    #[derive(Default)]
    struct Line {
        message: Message,
        tied: bool,
    }

    impl Recorder {
        /// Where the GSI leads, if an eventfd is tied to it.
        pub(crate) fn message(&self, gsi: u32) -> Option<Message> {
            self.0.lock().unwrap().get(gsi as usize).filter(|line| line.tied).map(|line| line.message)
        }
    }

    impl MessageRouter for Recorder {
        fn allocate(&self) -> Result<u32, Error> {
            let mut lines = self.0.lock().unwrap();
            lines.push(Line::default());
            Ok(lines.len() as u32 - 1)
        }
        fn route(&self, gsi: u32, message: Message) -> Result<(), Error> {
            self.0.lock().unwrap()[gsi as usize].message = message;
            Ok(())
        }
        fn connect(&self, gsi: u32, _: &EventFd) -> Result<(), Error> {
            assert!(!std::mem::replace(&mut self.0.lock().unwrap()[gsi as usize].tied, true), "tied twice");
            Ok(())
        }
        fn disconnect(&self, gsi: u32, _: &EventFd) -> Result<(), Error> {
            assert!(std::mem::replace(&mut self.0.lock().unwrap()[gsi as usize].tied, false), "cut twice");
            Ok(())
        }
    }

    fn msix(count: u16) -> (Msix, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        (Msix::new(Arc::clone(&recorder) as Arc<dyn MessageRouter>, count).unwrap(), recorder)
    }

    fn pending(msix: &Msix) -> u8 {
        let mut byte = [0];
        msix.pending_read(0, &mut byte);
        byte[0]
    }

    #[test]
    fn a_vector_is_tied_while_it_is_unmasked_in_all_three_places() {
        let (mut msix, recorder) = msix(2);
        msix.table_write(16, &0xfee0_1003u32.to_le_bytes());
        msix.table_write(24, &0x41u32.to_le_bytes());
        msix.table_write(28, &0u32.to_le_bytes());
        assert_eq!(recorder.message(1), None, "MSI-X is off");
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        assert_eq!(recorder.message(1), None, "function masked");
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(recorder.message(1), Some(Message { address: 0xfee0_1000, data: 0x41 }));
        assert_eq!(recorder.message(0), None, "its entry is masked");
        msix.table_write(28, &1u32.to_le_bytes());
        assert_eq!(recorder.message(1), None);
    }

    #[test]
    fn a_new_message_reroutes_a_live_vector() {
        let (mut msix, recorder) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        msix.table_write(8, &[0x41, 0, 0, 0, 0, 0, 0, 0]);
        msix.table_write(0, &0xfee0_2000u64.to_le_bytes());
        assert_eq!(recorder.message(0), Some(Message { address: 0xfee0_2000, data: 0x41 }));
    }

    #[test]
    fn what_comes_while_masked_is_pending_and_not_lost() {
        let (mut msix, _) = msix(3);
        msix.event(2).unwrap().write(1).unwrap();
        assert_eq!(pending(&msix), 0b100);
        msix.set_control(CONTROL_ENABLE);
        msix.table_write(2 * 16 + 12, &0u32.to_le_bytes());
        assert_eq!(pending(&msix), 0, "delivered by whoever has the eventfd now");
        assert_eq!(msix.event(2).unwrap().read().unwrap(), 1, "still in the eventfd for KVM to find");
    }

    proptest! {
        #[test]
        fn any_access_is_safe_and_the_tie_follows_the_masks(
            accesses in proptest::collection::vec((0u8..4, 0u64..200, any::<u64>(), 0usize..10), 0..100)
        ) {
            let (mut msix, recorder) = msix(5);
            for (kind, offset, value, length) in accesses {
                let mut data = value.to_le_bytes().repeat(2);
                data.truncate(length);
                match kind {
                    0 => msix.table_write(offset, &data),
                    1 => msix.table_read(offset, &mut data),
                    2 => msix.pending_read(value, &mut data),
                    _ => msix.set_control(value as u16 & CONTROL_WRITABLE),
                }
            }
            let on = msix.control == CONTROL_ENABLE;
            for (gsi, vector) in msix.vectors.iter().enumerate() {
                let live = on && vector.control == 0;
                prop_assert_eq!(recorder.message(gsi as u32), live.then_some(vector.message));
            }
        }
    }
}
