//! Huge pages, of 2 MiB, that the host sets aside for as long as somebody wants them.

use std::fs;

use anyhow::{Context, ensure};

/// MiB of each.
pub const MEBIBYTES: u64 = 2;

const NUMBER: &str = "/proc/sys/vm/nr_hugepages";

/// Set aside, besides what the host had; given back when dropped.
pub struct HugePages {
    before: u64,
}

impl HugePages {
    /// Sets `count` aside.
    pub fn set_aside(count: u64) -> anyhow::Result<Self> {
        let before = Self::all()?;
        // Memory that has been in use for a while has them in pieces only.
        fs::write("/proc/sys/vm/compact_memory", "1").context("having the host's memory compacted")?;
        let pages = Self { before };
        set_number(before + count)?;
        let has = Self::all()?;
        ensure!(has == before + count, "the host has {has} huge pages, not {before} and {count} more");
        Ok(pages)
    }

    /// How many the host has.
    pub fn all() -> anyhow::Result<u64> {
        let text = fs::read_to_string(NUMBER).with_context(|| format!("reading {NUMBER}"))?;
        text.trim().parse().with_context(|| format!("{NUMBER} says {text:?}"))
    }

    /// How many of those are not in use.
    pub fn free() -> anyhow::Result<u64> {
        let text = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
        let free = text.lines().find_map(|line| line.strip_prefix("HugePages_Free:")?.trim().parse().ok());
        free.with_context(|| format!("/proc/meminfo says nothing of free huge pages: {text}"))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(e) = set_number(self.before) {
            eprintln!("lab: {e:#}");
        }
    }
}

fn set_number(number: u64) -> anyhow::Result<()> {
    fs::write(NUMBER, number.to_string()).with_context(|| format!("writing {number} to {NUMBER}"))
}
