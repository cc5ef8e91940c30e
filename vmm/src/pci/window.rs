//! Addresses for BARs, where firmware would choose them. The guest may move a BAR afterwards.

/// The part of the host bridge's 64-bit window that is still free.
#[derive(Debug)]
pub struct Window {
    next: u64,
    end: u64,
}

/// No place for a BAR.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no guest address is left for the BAR of another device; give the VM less memory or fewer devices")]
pub struct Full;

impl Window {
    /// All of it, inclusive start and exclusive end.
    pub fn new((start, end): (u64, u64)) -> Self {
        Self { next: start, end }
    }

    /// The address of a BAR of `size` bytes, a power of two.
    pub fn place(&mut self, size: u64) -> Result<u64, Full> {
        let start = self.next.checked_next_multiple_of(size).ok_or(Full)?;
        let end = start.checked_add(size).filter(|&end| end <= self.end).ok_or(Full)?;
        self.next = end;
        Ok(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_aligned_apart_and_inside() {
        let mut window = Window::new((1 << 32, (1 << 32) + (8 << 20)));
        assert_eq!(window.place(0x8000), Ok(0x1_0000_0000));
        assert_eq!(window.place(256), Ok(0x1_0000_8000));
        assert_eq!(window.place(2 << 20), Ok(0x1_0020_0000));
        assert_eq!(window.place(4 << 20), Ok(0x1_0040_0000));
        assert_eq!(window.place(16), Err(Full));
        assert_eq!(Window::new((1 << 36, 1 << 36)).place(16), Err(Full));
        assert_eq!(Window::new((u64::MAX - 5, u64::MAX)).place(1 << 30), Err(Full));
    }
}
