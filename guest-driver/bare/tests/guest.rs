//! The guest on this machine's KVM: what it is handed, what it costs in exits, how it sleeps. By counts, not times.

#[allow(dead_code, reason = "a test does not measure")]
#[path = "../../abi/benches/measure/mod.rs"]
mod measure;

use std::hint;
use std::io::{Write, stderr};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::thread;
use std::time::{Duration, Instant};

use ivcpu_abi::{Producer, Push, Reason, Source};
use ivcpu_bare::mailbox::{Job, Mailbox, RINGS, Report, SOURCES};
use ivcpu_bare::{Count, Error, Machine};
use vmm_sys_util::eventfd::EventFd;

use measure::{on_two_cpus, two_cpus};

/// Longer than a busy machine takes to run a thread again, by far.
const PATIENCE: Duration = Duration::from_secs(20);
const COMPLETIONS: u64 = 5_000;

fn machine() -> Option<Machine> {
    let missing = match Machine::new() {
        Ok(machine) if two_cpus().is_some() => return Some(machine),
        Ok(_) => "two CPUs".to_owned(),
        Err(error @ Error::NoKvm(_)) => format!("a KVM: {error}"),
        Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
    };
    // Past the test harness, which hides what a test that passes prints.
    stderr().write_all(format!("SKIPPED: the bare guest needs {missing}\n").as_bytes()).unwrap();
    None
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    loop {
        // Mostly it is a matter of nanoseconds; on a busy machine of other threads' turns.
        for _ in 0..10_000 {
            if condition() {
                return;
            }
            hint::spin_loop();
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        thread::yield_now();
    }
}

/// Ends the job when it is dropped, after a failed assertion too: the vCPU's thread is joined then.
struct Stop<'a> {
    mailbox: &'a Mailbox,
    call: &'a EventFd,
}

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.mailbox.stop.0.store(1, Release);
        self.call.write(1).unwrap();
    }
}

/// Lets the guest do `job` while `host` runs, and says how many times it exited to user space.
fn run(
    machine: &mut Machine,
    job: Job,
    count: u64,
    call: &EventFd,
    host: impl FnOnce(&Mailbox) + Send,
) -> u64 {
    machine.start(job, count).unwrap();
    let Machine { vcpu, memory, .. } = machine;
    let mailbox = memory.mailbox();
    let guest = || {
        for reports in 1.. {
            match vcpu.run().unwrap() {
                Report::Done => return reports,
                Report::Asleep => drop(call.read().unwrap()),
                Report::Exit => mailbox.line.0.store(reports, Release),
                Report::Broken => unreachable!("an error"),
            }
        }
        0
    };
    let host = || {
        let _stop = Stop { mailbox, call };
        wait_until("the guest is ready", || mailbox.ready.0.load(Acquire) == 1);
        host(mailbox);
    };
    on_two_cpus(two_cpus().expect("looked at in machine"), host, guest).1
}

/// The host's side of the guest's queues.
struct Queues {
    producers: [(Producer, [Source; SOURCES]); RINGS],
    random: u64,
    queued: u64,
    merged: u64,
    called: u64,
}

impl Queues {
    fn new(machine: &Machine) -> Self {
        let producers = std::array::from_fn(|ring| {
            let mut producer = Producer::claim(machine.memory.region(), ring).unwrap();
            let sources = std::array::from_fn(|source| {
                producer.register((ring * SOURCES + source + 1) as u64 * 0x1000).unwrap()
            });
            (producer, sources)
        });
        Self { producers, random: 1, queued: 0, merged: 0, called: 0 }
    }

    fn random(&mut self, below: usize) -> usize {
        self.random = self.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.random >> 33) as usize % below
    }

    /// One completion of any queue.
    fn complete(&mut self, mailbox: &Mailbox, call: &EventFd) {
        let (ring, source) = (self.random(RINGS), self.random(SOURCES));
        mailbox.used[ring][source].fetch_add(1, Relaxed);
        let (producer, sources) = &mut self.producers[ring];
        match producer.push(sources[source], 0) {
            Push::Queued => self.queued += 1,
            Push::Merged => self.merged += 1,
            Push::Signal(Reason::Asleep) => {
                self.called += 1;
                call.write(1).unwrap();
            }
            Push::Signal(reason) => panic!("an attached consumer with no clock running is not {reason:?}"),
        }
    }

    fn wait_until_seen(&self, mailbox: &Mailbox) {
        let queues = || mailbox.used.iter().flatten().zip(mailbox.seen.iter().flatten());
        wait_until("all completions have been seen", || {
            queues().all(|(used, seen)| seen.load(Acquire) == used.load(Relaxed))
        });
    }

    /// Completions in all; each entry was handed out once, and covers those merged with it.
    fn assert_handed_out(&self, mailbox: &Mailbox) {
        assert_eq!(self.queued + self.merged + self.called, COMPLETIONS);
        let handed_out = || mailbox.received.0.load(Acquire);
        wait_until("all entries have been handed out", || handed_out() >= self.queued + self.called);
        assert_eq!(handed_out(), self.queued + self.called);
    }
}

