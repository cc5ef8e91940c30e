//! MSI of one function: up to 32 vectors that share one message, each with a [`Line`]. What the guest wrote stays in
//! configuration space; this reads it from there.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::line::Line;
use crate::gsi::{Error, Message, MessageRouter};

/// Capability id of MSI.
pub const CAPABILITY: u8 = 0x05;

const CONTROL: usize = 2;
const CONTROL_ENABLE: u16 = 1;
const CONTROL_WRITABLE: u16 = 0x71;
const CONTROL_64_BIT: u16 = 1 << 7;
const CONTROL_MASKABLE: u16 = 1 << 8;
const ADDRESS: usize = 4;
/// Most vectors MSI has.
const MOST: u16 = 32;

/// The MSI state of a function.
pub struct Msi {
    router: Arc<dyn MessageRouter>,
    lines: Vec<Line>,
    /// Where the message data is in the capability.
    data: usize,
    /// Where the mask bits are, if there are any; the pending bits follow.
    mask: Option<usize>,
    /// How many vectors the guest has switched on.
    enabled: u16,
}

impl Msi {
    /// What the message control word of a function's capability says it has, all off.
    pub fn new(router: Arc<dyn MessageRouter>, control: u16) -> Result<Self, Error> {
        let vectors = (1 << (control >> 1 & 7)).min(MOST);
        let lines = (0..vectors).map(|_| Line::new(&*router)).collect::<Result<_, _>>()?;
        let data = if control & CONTROL_64_BIT != 0 { 12 } else { 8 };
        let mask = (control & CONTROL_MASKABLE != 0).then_some(data + 4);
        Ok(Self { router, lines, data, mask, enabled: 0 })
    }

    /// Bits of the capability, from its id on, that a guest may change; as long as the capability.
    pub fn writable(&self) -> Vec<u8> {
        let mut writable = vec![0; self.mask.map_or(self.data + 2, |mask| mask + 8)];
        let mut allow = |at: usize, bits: &[u8]| writable[at..at + bits.len()].copy_from_slice(bits);
        allow(CONTROL, &CONTROL_WRITABLE.to_le_bytes());
        allow(ADDRESS, &[0xfc, 0xff, 0xff, 0xff]);
        if self.data == 12 {
            allow(ADDRESS + 4, &[0xff; 4]);
        }
        allow(self.data, &[0xff; 2]);
        if let Some(mask) = self.mask {
            allow(mask, &[0xff; 4]);
        }
        writable
    }

    /// The guest wrote the capability, which now reads like this (from its id on).
    pub fn apply(&mut self, capability: &[u8]) {
        let control = word(capability, CONTROL);
        // More than the function has would be the guest's mistake.
        let count = (1 << (control >> 4 & 7)).min(self.lines.len() as u16);
        self.enabled = if control & CONTROL_ENABLE != 0 { count } else { 0 };
        let high = if self.data == 12 { u64::from(dword(capability, ADDRESS + 4)) << 32 } else { 0 };
        let address = high | u64::from(dword(capability, ADDRESS));
        let data = u32::from(word(capability, self.data)) & !u32::from(count - 1);
        let masked = self.mask.map_or(0, |mask| dword(capability, mask));
        for (index, line) in (0u32..).zip(&mut self.lines) {
            let unmasked = index < u32::from(self.enabled) && masked >> index & 1 == 0;
            line.point(&*self.router, unmasked.then_some(Message { address, data: data | index }));
        }
    }

    /// The pending bits and where in the capability they are, if the function has them.
    pub fn pending(&self) -> Option<(usize, u32)> {
        let bits = self
            .lines
            .iter()
            .enumerate()
            .fold(0, |bits, (index, line)| bits | u32::from(line.is_pending()) << index);
        self.mask.map(|mask| (mask + 4, bits))
    }

    /// The eventfds of the vectors that the guest has switched on.
    pub fn events(&self) -> impl Iterator<Item = &EventFd> {
        self.lines.iter().take(usize::from(self.enabled)).map(Line::event)
    }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn dword(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::super::msix::tests::Recorder;
    use super::*;

    /// 64-bit, maskable, up to four vectors.
    const CONTROL_WORD: u16 = CONTROL_64_BIT | CONTROL_MASKABLE | 2 << 1;

    fn msi(control: u16) -> (Msi, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        (Msi::new(Arc::clone(&recorder) as Arc<dyn MessageRouter>, control).unwrap(), recorder)
    }

    fn capability(control: u16, mask: u32) -> Vec<u8> {
        let mut bytes = vec![CAPABILITY, 0];
        bytes.extend(control.to_le_bytes());
        bytes.extend(0x1_fee0_1000u64.to_le_bytes());
        bytes.extend(0x4043u32.to_le_bytes());
        bytes.extend(mask.to_le_bytes());
        bytes.extend([0; 4]);
        bytes
    }

    #[test]
    fn each_vector_has_its_number_in_the_message() {
        let (mut msi, recorder) = msi(CONTROL_WORD);
        msi.apply(&capability(CONTROL_WORD | CONTROL_ENABLE | 2 << 4, 0b100));
        let message = |data| Some(Message { address: 0x1_fee0_1000, data });
        assert_eq!(
            [0, 1, 2, 3].map(|gsi| recorder.message(gsi)),
            [message(0x4040), message(0x4041), None, message(0x4043)]
        );
        assert_eq!(msi.events().count(), 4);
        msi.apply(&capability(CONTROL_WORD | CONTROL_ENABLE, 0));
        assert_eq!([0, 1].map(|gsi| recorder.message(gsi)), [message(0x4043), None]);
        msi.apply(&capability(CONTROL_WORD, 0));
        assert_eq!((recorder.message(0), msi.events().count()), (None, 0));
    }

    #[test]
    fn more_vectors_than_there_are_cannot_be_had() {
        let (mut msi, _) = msi(0);
        msi.apply(&capability(CONTROL_ENABLE | 7 << 4, 0));
        assert_eq!(msi.events().count(), 1);
        msi.apply(&[]);
        assert_eq!(msi.events().count(), 0);
    }

    #[test]
    fn the_length_follows_from_the_control_word() {
        for (control, length) in [(0, 10), (CONTROL_64_BIT, 14), (CONTROL_MASKABLE, 20), (CONTROL_WORD, 24)] {
            assert_eq!(msi(control).0.writable().len(), length);
        }
    }

    #[test]
    fn what_comes_while_masked_is_pending() {
        let (mut msi, _) = msi(CONTROL_WORD);
        msi.apply(&capability(CONTROL_WORD | CONTROL_ENABLE | 2 << 4, 0b10));
        msi.events().nth(1).unwrap().write(1).unwrap();
        assert_eq!(msi.pending(), Some((20, 0b10)));
    }
}
