//! A virtual function passed through to a stock guest: its traffic, its interrupts on the IVCPU, and polled there.

use anyhow::{Context, Result, ensure};
use ivcpu_lab::figures;
use ivcpu_lab::in_host::fifo_guest::run;
use ivcpu_lab::in_host::flow::move_both_ways;
use ivcpu_lab::in_host::measure::measure;
use ivcpu_lab::in_host::plan::Plan;
use ivcpu_lab::in_host::{Host, Setup, Testbed};
use ivcpu_lab::link::Link;
use ivcpu_lab::pcpu;
use ivcpu_lab::procfs::passthrough_interrupts;
use ivcpu_lab::report::ALLOWED_PER_PACKET;
use ivcpu_lab::result::{Backend, Mode, Role};
use ivcpu_lab::traffic::Workload;
use ivcpu_lab::trial::in_emulated_host;
use ivcpu_vmm::exits::Row;

fn passthrough(mode: Mode) -> Setup {
    Setup { backend: Backend::Vfio, mode, poll_us: None, ..Setup::default() }
}

#[test]
fn a_killed_vmm_leaves_the_function_to_the_next() -> Result<()> {
    in_emulated_host(|host| {
        let mut testbed = Testbed::start(host, &passthrough(Mode::Irq))?;
        iperf3_and_sockperf(&mut testbed)?;
        let mut testbed = testbed.replace_vm(host)?;
        let before = host_interrupts()?;
        move_both_ways(&mut testbed, 1, 2)?;
        let taken: Vec<u64> = host_interrupts()?.iter().zip(&before).map(|(now, then)| now - then).collect();
        println!("the host's interrupts of the function, by pCPU: {taken:?}");
        let on_ivcpu = taken.get(pcpu::IVCPU).copied().unwrap_or(0);
        ensure!(on_ivcpu > 100 && taken.iter().sum::<u64>() == on_ivcpu, "{taken:?}");
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}

/// The host's interrupts of functions that are passed through, by pCPU.
fn host_interrupts() -> Result<Vec<u64>> {
    let interrupts = passthrough_interrupts()?;
    let pcpus = interrupts.first().context("no interrupt of a function that is passed through")?.taken.len();
    Ok((0..pcpus).map(|pcpu| interrupts.iter().map(|interrupt| interrupt.taken[pcpu]).sum()).collect())
}

/// The programs others measure with, their servers in the guest.
fn iperf3_and_sockperf(testbed: &mut Testbed) -> Result<()> {
    run(&mut testbed.vm, "iperf3 -s -D")?;
    let guest = Link::First.guest();
    run(&mut testbed.vm, &format!("sockperf sr --tcp -i {guest} > /dev/null 2>&1 &"))?;
    let wire = |words: &str| testbed.wire.output(&words.split(' ').collect::<Vec<_>>());
    for direction in ["", " -R"] {
        let report = wire(&format!("iperf3 -c {guest} -t 2 -J{direction}"))?;
        let report: serde_json::Value = serde_json::from_str(&report).context("iperf3's report")?;
        let rate = report["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3's rate")?;
        println!("iperf3{direction}: {:.0} Mbit/s", rate / 1e6);
        ensure!(rate > 8e6, "{report}");
    }
    let report = wire(&format!("sockperf pp --tcp -i {guest} -t 2"))?;
    let line = report.lines().find(|line| line.contains("percentile 50.0")).context(report.clone())?;
    println!("sockperf: {}", line.trim());
    ensure!(report.contains("dropped messages = 0"), "{report}");
    Ok(())
}

/// The guest's interrupts of the function are on the IVCPU, and so are the exits they cause.
#[test]
fn interrupts_and_their_exits_are_on_the_ivcpu() -> Result<()> {
    in_emulated_host(|host| {
        let workloads = vec![Workload::TcpOut, Workload::TcpIn];
        let setup = Setup { pv_eoi: false, ..passthrough(Mode::Irq) };
        let plan = Plan { setup, workloads, windows: 3, seconds: 2.0, entries: None, with_bystander: true };
        let measured = measure(host, &plan)?;
        for (workload, load) in plan.workloads.iter().zip(&measured.workloads) {
            let figures = figures::of_load(load, &measured.control, &measured.roles);
            let irqs = figures.guest_irqs.context("the guest's interrupts")?;
            let on_ivcpu = irqs.ivcpu.unwrap_or(0);
            ensure!(on_ivcpu > 100 && irqs.other * 49 <= on_ivcpu, "{workload:?}: {irqs:?}");
            for row in [Row::ExternalIntr, Row::ApicAccess] {
                let (net, app) = (figures.net_of(row, None), figures.net_of(row, Some(Role::App)));
                let noise = figures.control_spread(row, Some(Role::App)).unwrap_or(0) as i64;
                let ipis = 2 * figures.net_of(Row::Ipi, None).max(0);
                println!(
                    "{workload:?}: {row} net {net}, {app} of it on app pCPUs (spread {noise}, {ipis} for IPIs)"
                );
                ensure!(
                    figures.net_of(row, Some(Role::Ivcpu)) > 0 && app <= net / 50 + noise + ipis,
                    "{workload:?}: {row} net {net}, {app} of it on app pCPUs (spread {noise}, {ipis} for IPIs)"
                );
            }
        }
        Ok(())
    })
}

/// With the function's NAPI context and its transmit ring polled no device exit is left on any pCPU, whichever way the
/// stream goes.
#[test]
fn a_polled_function_receives_and_sends_without_exits() -> Result<()> {
    in_emulated_host(|host: &mut Host| {
        let setup = Setup { ivcpu_poll_us: Some(600_000_000), ..passthrough(Mode::Poll) };
        let workloads = vec![Workload::TcpIn, Workload::TcpOut];
        let plan = Plan { setup, workloads, windows: 3, seconds: 2.0, entries: None, with_bystander: false };
        let measured = measure(host, &plan)?;
        for (workload, load) in plan.workloads.iter().zip(&measured.workloads) {
            let figures = figures::of_load(load, &measured.control, &measured.roles);
            let (packets, interrupts) = (figures.packets, figures.device_interrupts);
            println!("{workload:?}: {packets:?} packets, {interrupts:?} interrupts, {:?}", figures.polled);
            ensure!(packets > Some(1000), "{packets:?}");
            // The host saw next to no interrupt delivered.
            ensure!(interrupts.zip(packets).is_some_and(|(i, p)| i * 100 <= p), "{interrupts:?}");
            for pcpu in figures.pcpus.iter().filter(|p| matches!(p.role, Role::App | Role::Ivcpu)) {
                let [_, any] = ALLOWED_PER_PACKET;
                let exits = figures.exitless(pcpu, any).context("three control windows")?;
                println!("pCPU{} {}: {exits:?}", pcpu.pcpu, pcpu.role);
                ensure!(exits.holds(), "{exits:?}: {pcpu:?}");
            }
        }
        Ok(())
    })
}
