//! A guest whose memory the host has set aside in huge pages.

use std::fs;

use anyhow::{Context, Result, ensure};
use ivcpu_lab::in_host::flow::move_both_ways;
use ivcpu_lab::in_host::huge_pages::HugePages;
use ivcpu_lab::in_host::{Setup, Testbed};
use ivcpu_lab::trial::in_emulated_host;

/// The guest's 256 MiB.
const PAGES: u64 = 128;

#[test]
fn a_guest_on_huge_pages_moves_checked_bytes_and_gives_them_back() -> Result<()> {
    in_emulated_host(|host| {
        let [all, free] = [HugePages::all()?, HugePages::free()?];
        let mut testbed = Testbed::start(host, &Setup { huge_pages: true, ..Setup::default() })?;
        let running = [HugePages::all()?, HugePages::free()?];
        ensure!(
            running == [all + PAGES, free],
            "huge pages, and free ones, while the guest runs: {running:?}"
        );
        let backend = testbed.backend.as_ref().context("a backend of ours")?;
        let mapped = huge_guest_memory(backend.id())?;
        ensure!(mapped == PAGES << 11, "the backend has mapped {mapped} KiB of huge guest memory");
        move_both_ways(&mut testbed, 1, 0)?;
        let status = testbed.vm.power_off()?;
        ensure!(status.success(), "the VMM ended with {status}");
        drop(testbed.backend);
        // The test's own end gives them back to the host.
        let ended = [HugePages::all()?, HugePages::free()?];
        ensure!(
            ended == [all + PAGES, free + PAGES],
            "huge pages, and free ones, after the guest: {ended:?}"
        );
        Ok(())
    })
}

/// KiB of the guest's memory that process `process` has mapped in huge pages.
fn huge_guest_memory(process: u32) -> Result<u64> {
    let path = format!("/proc/{process}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let (mut sum, mut size, mut of_guest) = (0, 0, false);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next().and_then(|word| word.parse::<u64>().ok())) {
            (Some("Size:"), Some(kib)) => size = kib,
            (Some("KernelPageSize:"), Some(2048)) if of_guest => sum += size,
            (Some(word), _) if !word.ends_with(':') => of_guest = line.contains("/memfd:ivcpu-guest"),
            _ => {}
        }
    }
    Ok(sum)
}
