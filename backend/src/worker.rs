//! One queue pair's poll thread: moves frames both ways until there are none, spins for a while, then sleeps.
//!
//! While the thread works or spins, the driver is asked not to kick. Before it sleeps it asks for kicks again and
//! looks once more (`Ring::want_kicks` has the fence), so a chain that comes in between is seen. Kicks for the ring
//! to the guest are asked for only when it has no buffers left: until then only the uplink can give work.
//!
//! With a FIFO the thread also watches what the consumer leaves waiting there: now and then while it is awake, and as
//! the time limit of its sleep, so that nothing waits longer than the bound (and the thread's own next look).

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use crate::cli::PollTime;
use crate::completion;
use crate::device::QueuePair;
use crate::fifo::{Fifo, Waiting};
use crate::from_guest;
use crate::lost_memory;
use crate::stats::RingStats;
use crate::to_guest::{Outcome, ToGuest};
use crate::uplink::Pair;

/// Rounds between two looks at the clock, and the least time between two counts of the kicks: while a thread is busy
/// or spins, nothing depends on the kick eventfds, so they are read only to keep the counters true.
const ROUNDS_A_LOOK: u32 = 256;
const COUNT_KICKS_EVERY: Duration = Duration::from_millis(10);
/// Rounds between two looks at what waits in the FIFO: a look costs a glance at the clock while anything waits, a round
/// of full bursts takes some 100 us.
const ROUNDS_A_GLANCE: u32 = 4;
/// How often a thread that cannot sleep, because what it waits for is broken, looks again.
const PACE: Duration = Duration::from_secs(1);

/// One queue pair's data path.
pub struct Worker {
    /// The rings.
    pub rings: QueuePair,
    /// The uplink's end.
    pub pair: Pair,
    /// The way past interrupts, if there is one.
    pub fifo: Option<Fifo>,
    /// How long to spin.
    pub poll: PollTime,
    /// Counters of the ring to the guest and of the ring from it.
    pub stats: [Arc<RingStats>; 2],
    /// Set, then the rings woken: the session is over.
    pub stop: Arc<AtomicBool>,
    /// Ends the session from here.
    pub hang_up: Box<dyn Fn() + Send>,
}

/// What one look at both rings found.
#[derive(Default)]
struct Round {
    moved: bool,
    /// A message handler wants a ring.
    contended: bool,
    /// A ring can have work.
    running: bool,
    to_guest: Outcome,
}

