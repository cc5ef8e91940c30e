//! The content of a stream. It depends on the position: it is made of blocks, each a block number and then a slice of
//! a fixed pattern that starts elsewhere in every block, so that bytes that are lost, doubled or swapped show, at the
//! price of one comparison in memory.

use std::io;

/// Bytes of a block.
pub(super) const BLOCK: usize = 64 * 1024;
/// Bytes of the number at its start.
pub(super) const NUMBER: usize = size_of::<u64>();
/// Length of the pattern before it repeats: a prime, so that no power of two is a period of the content.
const PERIOD: usize = 65_521;

/// The content of a stream, by position.
pub(super) struct Content {
    pattern: Vec<u8>,
}

/// A stream's first `length` bytes.
pub fn content_of(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Content::new().fill(0, &mut bytes);
    bytes
}

impl Content {
    pub(super) fn new() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut pattern: Vec<u8> = (0..PERIOD)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 32) as u8
            })
            .collect();
        pattern.extend_from_within(..);
        pattern.extend_from_within(..BLOCK.saturating_sub(PERIOD));
        Self { pattern }
    }

    /// The number of the block `position` lies in, and the block's body from `position` on.
    pub(super) fn rest_of_block(&self, position: u64) -> ([u8; NUMBER], &[u8]) {
        let number = position / BLOCK as u64;
        let skip = (position % BLOCK as u64) as usize;
        // Another start in every block, and never the one a shift by whole blocks would give.
        let start = (number.wrapping_mul(4099) % PERIOD as u64) as usize;
        (number.to_le_bytes(), &self.pattern[start..start + BLOCK - NUMBER][skip.saturating_sub(NUMBER)..])
    }

    pub(super) fn fill(&self, mut position: u64, mut buffer: &mut [u8]) {
        while !buffer.is_empty() {
            let (number, body) = self.rest_of_block(position);
            let skip = ((position % BLOCK as u64) as usize).min(NUMBER);
            let head = &number[skip..];
            let source = if head.is_empty() { body } else { head };
            let length = source.len().min(buffer.len());
            buffer[..length].copy_from_slice(&source[..length]);
            buffer = &mut buffer[length..];
            position += length as u64;
        }
    }

    pub(super) fn verify(&self, mut position: u64, mut received: &[u8]) -> io::Result<()> {
        while !received.is_empty() {
            let (number, body) = self.rest_of_block(position);
            let skip = ((position % BLOCK as u64) as usize).min(NUMBER);
            let head = &number[skip..];
            let expected = if head.is_empty() { body } else { head };
            let length = expected.len().min(received.len());
            if received[..length] != expected[..length] {
                let wrong = received.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(0) as u64;
                let text = format!("the byte at position {} of a stream is wrong", position + wrong);
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            received = &received[length..];
            position += length as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verify_accepts_what_fill_makes_wherever_it_is_cut() {
        let content = Content::new();
        let mut whole = vec![0; 3 * BLOCK + 17];
        content.fill(0, &mut whole);
        for step in [1, 7, 8, 9, 1000, BLOCK - 1, BLOCK, BLOCK + 1] {
            for (index, piece) in whole.chunks(step).enumerate().step_by(1 + 5000 / step) {
                content.verify((index * step) as u64, piece).expect("the same content");
            }
        }
    }

    #[test]
    fn verify_refuses_flipped_lost_and_doubled_bytes() {
        let content = Content::new();
        let mut block = vec![0; BLOCK];
        content.fill(5 * BLOCK as u64, &mut block);
        for position in [0, 7, 8, BLOCK / 2, BLOCK - 1] {
            let mut flipped = block.clone();
            flipped[position] ^= 1;
            let error = content.verify(5 * BLOCK as u64, &flipped).expect_err("a flipped byte shows");
            assert!(error.to_string().contains(&(5 * BLOCK + position).to_string()), "{error}");
        }
        for shift in [1, 64, 1448, PERIOD, BLOCK, BLOCK * 16] {
            assert!(content.verify((5 * BLOCK + shift) as u64, &block).is_err(), "shifted by {shift}");
        }
    }
}
