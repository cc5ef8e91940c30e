//! A guest with disks, entered as PVH has it: what it writes is in the host's file, what it may not is refused, its disks'
//! interrupts are the IVCPU's, and what it flushed is there after the VMM was killed. Beside them its entropy and console devices.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ivcpu_lab::image::vmlinux;
use ivcpu_lab::in_host::fifo_guest::{kernel_log, run};
use ivcpu_lab::in_host::{Host, Vm};
use ivcpu_lab::pcpu;
use ivcpu_lab::procfs::Interrupt;
use ivcpu_lab::provision::Kernel;
use ivcpu_lab::trial::in_emulated_host;
use ivcpu_lab::workspace::Workspace;

const APPLICATION_VCPUS: usize = 2;
const SECTOR: usize = 512;
/// Of the disk that is only read.
const CONTENT: usize = 2 << 20;
/// Of the other one.
const SIZE: u64 = 64 << 20;
/// Sector of the first record that is written while the VMM is killed.
const RECORDS: u64 = 32 << 11;
/// Acknowledged records to wait for.
const ENOUGH: usize = 25;
const ACKNOWLEDGED: &str = "record on disk: ";

/// The command line of a guest with two disks and every other device there is, but a NIC.
fn words(
    host: &Host,
    kernel: &Path,
    writable: &Path,
    readonly: &Path,
    console: &Path,
) -> Result<Vec<String>> {
    let (_, image) = host.guest_files(Kernel::V6_12)?;
    let [first, second] = pcpu::APPLICATION;
    let words = [
        host.binary("ivcpu-vmm").display().to_string(),
        format!("--kernel={}", kernel.display()),
        format!("--initramfs={}", image.display()),
        "--cmdline=console=ttyS0 quiet panic=-1".into(),
        "--memory=size=512M,prefault=on".into(),
        format!("--cpus=boot={APPLICATION_VCPUS},affinity=[0@[{first}],1@[{second}]]"),
        format!("--ivcpu=affinity=[{}]", pcpu::IVCPU),
        format!("--disk=path={},serial=writable", writable.display()),
        format!("--disk=path={},readonly=on", readonly.display()),
        format!("--console=file={}", console.display()),
    ];
    Ok(words.into())
}

/// The interrupts that all queues of a disk share.
fn of_disks(vm: &mut Vm) -> Result<Vec<Interrupt>> {
    let all = vm.interrupts()?;
    Ok(all.into_iter().filter(|interrupt| interrupt.name.ends_with("-virtqueues")).collect())
}

/// The disks took interrupts between two readings, all of them on the IVCPU.
fn taken_by_ivcpu(before: &[Interrupt], after: &[Interrupt]) -> Result<()> {
    ensure!(before.len() == 2 && after.len() == 2, "two disks have a vector each: {after:?}");
    for (before, after) in before.iter().zip(after) {
        let taken: Vec<_> =
            after.taken.iter().zip(&before.taken).map(|(after, before)| after - before).collect();
        println!("{}: {taken:?}", after.name);
        let ivcpu = taken.get(APPLICATION_VCPUS).copied().unwrap_or(0);
        ensure!(ivcpu > 10 && taken.iter().sum::<u64>() == ivcpu, "{}: {taken:?}", after.name);
    }
    Ok(())
}

/// Numbers of the records that the guest has said are on the disk.
fn acknowledged(log: &Path, from: usize) -> Result<Vec<u64>> {
    let text = fs::read(log).context("reading guest.log")?;
    let text = String::from_utf8_lossy(text.get(from..).unwrap_or_default()).into_owned();
    // The last line may be cut short, and its number with it.
    let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    Ok(lines.filter_map(|line| line.split_once(ACKNOWLEDGED)?.1.trim().parse().ok()).collect())
}

