//! Every interleaving and every stale read that the memory model allows, by loom, over the shipped source files:
//! they are compiled here once more, over a `region` of loom's atomics. Each fence is then left out in turn, and
//! the model must find what is lost without it.
//!
//! A lost wake-up shows as a deadlock: the consumer waits for a call and the producer is done.
#![allow(dead_code, unreachable_pub, reason = "the models use part of the crate's API")]

#[path = "../../src/consumer.rs"]
mod consumer;
#[path = "../../src/layout.rs"]
mod layout;
#[path = "../../src/producer.rs"]
mod producer;
mod region;
#[path = "../../src/sleep.rs"]
mod sleep;
#[path = "../../src/spsc.rs"]
mod spsc;
#[path = "../../src/watch.rs"]
mod watch;

use consumer::{Completion, Consumer, Sleep};
use layout::Geometry;
use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use loom::sync::{Condvar, Mutex};
use loom::thread::{self, JoinHandle};
use producer::{Producer, Push, Source};
use region::Region;
use sleep::Fence;
use std::sync::Arc;

/// The `call` of all sources: an eventfd, which remembers.
#[derive(Default)]
struct Call {
    called: Mutex<bool>,
    wake: Condvar,
}

impl Call {
    fn signal(&self) {
        *self.called.lock().unwrap() = true;
        self.wake.notify_one();
    }

    fn wait(&self) {
        let mut called = self.called.lock().unwrap();
        while !*called {
            called = self.wake.wait(called).unwrap();
        }
        *called = false;
    }
}

/// What both threads share beside the region: the used rings, here a count of completions each, and the call.
struct Guest {
    used: Vec<AtomicUsize>,
    call: Call,
}

impl Guest {
    /// Leaked, because loom's own `Arc` cannot be dropped while a failing model unwinds.
    fn new(sources: usize) -> &'static Self {
        let used = (0..sources).map(|_| AtomicUsize::new(0)).collect();
        Box::leak(Box::new(Self { used, call: Call::default() }))
    }

    /// A completion, as a backend makes one: used ring first, then the push, then the call if need be.
    fn complete(&self, producer: &mut Producer, source: Source, queue: usize, count: usize) -> Push {
        self.used[queue].store(count, Relaxed);
        let push = producer.push(source, 0);
        if let Push::Signal(_) = push {
            self.call.signal();
        }
        push
    }

    /// A consumer that sleeps whenever it may, until every queue has been seen to hold what is `due`. Returns
    /// how many completions it was handed.
    fn consume(
        &self,
        consumer: &mut Consumer,
        due: &[usize],
        queue_of: impl Fn(Completion) -> usize,
    ) -> usize {
        let mut seen = vec![0; due.len()];
        let mut handed = 0;
        while seen != due {
            if let Some(completion) = consumer.poll() {
                let queue = queue_of(completion);
                seen[queue] = self.used[queue].load(Relaxed);
                handed += 1;
            } else if consumer.prepare_sleep() == Sleep::Now {
                self.call.wait();
                consumer.wake();
            }
        }
        handed
    }
}

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 10_000;
    let model = Arc::new(model);
    builder.check(move || {
        let model = model.clone();
        spawn(move || model()).join().unwrap();
    });
}

/// A thread of the model; loom's own stacks of 32 KiB are too small for unoptimised code.
fn spawn<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let words = (256 << 10) / size_of::<usize>();
    thread::Builder::new().stack_size(words).spawn(body).unwrap()
}

/// One source, completions that come while the consumer polls, goes to sleep or sleeps; the ring starts cold.
fn one_source(left_out: Option<Fence>) {
    check(3, move || {
        let region = Region::new(Geometry::new(1, 1).unwrap(), left_out);
        let guest = Guest::new(1);
        let mut producer = Producer::claim(region, 0).unwrap();
        let source = producer.register(0x1000).unwrap();
        let mut consumer = Consumer::attach(region, 1, 1);
        assert_eq!(consumer.poll(), None);
        let pushing = spawn(move || {
            for count in 1..=2 {
                let _ = guest.complete(&mut producer, source, 0, count);
            }
        });
        let handed = guest.consume(&mut consumer, &[2], |_| 0);
        pushing.join().unwrap();
        assert!(handed <= 2, "handed out {handed} times for 2 completions");
        assert_eq!(consumer.rescans(), 0, "the ring overflowed");
    });
}

/// Two rings that were both busy; one cools down while its next completion comes.
fn cooling_ring(left_out: Option<Fence>) {
    check(3, move || {
        let region = Region::new(Geometry::new(2, 1).unwrap(), left_out);
        let guest = Guest::new(2);
        let mut consumer = Consumer::attach(region, 1, 1);
        assert_eq!(consumer.poll(), None);
        let claim = |ring| {
            let mut producer = Producer::claim(region, ring).unwrap();
            let source = producer.register(0x1000).unwrap();
            (producer, source)
        };
        let ((mut first, a), (mut second, b)) = (claim(0), claim(1));
        let _ = guest.complete(&mut first, a, 0, 1);
        let _ = guest.complete(&mut second, b, 1, 1);
        let pushing = spawn(move || {
            let _ = guest.complete(&mut first, a, 0, 2);
        });
        guest.consume(&mut consumer, &[2, 1], |completion| completion.ring);
        pushing.join().unwrap();
        assert_eq!(consumer.rescans(), 0, "a ring overflowed");
    });
}

