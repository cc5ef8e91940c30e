//! A stranger's VMM with our backend: Alioth, as cargo installs it, brings its own vhost-user frontend.

use anyhow::{Result, ensure};
use ivcpu_lab::in_host::flow::move_both_ways;
use ivcpu_lab::in_host::measure::queue_interrupts;
use ivcpu_lab::in_host::{Setup, Testbed, Vmm};
use ivcpu_lab::provision::Provision;
use ivcpu_lab::result::Mode;
use ivcpu_lab::trial::in_emulated_host;
use ivcpu_lab::workspace::Workspace;

#[test]
fn alioth_moves_checked_bytes_and_its_interrupts_are_on_the_ivcpu() -> Result<()> {
    // Outside this builds it; inside it is there.
    Provision::new(&Workspace::locate()?).alioth()?;
    in_emulated_host(|host| {
        let setup = Setup { vmm: Vmm::Alioth, mode: Mode::Irq, ..Setup::default() };
        let mut testbed = Testbed::start(host, &setup)?;
        let before = testbed.vm.interrupts()?;
        move_both_ways(&mut testbed, 1, 2)?;
        let irqs = queue_interrupts(&before, &testbed.vm.interrupts()?, testbed.ivcpu())?;
        // The guest's service may be a moment behind the driver.
        let on_ivcpu = irqs.ivcpu.unwrap_or(0);
        ensure!(on_ivcpu > 100 && irqs.other * 99 <= on_ivcpu, "{irqs:?}");
        let status = testbed.vm.power_off()?;
        ensure!(status.success(), "Alioth ended with {status}");
        Ok(())
    })
}
