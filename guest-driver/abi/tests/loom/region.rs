//! The region's memory for the model: loom's atomics in place of mapped bytes, and fences that can be left out.

use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::layout::{FIRST_SEQUENCE, Geometry};
use crate::sleep::Fence;

#[derive(Debug)]
struct Memory {
    geometry: Geometry,
    left_out: Option<Fence>,
    state: AtomicU32,
    owner: AtomicU32,
    hints: AtomicU32,
    summary: AtomicU64,
    rings: Vec<RingMemory>,
}

#[derive(Debug)]
struct RingMemory {
    head: AtomicU32,
    pending: Vec<AtomicU32>,
    bindings: Vec<AtomicU64>,
    slots: Vec<AtomicU64>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Region(&'static Memory);

impl Region {
    /// An empty region whose fence `left_out` does nothing. Leaked: a few hundred bytes an execution.
    pub(crate) fn new(geometry: Geometry, left_out: Option<Fence>) -> Self {
        let sources = geometry.sources();
        let ring = |_| RingMemory {
            head: AtomicU32::new(FIRST_SEQUENCE),
            pending: (0..sources).map(|_| AtomicU32::new(0)).collect(),
            bindings: (0..sources).map(|_| AtomicU64::new(0)).collect(),
            slots: (0..sources).map(|_| AtomicU64::new(0)).collect(),
        };
        Self(Box::leak(Box::new(Memory {
            geometry,
            left_out,
            state: AtomicU32::new(0),
            owner: AtomicU32::new(0),
            hints: AtomicU32::new(0),
            summary: AtomicU64::new(0),
            rings: (0..geometry.rings()).map(ring).collect(),
        })))
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.0.geometry
    }

    pub(crate) fn state(&self) -> &AtomicU32 {
        &self.0.state
    }

    pub(crate) fn owner(&self) -> &AtomicU32 {
        &self.0.owner
    }

    pub(crate) fn hints(&self) -> &AtomicU32 {
        &self.0.hints
    }

    pub(crate) fn summary(&self) -> &AtomicU64 {
        &self.0.summary
    }

    pub(crate) fn ring(&self, index: usize) -> Option<Ring> {
        Some(Ring(self.0.rings.get(index)?))
    }

    pub(crate) fn fence(&self, which: Fence) {
        if self.0.left_out != Some(which) {
            fence(Ordering::SeqCst);
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring(&'static RingMemory);

impl Ring {
    pub(crate) fn head(&self) -> &AtomicU32 {
        &self.0.head
    }

    pub(crate) fn pending(&self, source: u32) -> &AtomicU32 {
        &self.0.pending[source as usize % self.0.pending.len()]
    }

    pub(crate) fn binding(&self, source: u32) -> &AtomicU64 {
        &self.0.bindings[source as usize % self.0.bindings.len()]
    }

    pub(crate) fn slot(&self, sequence: u32) -> &AtomicU64 {
        &self.0.slots[sequence as usize % self.0.slots.len()]
    }
}
