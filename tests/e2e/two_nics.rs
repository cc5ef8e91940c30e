//! A software NIC and a virtual function in one guest, both under load: one IVCPU serves both, by their interrupts and then
//! without them, and no connection is lost.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ivcpu_lab::in_host::fifo_guest::{kernel_log, module_counters, poll_interface, polled, run};
use ivcpu_lab::in_host::measure::queue_interrupts;
use ivcpu_lab::in_host::{Setup, Testbed};
use ivcpu_lab::link::Link;
use ivcpu_lab::procfs::Interrupt;
use ivcpu_lab::result::Mode;
use ivcpu_lab::traffic::{Counts, End, Traffic, Workload};
use ivcpu_lab::trial::in_emulated_host;

/// Each NIC's link, driver, and what the names of its interrupts begin with.
const NICS: [(Link, &str, &str); 2] =
    [(Link::First, "virtio_net", "virtio"), (Link::Second, "igbvf", "eth1")];
const HALF: Duration = Duration::from_secs(30);
/// How often every stream must have moved.
const STEP: Duration = Duration::from_secs(5);

/// Both ends of a NIC's traffic.
struct Load {
    link: Link,
    wire: End,
    moved: [u64; 2],
}

impl Load {
    fn start(testbed: &mut Testbed, link: Link) -> Result<Self> {
        let traffic = Traffic { link, both_ways: true, ..Traffic::new(Workload::TcpOut) };
        let wire = match (link, &testbed.second_wire) {
            (Link::Second, Some(wire)) => wire,
            _ => &testbed.wire,
        };
        let wire = wire.listen(traffic)?;
        testbed.vm.start_traffic(traffic)?;
        Ok(Self { link, wire, moved: [0; 2] })
    }

    /// More bytes than last time have arrived as they were sent, both ways.
    fn check(&mut self, testbed: &mut Testbed) -> Result<()> {
        let guest = testbed.vm.traffic_counts_on(self.link)?;
        let moved = verified(&[guest, self.wire.counts()])?;
        let grew = moved.iter().zip(&self.moved).all(|(now, before)| now > before);
        ensure!(grew, "{:?} stood still at {moved:?} bytes in and out, was at {:?}", self.link, self.moved);
        self.moved = moved;
        Ok(())
    }

    fn stop(self, testbed: &mut Testbed) -> Result<[u64; 2]> {
        let guest = testbed.vm.stop_traffic_on(self.link)?;
        verified(&[guest, self.wire.stop()])
    }
}

/// What arrived at both ends of one connection.
fn verified(ends: &[Counts; 2]) -> Result<[u64; 2]> {
    for end in ends {
        ensure!(end.failure.is_none() && end.connections == 1, "{end:?}");
    }
    Ok(ends.each_ref().map(|end| end.bytes_verified))
}

fn keep_up(testbed: &mut Testbed, loads: &mut [Load]) -> Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < HALF {
        sleep(STEP);
        for load in loads.iter_mut() {
            load.check(testbed)?;
        }
    }
    Ok(())
}

fn of_device(interrupts: &[Interrupt], prefix: &str) -> Vec<Interrupt> {
    interrupts.iter().filter(|interrupt| interrupt.name.starts_with(prefix)).cloned().collect()
}

#[test]
fn both_are_served_by_one_ivcpu_and_lose_no_connection() -> Result<()> {
    in_emulated_host(|host| {
        // The region is there, but the service starts first.
        let setup = Setup { mode: Mode::Fifo, without_module: true, with_function: true, ..Setup::default() };
        let mut testbed = Testbed::start(host, &setup)?;
        for (link, driver, _) in NICS {
            let path = format!("/sys/class/net/{}/device/driver", link.interface());
            let found = run(&mut testbed.vm, &format!("basename $(readlink {path})"))?;
            ensure!(found.trim() == driver, "{} is {found}", link.interface());
        }
        let mut loads = Vec::new();
        for (link, ..) in NICS {
            loads.push(Load::start(&mut testbed, link)?);
        }
        let mut readings = vec![testbed.vm.interrupts()?];
        keep_up(&mut testbed, &mut loads)?;
        readings.push(testbed.vm.interrupts()?);

        let ivcpu = testbed.ivcpu();
        let cpu = ivcpu.context("the guest's IVCPU")?;
        poll_interface(&mut testbed.vm, cpu, Link::Second, Some(60_000_000))?;
        keep_up(&mut testbed, &mut loads)?;
        readings.push(testbed.vm.interrupts()?);
        let entries = module_counters(&mut testbed.vm)?.entries;
        let polled = polled(&mut testbed.vm)?.packets;
        println!("without interrupts: {entries} entries, {polled} packets polled");
        ensure!(entries > 300 && polled > 3000, "{entries} entries, {polled} packets polled");

        for (link, _, prefix) in NICS {
            let halves: Result<Vec<_>> = readings
                .windows(2)
                .map(|half| {
                    queue_interrupts(&of_device(&half[0], prefix), &of_device(&half[1], prefix), ivcpu)
                })
                .collect();
            let halves = halves?;
            println!("{}: {halves:?}", link.interface());
            let on_ivcpu = halves[0].ivcpu.unwrap_or(0);
            ensure!(on_ivcpu > 100 && halves[0].other * 49 <= on_ivcpu, "{}: {halves:?}", link.interface());
            // Then hardly an interrupt is left, and what the guest counts on the IVCPU are runs of igbvf's handler.
            ensure!(halves[1].other <= 10, "{}: {halves:?}", link.interface());
        }
        for load in loads {
            let link = load.link;
            println!("{}: {:?} bytes in and out", link.interface(), load.stop(&mut testbed)?);
        }
        kernel_log(&mut testbed.vm)?;
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}
