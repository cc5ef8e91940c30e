//! Poll mode through what interfaces live through: idleness, going down, other rings, other names, and the module's end.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ivcpu_lab::in_host::fifo_guest::{kernel_log, polled, remove_module, run};
use ivcpu_lab::in_host::flow::{move_both_ways, wait_for_more};
use ivcpu_lab::in_host::{Setup, Testbed};
use ivcpu_lab::provision::Kernel;
use ivcpu_lab::result::{Backend, Mode};
use ivcpu_lab::traffic::{End, Traffic, Workload};
use ivcpu_lab::trial::in_emulated_host_with_guest;

/// How often an idle interface may still be polled, for what its neighbours send now and then.
const PATIENCE: Duration = Duration::from_secs(10);
const NAMES: &str = "/sys/module/ivcpu/parameters/poll";

/// How often the IVCPU has polled a context.
fn polls(testbed: &mut Testbed) -> Result<u64> {
    Ok(run(&mut testbed.vm, "cat /sys/kernel/ivcpu/napi_polls")?.trim().parse()?)
}

/// Runs a command in the guest amid a stream into it: the stream flows on, polled.
fn change(testbed: &mut Testbed, wire_end: &End, command: &str) -> Result<()> {
    run(&mut testbed.vm, command)?;
    let before = polls(testbed)?;
    wait_for_more(testbed, wire_end).with_context(|| format!("after {command}"))?;
    ensure!(polls(testbed)? > before, "not polled after {command}");
    Ok(())
}

/// Without traffic the contexts are left to their interrupts.
fn falls_asleep(testbed: &mut Testbed) -> Result<()> {
    let begin = Instant::now();
    while run(&mut testbed.vm, "cat /sys/kernel/ivcpu/napi_contexts")?.trim() != "0" {
        ensure!(begin.elapsed() < PATIENCE, "polled for {PATIENCE:?} without traffic");
        sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn an_interface_sleeps_goes_down_and_changes_under_the_module() -> Result<()> {
    in_emulated_host_with_guest(Kernel::V6_1, |host| {
        let setup = Setup {
            backend: Backend::Vfio,
            mode: Mode::Poll,
            kernel: Kernel::V6_1,
            poll_us: None,
            ..Setup::default()
        };
        let mut testbed = Testbed::start(host, &setup)?;
        move_both_ways(&mut testbed, 1, 1)?;
        falls_asleep(&mut testbed)?;
        let (sleeps, before) = (polled(&mut testbed.vm)?.sleeps, polls(&mut testbed)?);
        ensure!(sleeps > 0, "the contexts were never given back");
        move_both_ways(&mut testbed, 1, 1).context("after a pause")?;
        ensure!(polls(&mut testbed)? > before, "not polled after a pause");
        falls_asleep(&mut testbed)?;
        ensure!(polled(&mut testbed.vm)?.sleeps > sleeps, "given back only once");

        // Long enough for contexts to be the IVCPU's in whatever moment something happens to them.
        run(&mut testbed.vm, "echo 100000 > /sys/module/ivcpu/parameters/poll_us")?;
        let traffic = Traffic::new(Workload::TcpIn);
        let wire_end = testbed.wire.listen(traffic)?;
        testbed.vm.start_traffic(traffic)?;
        wait_for_more(&mut testbed, &wire_end)?;
        let packets = polled(&mut testbed.vm)?.packets;
        change(&mut testbed, &wire_end, "ethtool -G eth0 rx 512 tx 512")?;
        change(&mut testbed, &wire_end, "ip link set eth0 down; ip link set eth0 up")?;
        ensure!(polled(&mut testbed.vm)?.packets > packets + 100, "no packets by polling");
        run(&mut testbed.vm, &format!("echo > {NAMES}"))?;
        let before = polls(&mut testbed)?;
        wait_for_more(&mut testbed, &wire_end).context("with no interface polled")?;
        ensure!(polls(&mut testbed)? == before, "polled although no interface is named");
        change(&mut testbed, &wire_end, &format!("echo eth0 > {NAMES}"))?;
        remove_module(&mut testbed.vm)?;
        wait_for_more(&mut testbed, &wire_end).context("without the module")?;

        let guest_end = testbed.vm.stop_traffic()?;
        ensure!(guest_end.connections == 1 && guest_end.failure.is_none(), "{guest_end:?}");
        kernel_log(&mut testbed.vm)?;
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}