#[test]
fn completions_reach_an_awake_guest_without_exits() {
    let Some(mut machine) = machine() else { return };
    let (call, exits) = (EventFd::new(0).unwrap(), machine.vcpu.exits().unwrap());
    let mut queues = Queues::new(&machine);
    let count = || exits.count().unwrap();
    let (mut took, mut with, mut without) = (Duration::ZERO, count(), count());
    let reports = run(&mut machine, Job::Fifo, u64::MAX, &call, |mailbox| {
        let (start, before) = (Instant::now(), count());
        for completion in 1..=COMPLETIONS {
            queues.complete(mailbox, &call);
            if completion % 3 == 0 {
                queues.wait_until_seen(mailbox);
            }
        }
        queues.wait_until_seen(mailbox);
        (took, with) = (start.elapsed(), count().since(before));
        queues.assert_handed_out(mailbox);
    });
    assert_eq!((reports, queues.called), (1, 0), "it left only when it was told to");

    run(&mut machine, Job::Spin, u64::MAX, &call, |mailbox| {
        let before = count();
        thread::sleep(took);
        without = count().since(before);
        assert_eq!(mailbox.received.0.load(Acquire), 0);
    });
    // The host's own interrupts depend on what else the machine does. Of the others some are first uses of a page.
    let own = |exits: Count| exits.all - exits.interrupted;
    assert!(
        own(with) <= own(without) + 64,
        "{with:?} with {} completions, {without:?} without",
        queues.queued
    );
}

#[test]
fn a_sleeping_guest_is_called_and_loses_nothing() {
    let Some(mut machine) = machine() else { return };
    let call = EventFd::new(0).unwrap();
    let mut queues = Queues::new(&machine);
    let reports = run(&mut machine, Job::SleepyFifo, u64::MAX, &call, |mailbox| {
        for _ in 0..COMPLETIONS {
            queues.complete(mailbox, &call);
            if queues.random(4) != 0 {
                queues.wait_until_seen(mailbox);
                // Now the guest is about to sleep, and the longer pauses find it asleep.
                let longest = if queues.random(4) == 0 { 50_000 } else { 12_000 };
                let pause_ends = Instant::now() + Duration::from_nanos(queues.random(longest) as u64);
                while Instant::now() < pause_ends {}
            }
        }
        queues.wait_until_seen(mailbox);
        queues.assert_handed_out(mailbox);
    });
    assert!(reports > 1, "it never slept");
    assert!(queues.called > 0, "it was never called");
}

#[test]
fn the_guest_takes_interrupts_and_kicks_and_exits() {
    const COUNT: u64 = 100;
    let Some(mut machine) = machine() else { return };
    let call = EventFd::new(0).unwrap();

    let interrupt = machine.interrupt.try_clone().unwrap();
    let reports = run(&mut machine, Job::Interrupt, COUNT, &call, |mailbox| {
        for count in 1..=COUNT {
            interrupt.write(1).unwrap();
            wait_until("the interrupt is taken", || mailbox.interrupts.load(Acquire) == count);
        }
    });
    assert_eq!(reports, 1);

    let kick = machine.kick.try_clone().unwrap();
    let reports = run(&mut machine, Job::Kick, COUNT, &call, |mailbox| {
        for count in 1..=COUNT {
            wait_until("the guest has kicked", || mailbox.received.0.load(Acquire) == count);
            assert_eq!(kick.read().unwrap(), 1);
            mailbox.line.0.store(count, Release);
        }
    });
    assert_eq!(reports, 1, "KVM takes the kicks, user space sees none");

    let reports = run(&mut machine, Job::Exit, COUNT, &call, |mailbox| {
        wait_until("the guest has exited", || mailbox.received.0.load(Acquire) == COUNT);
    });
    assert_eq!(reports, COUNT + 1);
}
