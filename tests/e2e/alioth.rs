//! A stranger's VMM and a stranger's backend: Alioth has both, as cargo installs it.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ivcpu_lab::in_host::alioth_backend::AliothBackend;
use ivcpu_lab::in_host::fifo_guest::run;
use ivcpu_lab::in_host::flow::move_both_ways;
use ivcpu_lab::in_host::measure::queue_interrupts;
use ivcpu_lab::in_host::{Cable, Host, Setup, Testbed, Vmm, Wire};
use ivcpu_lab::provision::Provision;
use ivcpu_lab::result::Mode;
use ivcpu_lab::trial::in_emulated_host;
use ivcpu_lab::workspace::Workspace;

/// Our VMM looks for a lost backend every five seconds at least.
const FOUND_WITHIN: Duration = Duration::from_secs(20);

#[test]
fn its_vmm_moves_checked_bytes_by_our_backend_which_outlives_it_with_interrupts_on_the_ivcpu() -> Result<()> {
    // Outside this builds it; inside it is there.
    Provision::new(&Workspace::locate()?).alioth()?;
    in_emulated_host(|host| {
        let setup = Setup { vmm: Vmm::Alioth, mode: Mode::Irq, ..Setup::default() };
        let mut testbed = Testbed::start(host, &setup)?;
        let before = testbed.vm.interrupts()?;
        move_both_ways(&mut testbed, 1, 1)?;
        let irqs = queue_interrupts(&before, &testbed.vm.interrupts()?, testbed.ivcpu())?;
        // The guest's service may be a moment behind the driver.
        let on_ivcpu = irqs.ivcpu.unwrap_or(0);
        ensure!(on_ivcpu > 100 && irqs.other * 99 <= on_ivcpu, "{irqs:?}");
        let mut testbed = testbed.replace_vm(host)?;
        move_both_ways(&mut testbed, 1, 0)?;
        let status = testbed.vm.power_off()?;
        ensure!(status.success(), "Alioth ended with {status}");
        Ok(())
    })
}

#[test]
fn our_vmm_moves_checked_bytes_by_its_backend_and_gives_a_new_one_only_rings_made_anew() -> Result<()> {
    Provision::new(&Workspace::locate()?).alioth()?;
    in_emulated_host(|host| {
        let socket = host.scratch().join("alioth.sock");
        let wire = Wire::set_up(Cable::Tap(1))?;
        let backend = AliothBackend::start(host, &socket)?;
        let mut testbed = Testbed::with_foreign_backend(host, &Setup::default(), socket.clone(), wire)?;
        move_both_ways(&mut testbed, 1, 0)?;

        let before = fs::metadata(host.log_path("guest.log"))?.len();
        backend.kill()?;
        // What it leaves there it would not bind to.
        fs::remove_file(&socket)?;
        let _backend = AliothBackend::start(host, &socket)?;
        let start = Instant::now();
        loop {
            let said = said_since(host, before)?;
            if said.contains("starts ring 0 at entry 0 although told") {
                break;
            }
            ensure!(start.elapsed() < FOUND_WITHIN, "no word of a backend that forgets, but: {said}");
            sleep(Duration::from_millis(100));
        }
        let carrier = run(&mut testbed.vm, "cat /sys/class/net/eth0/carrier")?;
        ensure!(carrier.trim() == "0", "the new backend was given rings that were in use: carrier {carrier}");

        let anew = "device=$(basename $(readlink -f /sys/class/net/eth0/device)) && \
                    cd /sys/bus/virtio/drivers/virtio_net && echo $device > unbind && echo $device > bind";
        run(&mut testbed.vm, anew)?;
        testbed.vm.bring_up_network(1)?;
        let there = "for i in $(seq 200); do [ $(cat /sys/class/net/eth0/carrier) = 1 ] && exit 0; sleep 0.1; done; exit 1";
        run(&mut testbed.vm, there).context("the link is not up with rings made anew")?;
        move_both_ways(&mut testbed, 1, 0)?;
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}

/// What guests' consoles and VMMs said after the first `before` bytes.
fn said_since(host: &Host, before: u64) -> Result<String> {
    let mut log = File::open(host.log_path("guest.log")).context("opening guest.log")?;
    log.seek(SeekFrom::Start(before))?;
    let mut said = Vec::new();
    log.read_to_end(&mut said).context("reading guest.log")?;
    Ok(String::from_utf8_lossy(&said).into_owned())
}
