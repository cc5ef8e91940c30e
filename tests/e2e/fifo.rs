//! Completions through the FIFO: no device exit is left on any pCPU, and nobody's death or lie costs a connection.

use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use ivcpu_lab::figures;
use ivcpu_lab::in_host::fifo_guest::{
    kernel_log, load_module, module_counters, module_state, remove_module, run, scribble,
};
use ivcpu_lab::in_host::flow::{move_both_ways, survive_killed_backends, wait_for_more};
use ivcpu_lab::in_host::measure::{measure, queue_interrupts};
use ivcpu_lab::in_host::plan::Plan;
use ivcpu_lab::in_host::{Host, Setup, Testbed};
use ivcpu_lab::pcpu;
use ivcpu_lab::report::ALLOWED_PER_PACKET;
use ivcpu_lab::result::{Mode, Role};
use ivcpu_lab::traffic::{Traffic, Workload};
use ivcpu_lab::trial::in_emulated_host;
use ivcpu_vmm::exits::Row;

/// Longer than any test: the IVCPU never sleeps.
const NO_SLEEP_US: u64 = 600_000_000;
/// Entries a measured load has to deliver.
const ENTRIES: u64 = 2_000;

fn fifo() -> Setup {
    Setup { mode: Mode::Fifo, poll_us: Some("always".into()), ..Setup::default() }
}

fn spinning() -> Setup {
    Setup { ivcpu_poll_us: Some(NO_SLEEP_US), ..fifo() }
}

/// Traffic of all kinds: nearly every completion is an entry, nearly none an interrupt, and the device exits that are
/// left are within the promise, pCPU by pCPU. The control spins alike and its guest is busy.
fn exitless(host: &mut Host, setup: Setup, entries: u64, seconds: f64) -> Result<()> {
    let workloads = vec![Workload::TcpOut, Workload::TcpIn, Workload::TcpRr];
    let plan = Plan { setup, workloads, windows: 5, seconds, entries: Some(entries), with_bystander: false };
    let measured = measure(host, &plan)?;
    for (workload, load) in plan.workloads.iter().zip(&measured.workloads) {
        let figures = figures::of_load(load, &measured.control, &measured.roles);
        let (fifo, completions) = (figures.fifo, figures.completions.unwrap_or(0));
        println!(
            "{workload:?}: {:?} packets, {completions} completions, {fifo:?}, {:?}, IPI exits {}",
            figures.packets,
            figures.guest_irqs,
            figures.net_of(Row::Ipi, None)
        );
        ensure!(fifo.entries.unwrap_or(0) >= entries, "{workload:?}: too few entries to say: {fifo:?}");
        let irqs = figures.guest_irqs.context("the guest's interrupts")?;
        let irqs = irqs.ivcpu.unwrap_or(0) + irqs.other;
        ensure!(irqs * 100 < completions, "{workload:?}: {irqs} interrupts for {completions} completions");
        ensure!(figures.bytes_verified > figures.bytes, "{workload:?}: {figures:?}");
        // vCPUs that poll when idle take more of the host's ticks in guest mode than a busy loop does, which is no
        // device's doing; what polling is for are the IPIs.
        let polls = plan.setup.halt_poll_us.is_some();
        if polls {
            let ipis = figures.net_of(Row::Ipi, None);
            ensure!(
                ipis * 100 < completions as i64,
                "{workload:?}: {ipis} IPI exits for {completions} completions"
            );
        }
        let judged =
            |role: Role| role == Role::Ivcpu || role == Role::Backend || (role == Role::App && !polls);
        for pcpu in figures.pcpus.iter().filter(|p| judged(p.role)) {
            let [application, any] = ALLOWED_PER_PACKET;
            let per_packet = if pcpu.role == Role::App { application } else { any };
            let exits = figures.exitless(pcpu, per_packet).context("three control windows")?;
            println!("{workload:?}: pCPU{} {}: {exits:?}", pcpu.pcpu, pcpu.role);
            ensure!(
                exits.holds() || exits.holds_but_for_timers(),
                "{workload:?}: pCPU{} {}: {exits:?}\n{pcpu:?}",
                pcpu.pcpu,
                pcpu.role
            );
        }
    }
    Ok(())
}

#[test]
fn no_device_exit_is_left() -> Result<()> {
    in_emulated_host(|host| exitless(host, spinning(), ENTRIES, 2.5))
}

