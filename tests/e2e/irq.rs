//! The IVCPU takes the device interrupts of a stock guest, whose init never writes /proc/irq: the shipped service
//! does, and keeps at it when the driver spreads them again.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use ivcpu_lab::figures;
use ivcpu_lab::in_host::flow::move_both_ways;
use ivcpu_lab::in_host::measure::{measure, queue_interrupts};
use ivcpu_lab::in_host::plan::Plan;
use ivcpu_lab::in_host::{Host, Setup, Testbed};
use ivcpu_lab::result::Role;
use ivcpu_lab::traffic::Workload;
use ivcpu_lab::trial::in_emulated_host;
use ivcpu_vmm::exits::Row;

/// Time the service has to notice that the driver spread the interrupts.
const SERVICE: Duration = Duration::from_secs(3);

/// Moves traffic both ways and checks who took the queues' interrupts.
fn all_interrupts_on_the_ivcpu(testbed: &mut Testbed, connections: u16) -> Result<()> {
    let before = testbed.vm.interrupts()?;
    move_both_ways(testbed, connections, 1)?;
    let after = testbed.vm.interrupts()?;
    let irqs = queue_interrupts(&before, &after, testbed.ivcpu())?;
    let on_ivcpu = irqs.ivcpu.unwrap_or(0);
    ensure!(on_ivcpu > 100, "too few interrupts to say: {irqs:?}");
    ensure!(irqs.other * 99 <= on_ivcpu, "under 99 % on the IVCPU: {irqs:?}\n{before:?}\n{after:?}");
    Ok(())
}

#[test]
fn two_queue_pairs_and_again_after_the_driver_spread_them() -> Result<()> {
    in_emulated_host(|host| {
        let mut testbed = Testbed::start(host, &Setup { queue_pairs: 2, ..Setup::default() })?;
        all_interrupts_on_the_ivcpu(&mut testbed, 2)?;
        for pairs in [1, 2] {
            let (status, text) = testbed.vm.run(&format!("ethtool -L eth0 combined {pairs}"))?;
            ensure!(status == 0, "ethtool: {text}");
            sleep(SERVICE);
            all_interrupts_on_the_ivcpu(&mut testbed, pairs)?;
        }
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}

/// Exits, not interrupts: the rows add up, kicks stay suppressed while the backend polls, and what devices cause is on
/// the IVCPU's pCPU. What is net on the application's pCPUs is under 1 %, but for the control's own spread and for the
/// IPIs that wake its vCPUs: each costs its receiver an exit when it arrives and one when it is acknowledged, and may
/// cost a timer interrupt that arrives beside it the paravirtual end of interrupt.
fn exits_are_on_the_ivcpu(host: &mut Host, setup: Setup) -> Result<()> {
    let workloads = vec![Workload::TcpOut, Workload::TcpIn];
    let plan = Plan { setup, workloads, windows: 3, seconds: 2.0, entries: None, with_bystander: true };
    let measured = measure(host, &plan)?;
    for (workload, load) in plan.workloads.iter().zip(&measured.workloads) {
        let figures = figures::of_load(load, &measured.control, &measured.roles);
        let (total, kvm) = (figures.exits_total.unwrap_or(0), figures.kvm_exits.unwrap_or(0));
        // Within 1 %; the two counters cannot be read at one moment, so a few exits always stand between them.
        ensure!(
            kvm > 0 && total.abs_diff(kvm) * 100 <= kvm.max(10_000),
            "{workload:?}: rows {total}, KVM {kvm}"
        );
        let packets = figures.packets.unwrap_or(0);
        ensure!(packets > 1000, "{workload:?}: only {packets} packets");
        let kicks = figures.kicks.unwrap_or(u64::MAX);
        ensure!(kicks.saturating_mul(100) < packets, "{workload:?}: {kicks} kicks for {packets} packets");
        let accepted = figures.accepted_by_ivcpu.unwrap_or(0.0);
        ensure!(accepted >= 0.99, "{workload:?}: the host saw only {accepted} accepted by the IVCPU");
        ensure!(figures.bytes_verified > figures.bytes, "{workload:?}: {figures:?}");
        for row in [Row::ExternalIntr, Row::ApicAccess] {
            let (net, app) = (figures.net_of(row, None), figures.net_of(row, Some(Role::App)));
            let noise = figures.control_spread(row, Some(Role::App)).unwrap_or(0) as i64;
            let ivcpu = figures.net_of(row, Some(Role::Ivcpu));
            ensure!(ivcpu > 0, "{workload:?}: no net {row} exits on the IVCPU's pCPU");
            let ipis = 2 * figures.net_of(Row::Ipi, None).max(0);
            ensure!(
                app <= net / 100 + noise + ipis,
                "{workload:?}: {row} net {net}, {app} of it on app pCPUs (spread {noise}, {ipis} for IPIs)"
            );
        }
    }
    Ok(())
}

#[test]
fn exits_of_one_queue_pair() -> Result<()> {
    in_emulated_host(|host| {
        let setup = Setup { poll_us: Some("always".into()), ..Setup::default() };
        exits_are_on_the_ivcpu(host, setup)
    })
}

#[test]
fn exits_of_two_queue_pairs_without_pv_eoi() -> Result<()> {
    in_emulated_host(|host| {
        let poll_us = Some("always".into());
        exits_are_on_the_ivcpu(host, Setup { poll_us, queue_pairs: 2, pv_eoi: false, ..Setup::default() })
    })
}