#[test]
fn disks_of_a_pvh_guest_and_a_vmm_that_is_killed_while_it_writes() -> Result<()> {
    // Outside the emulated host this unpacks it, inside it is there.
    let kernel = vmlinux(&Workspace::locate()?, Kernel::V6_12)?;
    in_emulated_host(move |host| {
        let place = |name: &str| host.scratch().join(name);
        let (writable, readonly, console) = (place("writable"), place("readonly"), place("console"));
        let content: Vec<u8> = (0..CONTENT).map(|at| (at / SECTOR + at) as u8).collect();
        fs::write(&readonly, &content)?;
        let image = File::options().read(true).write(true).create(true).truncate(true).open(&writable)?;
        image.set_len(SIZE)?;
        let words = words(host, &kernel, &writable, &readonly, &console)?;
        let mut vm = Vm::boot_by(host, &words, APPLICATION_VCPUS + 1)?;
        vm.start_service()?;
        run(&mut vm, "while read -r module; do insmod $module || exit 1; done < /on-request")?;
        let serial = run(&mut vm, "cat /sys/block/vda/serial; cat /sys/block/vda/size /sys/block/vd?/ro")?;
        let expected = format!("writable{}\n0\n1\n", SIZE / SECTOR as u64);
        ensure!(serial.replace("writable\n", "writable") == expected, "{serial}");

        // Everything of one disk, written to the other.
        let before = of_disks(&mut vm)?;
        run(&mut vm, "dd if=/dev/vdb of=/dev/vda bs=16k iflag=direct oflag=direct")?;
        run(&mut vm, &format!("dd if=/dev/vdb of=/dev/vda bs=64k seek={} conv=fsync", CONTENT >> 16))?;
        let after = of_disks(&mut vm)?;
        taken_by_ivcpu(&before, &after)?;
        let mut written = vec![0; 2 * CONTENT];
        image.read_exact_at(&mut written, 0)?;
        ensure!(written[..CONTENT] == content && written[CONTENT..] == content, "other bytes arrived");

        let blocks = image.metadata()?.blocks();
        run(&mut vm, &format!("blkdiscard -o 0 -l {CONTENT} /dev/vda"))?;
        let given_back = blocks.saturating_sub(image.metadata()?.blocks());
        ensure!(given_back == (CONTENT / SECTOR) as u64, "{given_back} of {blocks} blocks given back");
        image.read_exact_at(&mut written, 0)?;
        ensure!(written[..CONTENT].iter().all(|byte| *byte == 0) && written[CONTENT..] == content);

        let (status, text) =
            vm.run("blockdev --setrw /dev/vdb; dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct")?;
        ensure!(
            status != 0 && fs::read(&readonly)? == content,
            "a disk that is only read was written: {text}"
        );

        run(&mut vm, "echo the other console > /dev/hvc0")?;
        ensure!(fs::read_to_string(&console)?.trim_end() == "the other console");
        let source =
            run(&mut vm, "cat /sys/class/misc/hw_random/rng_current; head -c 64 /dev/hwrng | wc -c")?;
        ensure!(source == "virtio_rng.0\n64\n", "{source}");

        kernel_log(&mut vm)?;
        killed_while_it_writes(host, vm, &image)
    })
}

/// Numbered records, each flushed before it is acknowledged. Those that were are there when the VMM is killed.
fn killed_while_it_writes(host: &Host, mut vm: Vm, image: &File) -> Result<()> {
    let log = host.log_path("guest.log");
    let from = fs::metadata(&log)?.len() as usize;
    let writer = format!(
        "n=0; while :; do n=$((n + 1)); printf '%0{SECTOR}d' $n | \
         dd of=/dev/vda bs={SECTOR} seek=$(({RECORDS} + n)) conv=fsync,notrunc 2> /dev/null && \
         echo '{ACKNOWLEDGED}'$n > /dev/ttyS0; done"
    );
    run(&mut vm, &format!("({writer}) < /dev/null > /dev/null 2>&1 &"))?;
    let begin = Instant::now();
    while acknowledged(&log, from)?.len() < ENOUGH {
        ensure!(begin.elapsed() < Duration::from_secs(60), "{:?}", acknowledged(&log, from)?);
        sleep(Duration::from_millis(50));
    }
    vm.kill()?;
    let records = acknowledged(&log, from)?;
    println!("{} records acknowledged in {:?}", records.len(), begin.elapsed());
    for number in records {
        let mut record = [0; SECTOR];
        image.read_exact_at(&mut record, (RECORDS + number) * SECTOR as u64)?;
        ensure!(record == format!("{number:0SECTOR$}").as_bytes(), "record {number} was lost");
    }
    Ok(())
}
