//! Who runs where: the vCPUs and the IVCPU on the pCPUs asked for, checked before anything is made.

use std::collections::BTreeSet;

use crate::ivcpu::{self, IvcpuOptions};
use crate::pin;
use crate::vcpu::{CpusOptions, MAX_VCPUS};

/// A placement that is not possible.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A pCPU that cannot be used.
    #[error(transparent)]
    Pin(#[from] pin::Error),
    /// The IVCPU's pCPU is not its own.
    #[error(transparent)]
    Overlap(#[from] ivcpu::Overlap),
    /// One vCPU too many.
    #[error("{0} vCPUs and the IVCPU are more than the {MAX_VCPUS} a VM can have; lower --cpus boot=")]
    TooMany(u8),
}

/// One vCPU's thread: its name and where it may run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuThread {
    /// Its number, which is its local APIC id.
    pub number: u8,
    /// The name of its thread.
    pub name: String,
    /// pCPUs it may run on; empty for any.
    pub affinity: BTreeSet<usize>,
}

/// Who runs where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// All vCPUs in the order of their numbers, the IVCPU last.
    pub threads: Vec<VcpuThread>,
    /// The number of the IVCPU.
    pub ivcpu: Option<u8>,
}

impl Placement {
    /// Checks the wishes against each other and against the pCPUs that are online.
    pub fn check(
        cpus: &CpusOptions,
        ivcpu: Option<&IvcpuOptions>,
        online: &BTreeSet<usize>,
    ) -> Result<Self, Error> {
        for (vcpu, pcpus) in &cpus.affinity.0 {
            pin::check_online(&format!("vCPU {vcpu}"), pcpus, online)?;
        }
        let affinity = |number| cpus.affinity.0.get(&number).map(|list| list.0.clone()).unwrap_or_default();
        let mut threads: Vec<_> = (0..cpus.boot)
            .map(|number| VcpuThread { number, name: format!("vcpu{number}"), affinity: affinity(number) })
            .collect();
        if let Some(ivcpu) = ivcpu {
            pin::check_online("the IVCPU", &ivcpu.affinity, online)?;
            ivcpu::check_overlap(ivcpu, &cpus.affinity)?;
            let (number, name) = (cpus.boot, ivcpu::THREAD_NAME.to_owned());
            threads.push(VcpuThread { number, name, affinity: ivcpu.affinity.0.clone() });
        }
        if threads.len() > usize::from(MAX_VCPUS) {
            return Err(Error::TooMany(cpus.boot));
        }
        if threads.len() > online.len() {
            tracing::warn!(
                "{} vCPUs share {} pCPUs: expect them to wait for each other",
                threads.len(),
                online.len()
            );
        }
        Ok(Self { threads, ivcpu: ivcpu.map(|_| cpus.boot) })
    }

    /// The pCPUs that vCPUs are pinned to, which everything else should leave alone.
    pub fn taken(&self) -> BTreeSet<usize> {
        self.threads.iter().flat_map(|thread| thread.affinity.iter().copied()).collect()
    }

    /// vCPUs, the IVCPU included.
    pub fn vcpus(&self) -> u8 {
        self.threads.len() as u8
    }

    /// Whether every vCPU has a pCPU that no other one may use.
    pub fn is_dedicated(&self) -> bool {
        let mut seen = BTreeSet::new();
        self.threads
            .iter()
            .all(|thread| thread.affinity.len() == 1 && thread.affinity.iter().all(|&pcpu| seen.insert(pcpu)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(cpus: &str, ivcpu: Option<&str>) -> Result<Placement, Error> {
        let ivcpu: Option<IvcpuOptions> = ivcpu.map(|text| text.parse().unwrap());
        Placement::check(&cpus.parse().unwrap(), ivcpu.as_ref(), &BTreeSet::from([0, 1, 2, 3]))
    }

    #[test]
    fn the_ivcpu_is_the_last_vcpu() {
        let placement = check("boot=2,affinity=[0@[0],1@[1]]", Some("affinity=[3]")).unwrap();
        let names: Vec<_> = placement.threads.iter().map(|t| (t.number, t.name.as_str())).collect();
        assert_eq!(names, [(0, "vcpu0"), (1, "vcpu1"), (2, "ivcpu")]);
        assert_eq!((placement.ivcpu, placement.vcpus(), placement.is_dedicated()), (Some(2), 3, true));
        assert_eq!(placement.taken(), BTreeSet::from([0, 1, 3]));
    }

    #[test]
    fn only_vcpus_with_a_pcpu_each_are_dedicated() {
        assert!(!check("boot=1", None).unwrap().is_dedicated());
        assert!(!check("boot=2,affinity=[0@[0],1@[0]]", None).unwrap().is_dedicated());
        assert!(!check("boot=2,affinity=[0@[0-1],1@[2]]", None).unwrap().is_dedicated());
        assert!(!check("boot=2,affinity=[0@[0]]", None).unwrap().is_dedicated());
        assert!(check("boot=1,affinity=[0@[0]]", None).unwrap().is_dedicated());
    }

    #[test]
    fn impossible_placements_are_refused() {
        assert!(matches!(check("boot=1,affinity=[0@[9]]", None), Err(Error::Pin(_))));
        assert!(matches!(check("boot=1", Some("affinity=[4]")), Err(Error::Pin(_))));
        assert!(matches!(check("boot=1,affinity=[0@[0-1]]", Some("affinity=[1]")), Err(Error::Overlap(_))));
        assert!(check("boot=253", Some("affinity=[1]")).is_ok(), "more vCPUs than pCPUs only warns");
    }
}
