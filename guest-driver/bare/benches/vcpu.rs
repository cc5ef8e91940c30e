//! What it takes to hand a completion to a guest on a real vCPU: `cargo bench -p ivcpu-bare`.
//!
//! Beside each other in one run, from a host thread to the vCPU: a bare cache line, the FIFO with its consumer
//! awake and asleep, and an interrupt by irqfd; the other way a kick by ioeventfd and an exit to user space. How is
//! said in `measure`. Besides, the exits KVM counts while completions come, and while the guest only spins.

#[path = "../../abi/benches/measure/mod.rs"]
mod measure;

use std::process;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::thread;
use std::time::{Duration, Instant};

use ivcpu_abi::{Producer, Push, Source};
use ivcpu_bare::mailbox::{Job, Mailbox, Report, SAMPLES};
use ivcpu_bare::{Error, Machine, Memory, Vcpu};
use vmm_sys_util::eventfd::EventFd;

use measure::{
    Figures, RUNS, SLEEP_PAUSE, Table, median, nanoseconds_per_tick, on_two_cpus, send_all, ticks, two_cpus,
};

/// Samples of a way that takes nanoseconds, and of one that takes microseconds.
const MANY: usize = 5_000;
const FEW: usize = 400;
/// Least pause between hand-overs that take nanoseconds, ticks.
const PAUSE: u64 = 1_000;
/// How long exits are counted.
const WINDOW: Duration = Duration::from_millis(200);

const _: () = assert!(MANY <= SAMPLES);

/// Runs the vCPU until its job is done. `on` is called at every other report.
fn run(vcpu: &mut Vcpu, mut on: impl FnMut(Report)) {
    loop {
        match vcpu.run().unwrap_or_else(|error| fail(error)) {
            Report::Done => return,
            report => on(report),
        }
    }
}