impl Worker {
    /// Runs until the session ends, then gives the uplink's end back for the next.
    pub fn run(mut self) -> Pair {
        let mut to_guest = ToGuest::default();
        let mut idle_since = None;
        let mut rounds = 0u32;
        let mut counted = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            let round = self.round(&mut to_guest);
            if lost_memory::was_met() {
                tracing::warn!("guest memory was cut while it was in use; the session ends");
                (self.hang_up)();
                break;
            }
            if round.moved {
                idle_since = None;
            } else if round.contended {
                std::thread::yield_now();
            } else if round.running && self.may_spin(&mut idle_since) {
                std::hint::spin_loop();
            } else {
                self.sleep(&round);
                idle_since = None;
            }
            rounds = rounds.wrapping_add(1);
            if rounds.is_multiple_of(ROUNDS_A_GLANCE) {
                fall_back(&mut self.fifo, &self.rings, &self.stats);
            }
            if rounds.is_multiple_of(ROUNDS_A_LOOK) && counted.elapsed() >= COUNT_KICKS_EVERY {
                self.count_kicks();
                counted = Instant::now();
            }
        }
        self.count_kicks();
        self.pair.set_enabled(true);
        self.pair
    }

    /// Whether the time to spin is not over yet.
    fn may_spin(&self, idle_since: &mut Option<Instant>) -> bool {
        match self.poll {
            PollTime::Always => true,
            PollTime::Bounded(Duration::ZERO) => false,
            PollTime::Bounded(limit) => idle_since.get_or_insert_with(Instant::now).elapsed() < limit,
        }
    }

    /// One burst each way.
    fn round(&mut self, to_guest: &mut ToGuest) -> Round {
        let mut round = Round::default();
        let [to_stats, from_stats] = &self.stats;
        match self.rings.from_guest.try_lock() {
            Some(mut ring) => {
                let mut fifo = self.fifo.as_mut();
                if let Some(fifo) = &mut fifo {
                    completion::follow(&ring, fifo, from_stats);
                }
                round.moved |= from_guest::burst(&mut ring, &mut self.pair, fifo, from_stats);
                round.running |= ring.is_running();
            }
            None => round.contended = true,
        }
        match self.rings.to_guest.try_lock() {
            Some(mut ring) => {
                let mut fifo = self.fifo.as_mut();
                if let Some(fifo) = &mut fifo {
                    completion::follow(&ring, fifo, to_stats);
                }
                let active = ring.is_running() && ring.is_enabled();
                self.pair.set_enabled(active);
                round.to_guest = to_guest.burst(&mut ring, &mut self.pair, fifo, to_stats);
                round.moved |= round.to_guest.moved;
                round.running |= active;
            }
            None => round.contended = true,
        }
        round
    }

    /// Sleeps until a kick, a frame or a change of the rings.
    fn sleep(&mut self, round: &Round) {
        let rings = &self.rings;
        let (Some(from_kick), Some(to_kick)) = (self.arm_from_guest(), self.arm_to_guest(round)) else {
            return;
        };
        let sources = [
            Some(rings.to_guest.attention()),
            Some(rings.from_guest.attention()),
            to_kick.kick(),
            from_kick.kick(),
            self.pair.wait_fd().filter(|_| matches!(to_kick, Wait::Frames(_))),
        ];
        let mut fds: Vec<PollFd> =
            sources.iter().flatten().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let limit = fall_back(&mut self.fifo, rings, &self.stats);
            match ppoll(&mut fds, limit.map(TimeSpec::from_duration), None) {
                // The time was the FIFO's; nothing happened on the rings.
                Ok(0) if limit != Some(Duration::ZERO) => {}
                Ok(_) | Err(Errno::EINTR) => break,
                Err(error) => {
                    tracing::warn!("cannot wait for the rings: {error}");
                    std::thread::sleep(PACE);
                    break;
                }
            }
        }
        // What each source said, in their order. Only what spoke is looked at: every look is a system call.
        let mut told = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::all()));
        let [to_attention, from_attention, to_kicked, from_kicked, uplink] =
            sources.map(|source| source.and_then(|_| told.next()).unwrap_or(PollFlags::empty()));
        for (vring, stats, attention, kicked) in [
            (&rings.to_guest, &self.stats[0], to_attention, to_kicked),
            (&rings.from_guest, &self.stats[1], from_attention, from_kicked),
        ] {
            if !attention.is_empty() {
                vring.drain_attention();
            }
            // A ring that was just stopped has kept the kicks it took with it.
            if !(attention | kicked).is_empty()
                && let Some(mut ring) = vring.try_lock()
            {
                stats.kicks.add(ring.drain_kick());
            }
        }
        if !uplink.is_empty() && !uplink.contains(PollFlags::POLLIN) {
            // A device that was deleted says so at once, for ever.
            tracing::warn!("the uplink failed; was its device deleted?");
            std::thread::sleep(PACE);
        }
    }

    /// Empties the kick eventfds into the counters.
    fn count_kicks(&self) {
        let rings = [&self.rings.to_guest, &self.rings.from_guest];
        for (vring, stats) in rings.into_iter().zip(&self.stats) {
            if let Some(mut ring) = vring.try_lock() {
                stats.kicks.add(ring.drain_kick());
            }
        }
    }

    /// What the ring from the guest waits for; `None` when it must not sleep.
    fn arm_from_guest(&self) -> Option<Wait> {
        let mut ring = self.rings.from_guest.try_lock()?;
        if !ring.is_running() {
            return Some(Wait::Nothing);
        }
        if ring.want_kicks() { None } else { Some(Wait::Kick(ring.kick())) }
    }

    /// What the ring to the guest waits for; `None` when it must not sleep.
    fn arm_to_guest(&self, round: &Round) -> Option<Wait> {
        let mut ring = self.rings.to_guest.try_lock()?;
        if !ring.is_running() || !ring.is_enabled() {
            return Some(Wait::Nothing);
        }
        if round.to_guest.starved {
            return if ring.want_kicks() { None } else { Some(Wait::Kick(ring.kick())) };
        }
        if self.pair.has_frames() { None } else { Some(Wait::Frames(ring.kick())) }
    }
}

/// Calls for what the FIFO's consumer left waiting too long. Tells how long the thread may sleep before it has to look
/// again: not at all where a message handler holds the ring to be called.
fn fall_back(fifo: &mut Option<Fifo>, rings: &QueuePair, stats: &[Arc<RingStats>; 2]) -> Option<Duration> {
    let fifo = fifo.as_mut()?;
    loop {
        match fifo.waiting() {
            Waiting::Nothing => return None,
            Waiting::Within(time) => return Some(time),
            Waiting::TooLong(direction) => match rings.ring(direction).try_lock() {
                Some(ring) => completion::fall_back(&ring, fifo, &stats[direction.index()]),
                None => return Some(Duration::ZERO),
            },
        }
    }
}

/// What a ring waits for.
enum Wait {
    /// It is not in use.
    Nothing,
    /// The driver.
    Kick(Option<Arc<File>>),
    /// The uplink. The driver has not been asked to kick; what it does all the same is counted.
    Frames(Option<Arc<File>>),
}

impl Wait {
    /// The kick eventfd to watch.
    fn kick(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Wait::Nothing => None,
            Wait::Kick(kick) | Wait::Frames(kick) => kick.as_deref().map(AsFd::as_fd),
        }
    }
}