/// The consumer leaves for good while a completion comes: it is handed out at the end, or called.
fn leaving_consumer(left_out: Option<Fence>) {
    check(3, move || {
        let region = Region::new(Geometry::new(1, 1).unwrap(), left_out);
        let guest = Guest::new(1);
        let mut producer = Producer::claim(region, 0).unwrap();
        let source = producer.register(0x1000).unwrap();
        let mut consumer = Consumer::attach(region, 1, 1);
        assert_eq!(guest.complete(&mut producer, source, 0, 1), Push::Queued);
        assert!(consumer.poll().is_some());
        let pushing = spawn(move || {
            for count in 2..=3 {
                let _ = guest.complete(&mut producer, source, 0, count);
            }
        });
        let mut seen = 0;
        consumer.detach(|_| seen = guest.used[0].load(Relaxed));
        if seen < 3 {
            guest.call.wait();
        }
        pushing.join().unwrap();
    });
}

#[test]
fn no_wake_up_is_lost() {
    one_source(None);
}

#[test]
fn no_completion_of_a_cooling_ring_is_lost() {
    cooling_ring(None);
}

#[test]
fn no_completion_is_lost_when_the_consumer_leaves() {
    leaving_consumer(None);
}

/// Two sources in a ring of two slots: merging keeps the ring from overflowing.
#[test]
fn a_full_ring_does_not_overflow() {
    check(2, || {
        let region = Region::new(Geometry::new(1, 2).unwrap(), None);
        let guest = Guest::new(2);
        let mut producer = Producer::claim(region, 0).unwrap();
        let a = producer.register(0x1000).unwrap();
        let b = producer.register(0x2000).unwrap();
        let mut consumer = Consumer::attach(region, 1, 1);
        assert_eq!(consumer.poll(), None);
        let pushing = spawn(move || {
            let steps = [(a, 0, 1), (b, 1, 1), (a, 0, 2)];
            steps.map(|(source, queue, count)| guest.complete(&mut producer, source, queue, count))
        });
        let mut handed = guest.consume(&mut consumer, &[2, 1], |completion| completion.source as usize);
        let pushes = pushing.join().unwrap();
        handed += std::iter::from_fn(|| consumer.poll()).count();
        let merged = pushes.iter().filter(|push| **push == Push::Merged).count();
        assert_eq!(handed + merged, pushes.len(), "each completion is handed out once or merged");
        assert_eq!(consumer.rescans(), 0, "the ring overflowed");
    });
}

/// A producer is killed with its entry in the ring, or between the pending word and the slot; its successor
/// takes the ring over while the consumer takes entries. The virtqueue is announced by the successor, and must
/// be handed out after that under its new binding.
fn killed_producer(wrote_its_slot: bool) {
    check(3, move || {
        let region = Region::new(Geometry::new(1, 1).unwrap(), None);
        let guest = Guest::new(2);
        let mut killed = Producer::claim(region, 0).unwrap();
        let source = killed.register(0x1000).unwrap();
        let mut consumer = Consumer::attach(region, 1, 1);
        assert_eq!(consumer.poll(), None);
        if wrote_its_slot {
            assert_eq!(killed.push(source, 0), Push::Queued);
        } else {
            assert!(!spsc::WriteEnd::claim(region.ring(0).unwrap(), 1).announce(0));
        }
        let pushing = spawn(move || {
            let mut producer = Producer::claim(region, 0).unwrap();
            let source = producer.register(0x2000).unwrap();
            let _ = guest.complete(&mut producer, source, 1, 1);
        });
        guest.consume(&mut consumer, &[0, 1], |completion| (completion.binding.used_ring == 0x2000).into());
        pushing.join().unwrap();
    });
}

#[test]
fn a_successor_delivers_beside_what_a_killed_producer_left_in_the_ring() {
    killed_producer(true);
}

#[test]
fn a_successor_delivers_what_a_killed_producer_only_announced() {
    killed_producer(false);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_fence_pushed_a_wake_up_is_lost() {
    one_source(Some(Fence::Pushed));
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_fence_raised_a_wake_up_is_lost() {
    one_source(Some(Fence::Raised));
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_fence_leaving_a_wake_up_is_lost() {
    one_source(Some(Fence::Leaving));
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_fence_leaving_a_last_completion_is_lost() {
    leaving_consumer(Some(Fence::Leaving));
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_fence_pushed_a_last_completion_is_lost() {
    leaving_consumer(Some(Fence::Pushed));
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_fence_cooled_a_ring_goes_unseen() {
    cooling_ring(Some(Fence::Cooled));
}