/// Ends the process, because a thread would wait for the guest for ever.
fn fail(error: Error) -> ! {
    eprintln!("vcpu: {}", chain(&error));
    process::exit(1);
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

fn start(machine: &mut Machine, job: Job, count: usize) {
    machine.start(job, count as u64).unwrap_or_else(|error| fail(error));
}

fn wait_until_ready(mailbox: &Mailbox) {
    while mailbox.ready.0.load(Acquire) == 0 {}
}

fn producer(memory: &Memory) -> (Producer, Source) {
    let mut producer = Producer::claim(memory.region(), 0).expect("the region has this ring");
    let source = producer.register(0x1000).expect("a free source");
    (producer, source)
}

/// Hands over to the guest, `samples` times, with `send`. `on_report` runs on the vCPU's thread.
fn to_guest(
    (vcpu, memory): (&mut Vcpu, &Memory),
    cpus: [usize; 2],
    (samples, pause): (usize, u64),
    send: impl FnMut() + Send,
    on_report: impl FnMut(Report) + Send,
) -> Figures {
    let mailbox = memory.mailbox();
    let sender = || {
        wait_until_ready(mailbox);
        send_all(samples, pause, &mailbox.received.0, send)
    };
    let ((sent_at, sending), ()) = on_two_cpus(cpus, sender, || run(vcpu, on_report));
    let received_at: Vec<_> = mailbox.at.iter().take(samples).map(|at| at.load(Acquire)).collect();
    Figures::new(&sent_at, &received_at, sending)
}

fn cache_line(machine: &mut Machine, cpus: [usize; 2]) -> Figures {
    start(machine, Job::Line, MANY);
    let Machine { vcpu, memory, .. } = machine;
    let line = &memory.mailbox().line.0;
    let mut sent = 0;
    let send = || {
        sent += 1;
        line.store(sent, Release);
    };
    to_guest((vcpu, memory), cpus, (MANY, PAUSE), send, |_| {})
}

fn fifo_awake(machine: &mut Machine, cpus: [usize; 2]) -> Figures {
    start(machine, Job::Fifo, MANY);
    let Machine { vcpu, memory, .. } = machine;
    let (mut producer, source) = producer(memory);
    let send = || assert_eq!(producer.push(source, 0), Push::Queued);
    to_guest((vcpu, memory), cpus, (MANY, PAUSE), send, |_| {})
}

/// The guest sleeps in user space: it exits, and is entered again when it is called.
fn fifo_asleep(machine: &mut Machine, cpus: [usize; 2]) -> Figures {
    start(machine, Job::SleepyFifo, FEW);
    let Machine { vcpu, memory, .. } = machine;
    let (mut producer, source) = producer(memory);
    let call = EventFd::new(0).expect("an eventfd");
    let send = || {
        if let Push::Signal(_) = producer.push(source, 0) {
            call.write(1).expect("the call is written");
        }
    };
    let sleep = |_| {
        call.read().expect("the call is read");
    };
    to_guest((vcpu, memory), cpus, (FEW, SLEEP_PAUSE), send, sleep)
}

fn irqfd(machine: &mut Machine, cpus: [usize; 2]) -> Figures {
    start(machine, Job::Interrupt, FEW);
    let Machine { vcpu, memory, interrupt, .. } = machine;
    let send = || interrupt.write(1).expect("the irqfd is written");
    to_guest((vcpu, memory), cpus, (FEW, SLEEP_PAUSE), send, |_| {})
}

/// What the guest noted about its kicks or exits, beside the times at which the host noticed.
fn from_guest(memory: &Memory, noticed_at: &[u64]) -> Figures {
    let mailbox = memory.mailbox();
    let [at, took] = [&mailbox.at, &mailbox.took]
        .map(|noted| noted.iter().take(FEW).map(|sample| sample.load(Acquire)).collect::<Vec<_>>());
    Figures::new(&at, noticed_at, took)
}

fn ioeventfd(machine: &mut Machine, cpus: [usize; 2]) -> Figures {
    start(machine, Job::Kick, FEW);
    let Machine { vcpu, memory, kick, .. } = machine;
    let mailbox = memory.mailbox();
    let receiver = || {
        (1..=FEW as u64)
            .map(|count| {
                kick.read().expect("the kick is read");
                let at = ticks();
                mailbox.line.0.store(count, Release);
                at
            })
            .collect::<Vec<_>>()
    };
    let (noticed_at, ()) = on_two_cpus(cpus, receiver, || run(vcpu, |_| {}));
    from_guest(memory, &noticed_at)
}

fn exit(machine: &mut Machine, cpus: [usize; 2]) -> Figures {
    start(machine, Job::Exit, FEW);
    let Machine { vcpu, memory, .. } = machine;
    let mailbox = memory.mailbox();
    let mut noticed_at = Vec::with_capacity(FEW);
    let notice = |_| {
        noticed_at.push(ticks());
        mailbox.line.0.store(noticed_at.len() as u64, Release);
    };
    on_two_cpus(cpus, || {}, || run(vcpu, notice));
    from_guest(memory, &noticed_at)
}

/// Exits of the vCPU in [`WINDOW`], and the hand-overs it received by the end.
fn exits(machine: &mut Machine, cpus: [usize; 2], job: Job, mut send: impl FnMut(u64) + Send) -> [f64; 2] {
    start(machine, job, usize::MAX);
    let exits = machine.vcpu.exits().unwrap_or_else(|error| fail(error));
    let exits = || exits.count().unwrap_or_else(|error| fail(Error::Exits(error)));
    let Machine { vcpu, memory, .. } = machine;
    let mailbox = memory.mailbox();
    let host = || {
        wait_until_ready(mailbox);
        let (begin, before) = (Instant::now(), exits().all);
        while begin.elapsed() < WINDOW {
            send(mailbox.received.0.load(Acquire));
            thread::yield_now();
        }
        let taken = exits().all - before;
        mailbox.stop.0.store(1, Release);
        taken
    };
    let (taken, ()) = on_two_cpus(cpus, host, || run(vcpu, |_| {}));
    [taken as f64, mailbox.received.0.load(Acquire) as f64]
}

fn exits_with_completions(machine: &mut Machine, cpus: [usize; 2]) -> [f64; 2] {
    let (mut producer, source) = producer(&machine.memory);
    let mut sent = 0;
    exits(machine, cpus, Job::Fifo, |received| {
        if received == sent {
            sent += 1;
            assert_eq!(producer.push(source, 0), Push::Queued);
        }
    })
}

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("vcpu: a benchmark, measures only under cargo bench");
        return;
    }
    let Some(cpus) = two_cpus() else {
        println!("vcpu: SKIPPED, needs two CPUs");
        return;
    };
    let mut machine = match Machine::new() {
        Ok(machine) => machine,
        Err(error @ Error::NoKvm(_)) => {
            println!("vcpu: SKIPPED, needs a KVM: {error}");
            return;
        }
        Err(error) => fail(error),
    };
    let tick = nanoseconds_per_tick();
    type Way = fn(&mut Machine, [usize; 2]) -> Figures;
    let ways: [Way; 6] = [cache_line, fifo_awake, fifo_asleep, irqfd, ioeventfd, exit];
    let mut table =
        Table::new(["cache line", "FIFO, awake", "FIFO, asleep", "irqfd", "ioeventfd kick", "exit"]);
    let mut windows = Vec::new();
    for _ in 0..RUNS {
        for (index, way) in ways.iter().enumerate() {
            table.add(index, way(&mut machine, cpus));
        }
        let [before, _] = exits(&mut machine, cpus, Job::Spin, |_| {});
        let [with, completions] = exits_with_completions(&mut machine, cpus);
        let [after, _] = exits(&mut machine, cpus, Job::Spin, |_| {});
        windows.push([before, with, after, completions, 2.0 * with / (before + after)]);
    }
    println!(
        "from CPU {} into a vCPU on CPU {}, kicks and exits out of it, ns, medians of {RUNS} runs",
        cpus[0], cpus[1]
    );
    table.print(tick);
    let [before, with, after, completions, exits_ratio] =
        [0, 1, 2, 3, 4].map(|at| median(windows.iter().map(|window| window[at]).collect()));
    println!(
        "exits of the vCPU in {} ms: {with} while it received {completions} completions; {before} before and {after} \
         after, while it spun",
        WINDOW.as_millis()
    );
    println!(
        "vcpu: FIFO awake = {:.2} x the cache line (target: at most 2); irqfd = {:.1} x FIFO awake (target: at \
         least 20); ioeventfd kick = {:.1} x, exit = {:.1} x FIFO awake; exits with completions = {exits_ratio:.2} x \
         those of spinning (target: no more)",
        table.ratio(1, 0),
        table.ratio(3, 1),
        table.ratio(4, 1),
        table.ratio(5, 1),
    );
}