/// With idle application vCPUs that poll for longer than the gaps, the IPIs that wake them go too.
#[test]
fn no_wake_up_ipi_is_left_where_the_guest_polls_when_idle() -> Result<()> {
    in_emulated_host(|host| exitless(host, Setup { halt_poll_us: Some(1_000_000), ..spinning() }, 1000, 2.0))
}

/// An entry that is never written cannot be found by looking at the ring: only the overdue signal delivers.
#[test]
fn without_entries_only_late_signals_deliver() -> Result<()> {
    in_emulated_host(|host| {
        let setup = Setup { fifo_option: Some("lose_entries=on,bound_us=1000".into()), ..spinning() };
        let mut testbed = Testbed::start(host, &setup)?;
        let before = module_counters(&mut testbed.vm)?;
        let interrupts = testbed.vm.interrupts()?;
        move_both_ways(&mut testbed, 1, 2)?;
        let stats = testbed.backend.as_ref().context("the backend")?.stats()?;
        let late = stats.total(|queue| queue.fallbacks);
        let after = module_counters(&mut testbed.vm)?;
        let irqs = queue_interrupts(&interrupts, &testbed.vm.interrupts()?, testbed.ivcpu())?;
        println!("{stats:?}\n{before:?}\n{after:?}\n{irqs:?}");
        ensure!(late > 100 && irqs.ivcpu.unwrap_or(0) > 100, "{late} late signals, {irqs:?}");
        let written = stats.total(|queue| queue.fifo_entries);
        ensure!(
            written == 0 && after.entries == before.entries,
            "entries all the same: {written}, {after:?}"
        );
        ensure!(after.fallbacks > before.fallbacks, "the module counted no interrupt while awake: {after:?}");
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}

#[test]
fn a_killed_backend_costs_a_pause_but_no_connection() -> Result<()> {
    in_emulated_host(|host| {
        let mut testbed = Testbed::start(host, &fifo())?;
        survive_killed_backends(&mut testbed, host)?;
        let before = module_counters(&mut testbed.vm)?;
        move_both_ways(&mut testbed, 1, 2)?;
        let after = module_counters(&mut testbed.vm)?;
        ensure!(
            after.entries > before.entries + 100,
            "the FIFO is not used again: {before:?}, then {after:?}"
        );
        kernel_log(&mut testbed.vm)?;
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}

/// Two queue pairs, so two producers; the module goes and comes, and the driver makes its queues anew, in mid-stream.
#[test]
fn the_module_reloaded_and_the_driver_rebound_in_mid_stream() -> Result<()> {
    in_emulated_host(|host| {
        let setup = Setup { queue_pairs: 2, poll_us: Some("50".into()), ..fifo() };
        let mut testbed = Testbed::start(host, &setup)?;
        let ivcpu = testbed.ivcpu().context("an IVCPU")?;
        let traffic = Traffic { connections: 2, ..Traffic::new(Workload::TcpIn) };
        let wire_end = testbed.wire.listen(traffic)?;
        testbed.vm.start_traffic(traffic)?;
        for _ in 0..3 {
            wait_for_more(&mut testbed, &wire_end)?;
            remove_module(&mut testbed.vm)?;
            wait_for_more(&mut testbed, &wire_end)?;
            load_module(&mut testbed.vm, ivcpu, None)?;
        }
        for pairs in [1, 2] {
            run(&mut testbed.vm, &format!("ethtool -L eth0 combined {pairs}"))?;
            wait_for_more(&mut testbed, &wire_end)?;
        }
        let counters = module_counters(&mut testbed.vm)?;
        ensure!(counters.entries > 0, "the FIFO is not used: {counters:?}");
        let guest_end = testbed.vm.stop_traffic()?;
        ensure!(guest_end.connections == 2 && guest_end.failure.is_none(), "{guest_end:?}");

        // A rebound driver loses its address and so every connection, but nothing else.
        run(
            &mut testbed.vm,
            "cd /sys/bus/virtio/drivers/virtio_net && d=$(ls -d virtio*) && echo $d > unbind && echo $d > bind",
        )?;
        testbed.vm.bring_up_network(2)?;
        let before = module_counters(&mut testbed.vm)?;
        move_both_ways(&mut testbed, 2, 2)?;
        let after = module_counters(&mut testbed.vm)?;
        ensure!(after.entries > before.entries + 100, "{before:?}, then {after:?}");
        kernel_log(&mut testbed.vm)?;
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}

/// Whatever takes away queues, region, CPU or all devices for a while, in mid-stream: the module lets go and comes back,
/// and the kernel has nothing to complain of.
#[test]
fn devices_and_the_cpu_come_and_go_under_traffic() -> Result<()> {
    in_emulated_host(|host| {
        let mut testbed = Testbed::start(host, &fifo())?;
        let ivcpu = testbed.ivcpu().context("an IVCPU")?;
        let traffic = Traffic::new(Workload::TcpIn);
        let wire_end = testbed.wire.listen(traffic)?;
        testbed.vm.start_traffic(traffic)?;
        let function = "f=$(grep -l 0x1110 /sys/bus/pci/devices/*/device); f=$(basename $(dirname $f))";
        for what in [
            format!("{function}; cd /sys/bus/pci/drivers/ivcpu && echo $f > unbind && echo $f > bind"),
            format!("{function}; echo 1 > /sys/bus/pci/devices/$f/remove; echo 1 > /sys/bus/pci/rescan"),
            "cd /sys/power && echo devices > pm_test && echo freeze > state; echo none > pm_test".to_owned(),
            format!(
                "cd /sys/devices/system/cpu/cpu{ivcpu} && {{ echo 0 > online && echo 1 > online; true; }}"
            ),
        ] {
            let before = module_counters(&mut testbed.vm)?;
            run(&mut testbed.vm, &what)?;
            wait_for_more(&mut testbed, &wire_end).with_context(|| format!("after {what}"))?;
            let after = module_counters(&mut testbed.vm)?;
            ensure!(after.entries > before.entries, "not polled after {what}: {before:?}, then {after:?}");
            kernel_log(&mut testbed.vm)?;
        }
        let guest_end = testbed.vm.stop_traffic()?;
        ensure!(guest_end.connections == 1 && guest_end.failure.is_none(), "{guest_end:?}");

        // The NIC itself: its connections are gone, the next ones go through the FIFO again.
        run(
            &mut testbed.vm,
            "d=$(readlink -f /sys/class/net/eth0/device); echo 1 > $(dirname $d)/remove; echo 1 > /sys/bus/pci/rescan",
        )?;
        testbed.vm.bring_up_network(1)?;
        let before = module_counters(&mut testbed.vm)?;
        move_both_ways(&mut testbed, 1, 1)?;
        let after = module_counters(&mut testbed.vm)?;
        ensure!(after.entries > before.entries, "the new NIC is not polled: {before:?}, then {after:?}");
        kernel_log(&mut testbed.vm)?;
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}

/// The host takes the IVCPU's pCPU away for a second, while the IVCPU says that it is awake.
#[test]
fn an_ivcpu_that_does_not_run_costs_a_pause_but_no_connection() -> Result<()> {
    in_emulated_host(|host| {
        let fifo_option = Some("bound_us=10000".into());
        let mut testbed = Testbed::start(host, &Setup { fifo_option, ..spinning() })?;
        let traffic = Traffic::new(Workload::TcpIn);
        let wire_end = testbed.wire.listen(traffic)?;
        testbed.vm.start_traffic(traffic)?;
        wait_for_more(&mut testbed, &wire_end)?;
        let late = |testbed: &Testbed| -> Result<u64> {
            let stats = testbed.backend.as_ref().context("the backend")?.stats()?;
            Ok(stats.total(|queue| queue.fallbacks))
        };
        let before = late(&testbed)?;
        let hog = thread::spawn(|| -> Result<()> {
            pcpu::pin(0, &[pcpu::IVCPU])?;
            realtime()?;
            let start = Instant::now();
            while start.elapsed() < Duration::from_secs(1) {
                std::hint::spin_loop();
            }
            Ok(())
        });
        hog.join().map_err(|_| anyhow!("the hog panicked"))??;
        ensure!(late(&testbed)? > before, "nothing was late although the IVCPU did not run");
        wait_for_more(&mut testbed, &wire_end)?;
        let guest_end = testbed.vm.stop_traffic()?;
        ensure!(guest_end.connections == 1 && guest_end.failure.is_none(), "{guest_end:?}");
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}

/// Makes the calling thread one that no ordinary thread, a vCPU's for one, gets past.
fn realtime() -> Result<()> {
    let parameters = libc::sched_param { sched_priority: 50 };
    // SAFETY: the call reads one structure, which outlives it.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameters) };
    ensure!(result == 0, "SCHED_FIFO: {}", std::io::Error::last_os_error());
    Ok(())
}

/// CPU seconds the IVCPU's thread has used on the host.
fn ivcpu_seconds(testbed: &Testbed) -> Result<f64> {
    let thread = *testbed.vm.vcpu_threads().last().context("the IVCPU's thread")?;
    let path = format!("/proc/{}/task/{thread}/schedstat", testbed.vm.id());
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let nanoseconds: u64 = text.split(' ').next().unwrap_or_default().parse().context(text.clone())?;
    Ok(nanoseconds as f64 / 1e9)
}

/// CPU seconds the module's thread has used in the guest.
fn thread_seconds(testbed: &mut Testbed, ivcpu: usize) -> Result<f64> {
    let find = format!(
        "cd /proc; for t in [0-9]*; do [ \"$(cat $t/comm)\" = ivcpu/{ivcpu} ] && cat $t/schedstat; done; true"
    );
    let text = run(&mut testbed.vm, &format!("{{ {find}; }} 2>/dev/null"))?;
    let nanoseconds: u64 = text.split(' ').next().unwrap_or_default().parse().context(text.clone())?;
    Ok(nanoseconds as f64 / 1e9)
}

/// The module's own time to poll is over soon: its thread sleeps and the vCPU halts, and the next packet still gets
/// through. The vCPU's own share counts in its better round: a stray timer of the guest's costs milliseconds here.
#[test]
fn an_idle_ivcpu_sleeps_and_wakes_for_the_first_packet() -> Result<()> {
    in_emulated_host(|host| {
        let mut testbed = Testbed::start(host, &fifo())?;
        let ivcpu = testbed.ivcpu().context("an IVCPU")?;
        let mut vcpu_shares = Vec::new();
        for round in 0..2 {
            move_both_ways(&mut testbed, 1, 1)?;
            sleep(Duration::from_secs(1));
            ensure!(module_state(&mut testbed.vm)? == "sleeping", "round {round}: not asleep after a second");
            let thread = thread_seconds(&mut testbed, ivcpu)?;
            let (begin, used) = (Instant::now(), ivcpu_seconds(&testbed)?);
            sleep(Duration::from_secs(3));
            let seconds = begin.elapsed().as_secs_f64();
            vcpu_shares.push((ivcpu_seconds(&testbed)? - used) / seconds);
            let share = (thread_seconds(&mut testbed, ivcpu)? - thread) / seconds;
            println!("round {round}: the idle thread uses {:.2} %, the vCPU {vcpu_shares:?}", share * 100.0);
            ensure!(share < 0.01, "round {round}: the idle thread uses {:.2} % of its CPU", share * 100.0);
        }
        ensure!(vcpu_shares.iter().any(|share| *share < 0.01), "the idle vCPU uses {vcpu_shares:?}");
        let counters = module_counters(&mut testbed.vm)?;
        ensure!(counters.sleeps > 0 && counters.wakeups > 0, "{counters:?}");
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}

/// With no time to poll every completion finds the IVCPU asleep, or going to sleep. A lost wake-up would be delivered by
/// the late signal, a second later: none may be needed. And every interrupt that wakes comes to the IVCPU.
#[test]
fn falling_asleep_after_every_completion_loses_none() -> Result<()> {
    in_emulated_host(|host| {
        let fifo_option = Some("bound_us=1000000".into());
        let mut testbed = Testbed::start(host, &Setup { ivcpu_poll_us: Some(0), fifo_option, ..fifo() })?;
        run(&mut testbed.vm, "ethtool -L eth0 combined 1 || true")?;
        move_both_ways(&mut testbed, 1, 1)?;
        let before = testbed.vm.interrupts()?;
        let traffic = Traffic::new(Workload::TcpRr);
        let wire_end = testbed.wire.listen(traffic)?;
        testbed.vm.start_traffic(traffic)?;
        let mut last = 0;
        for _ in 0..10 {
            sleep(Duration::from_secs(1));
            let transactions = wire_end.counts().transactions;
            ensure!(transactions > last, "the ping-pong stands still at {last}");
            last = transactions;
        }
        let guest_end = testbed.vm.stop_traffic()?;
        let counters = module_counters(&mut testbed.vm)?;
        println!("{last} round trips, {counters:?}");
        ensure!(guest_end.failure.is_none(), "{guest_end:?}");
        ensure!(counters.sleeps > last / 2, "{last} round trips, but {counters:?}");
        let stats = testbed.backend.as_ref().context("the backend")?.stats()?;
        let late = stats.total(|queue| queue.fallbacks);
        ensure!(late == 0, "{late} completions had to be signalled late: {stats:?}");
        let irqs = queue_interrupts(&before, &testbed.vm.interrupts()?, testbed.ivcpu())?;
        ensure!(irqs.other * 99 <= irqs.ivcpu.unwrap_or(0), "the module does not keep interrupts: {irqs:?}");
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}

/// With it, the region has to be ordinary write-back memory for the guest: polling uncached memory would cost a bus
/// transaction a look.
#[test]
fn without_the_module_the_same_vm_runs_by_interrupts_and_with_it_maps_the_region_write_back() -> Result<()> {
    in_emulated_host(|host| {
        let mut testbed = Testbed::start(host, &Setup { without_module: true, ..fifo() })?;
        let before = testbed.vm.interrupts()?;
        move_both_ways(&mut testbed, 1, 2)?;
        let irqs = queue_interrupts(&before, &testbed.vm.interrupts()?, testbed.ivcpu())?;
        ensure!(irqs.ivcpu.unwrap_or(0) > 100 && irqs.other * 99 <= irqs.ivcpu.unwrap_or(0), "{irqs:?}");
        let stats = testbed.backend.as_ref().context("the backend")?.stats()?;
        ensure!(stats.queues.iter().all(|queue| queue.fifo_entries == 0), "{stats:?}");

        let ivcpu = testbed.ivcpu().context("the guest's IVCPU")?;
        let vm = &mut testbed.vm;
        load_module(vm, ivcpu, None)?;
        run(vm, "mount -t debugfs debugfs /sys/kernel/debug")?;
        let resource = run(
            vm,
            "cd /sys/bus/pci/devices; grep -l 0x1110 */device | while read f; do sed -n 3p $(dirname $f)/resource; done",
        )?;
        let bar = resource.split(' ').next().and_then(|word| word.strip_prefix("0x")).context("BAR 2")?;
        ensure!(u64::from_str_radix(bar, 16)? >= 1 << 32, "BAR 2 lies below 4 GiB: {resource}");
        let types = run(vm, "cat /sys/kernel/debug/x86/pat_memtype_list")?;
        let ours: Vec<_> =
            types.lines().filter(|line| line.contains(&bar.trim_start_matches('0').to_owned())).collect();
        ensure!(
            !ours.is_empty() && ours.iter().all(|line| line.contains("write-back")),
            "{bar}: {ours:?}\n{types}"
        );
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}

/// Rings, pending words and the state written over while traffic flows, then a second consumer.
#[test]
fn damage_and_a_second_consumer_cost_no_connection() -> Result<()> {
    in_emulated_host(|host| {
        let mut testbed = Testbed::start(host, &spinning())?;
        let ivcpu = testbed.ivcpu().context("an IVCPU")?;
        let region = testbed.region()?.to_owned();
        let traffic = Traffic::new(Workload::TcpIn);
        let wire_end = testbed.wire.listen(traffic)?;
        testbed.vm.start_traffic(traffic)?;
        // Offsets as docs/fifo-abi.md has them: state, hints, summary, then ring 0.
        for (offset, length) in
            [(0x80, 4), (0x100, 4), (0x180, 8), (0x1000, 4), (0x1400, 1024), (0x2000, 2048)]
        {
            for byte in [0xff, 0x00, 0x55] {
                scribble(&region, offset, &vec![byte; length])?;
                wait_for_more(&mut testbed, &wire_end)
                    .with_context(|| format!("after {byte:#x} over {length} bytes at {offset:#x}"))?;
            }
        }
        // Without the bindings completions are dropped, until the queues are announced anew.
        for byte in [0xff, 0x00, 0x55] {
            scribble(&region, 0x1800, &[byte; 2048])?;
            sleep(Duration::from_millis(300));
        }
        testbed.kill_backend()?;
        testbed.restart_backend(host)?;
        remove_module(&mut testbed.vm)?;
        load_module(&mut testbed.vm, ivcpu, Some(1000))?;
        wait_for_more(&mut testbed, &wire_end)?;

        // Another owner: the module stops at its next sleep, with one clear line, and interrupts carry on.
        scribble(&region, 0x84, &[0x11; 4])?;
        sleep(Duration::from_secs(1));
        wait_for_more(&mut testbed, &wire_end)?;
        let guest_end = testbed.vm.stop_traffic()?;
        ensure!(guest_end.connections == 1 && guest_end.failure.is_none(), "{guest_end:?}");
        sleep(Duration::from_secs(1));
        ensure!(module_state(&mut testbed.vm)? == "absent");
        let log = kernel_log(&mut testbed.vm)?;
        ensure!(log.contains("another"), "no word of another consumer: {log}");
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}
