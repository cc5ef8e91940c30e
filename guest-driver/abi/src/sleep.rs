//! Who tells whom: the state word, the summary, and the full fences that make a wake-up impossible to lose.
//!
//! Every race here is Dekker's pattern. Each side stores, fences, and loads what the other side stores; with
//! both fences at least one of the two sees the other's store, without either both can miss it, on x86 too,
//! where a load overtakes an earlier store.
//!
//! | producer                          | consumer                             | what would be lost        |
//! |-----------------------------------|--------------------------------------|---------------------------|
//! | slot, [`Fence::Pushed`], state    | state, [`Fence::Leaving`], slot      | the `call` that wakes     |
//! | summary, [`Fence::Raised`], state | state, [`Fence::Leaving`], summary   | the same, in a cold ring  |
//! | slot, [`Fence::Pushed`], summary  | summary, [`Fence::Cooled`], slot     | the ring goes unseen      |
//! | slot, [`Fence::Pushed`], state    | "absent", [`Fence::Leaving`], pending | the completion            |

use core::sync::atomic::Ordering;

use crate::layout::{MAX_RINGS, State};
use crate::region::Region;

/// The full fences of the protocol, by the store they follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fence {
    /// Producer: slot written, before the summary and the state are read. Partners: `Cooled`, `Leaving`.
    Pushed,
    /// Producer: summary bit set, before the state is read. Partner: `Leaving`.
    Raised,
    /// Consumer: state "sleeping" or "absent" written, before the rings are looked at once more. Partners:
    /// `Pushed`, `Raised`.
    Leaving,
    /// Consumer: summary bit cleared, before the ring is looked at once more. Partner: `Pushed`.
    Cooled,
}

/// Producer, an entry was written to the ring of summary bit `ring`: makes sure the consumer looks at that ring
/// and says what the consumer is doing. Unless that is [`State::Awake`] the source must be called.
#[inline]
pub(crate) fn after_push(region: &Region, ring: u64) -> State {
    region.fence(Fence::Pushed);
    // Read first: the bit is nearly always set, and then the line stays shared.
    if region.summary().load(Ordering::Relaxed) & ring == 0 {
        region.summary().fetch_or(ring, Ordering::AcqRel);
        region.fence(Fence::Raised);
    }
    State::from_word(region.state().load(Ordering::Relaxed))
}

/// Consumer: the rings to look at, among those there are. Acquire: whoever sees a bit sees the entry it was set for.
#[inline]
pub(crate) fn hot_rings(region: &Region) -> u64 {
    region.summary().load(Ordering::Acquire) & (u64::MAX >> (MAX_RINGS - region.geometry().rings()))
}

/// Consumer: stops looking at a ring. Look at it once more now, and [`warm`] it if it holds something.
pub(crate) fn cool(region: &Region, ring: u64) {
    region.summary().fetch_and(!ring, Ordering::AcqRel);
    region.fence(Fence::Cooled);
}

/// Consumer: looks at a ring again.
pub(crate) fn warm(region: &Region, ring: u64) {
    region.summary().fetch_or(ring, Ordering::AcqRel);
}

/// Consumer: says what it does from now on. After anything but [`State::Awake`] look at the rings once more.
pub(crate) fn publish(region: &Region, state: State) {
    let previous = region.state().load(Ordering::Relaxed);
    region.state().store(state.after(previous), Ordering::Release);
    if state != State::Awake {
        region.fence(Fence::Leaving);
    }
}
