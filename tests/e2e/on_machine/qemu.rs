//! Stock QEMU, all its guest's life: it emulates the vCPUs itself, so that this runs anywhere. (Under KVM, in the emulated
//! host, it is in e2e/qemu.rs.)

use anyhow::{Context, Result, ensure};
use ivcpu_lab::in_host::flow::{move_both_ways, survive_killed_backends, survive_pauses, wait_for_more};
use ivcpu_lab::in_host::{Host, Setup, Testbed, Vmm};
use ivcpu_lab::result::Mode;
use ivcpu_lab::traffic::{Traffic, Workload};
use ivcpu_lab::trial::on_this_machine;

const QUEUE_PAIRS: u16 = 2;
/// So many that hashing puts them all on one queue pair in one run of some ten thousand.
const CONNECTIONS: u16 = 16;

#[test]
fn a_guest_is_stopped_unplugged_reset_and_replaced_and_its_backend_killed() -> Result<()> {
    on_this_machine(|host| {
        let setup =
            Setup { vmm: Vmm::QemuTcg, mode: Mode::Stock, queue_pairs: QUEUE_PAIRS, ..Setup::default() };
        let mut testbed = Testbed::start(host, &setup)?;
        both_queue_pairs_carry(&mut testbed)?;
        survive_pauses(&mut testbed).context("stopped and continued")?;
        survive_killed_backends(&mut testbed, host).context("the backend killed")?;
        testbed.unplug_nic()?;
        testbed.plug_nic()?;
        move_both_ways(&mut testbed, QUEUE_PAIRS, 0).context("unplugged and plugged again")?;
        testbed.vm.reset()?;
        testbed.vm.bring_up_network(QUEUE_PAIRS)?;
        move_both_ways(&mut testbed, QUEUE_PAIRS, 0).context("reset")?;
        let mut testbed = is_killed_amid_traffic(testbed, host)?;
        move_both_ways(&mut testbed, QUEUE_PAIRS, 0).context("replaced")?;
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}

fn both_queue_pairs_carry(testbed: &mut Testbed) -> Result<()> {
    move_both_ways(testbed, CONNECTIONS, 0)?;
    let stats = testbed.backend.as_ref().context("the backend")?.stats()?;
    ensure!(stats.queues.len() == 4 && stats.queues.iter().all(|queue| queue.packets > 0), "{stats:?}");
    ensure!(stats.total(|queue| queue.dropped) == 0, "{stats:?}");
    Ok(())
}

fn is_killed_amid_traffic(mut testbed: Testbed, host: &Host) -> Result<Testbed> {
    let traffic = Traffic::new(Workload::TcpIn);
    let wire_end = testbed.wire.listen(traffic)?;
    testbed.vm.start_traffic(traffic)?;
    wait_for_more(&mut testbed, &wire_end)?;
    let testbed = testbed.replace_vm(host);
    drop(wire_end);
    testbed
}
