//! Which pCPUs a thread may run on: the `affinity=` syntax of Cloud Hypervisor, and the calls that apply it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::{fs, io};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::suboption::split_outside_brackets;

/// A set of pCPU numbers, written as `[0,2-3]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PcpuList(
    /// The numbers.
    pub BTreeSet<usize>,
);

impl FromStr for PcpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let inside =
            strip_brackets(text).ok_or_else(|| "expected a list of pCPUs such as [0,2-3]".to_owned())?;
        let list = parse_ranges(inside)?;
        if list.is_empty() { Err("expected at least one pCPU".to_owned()) } else { Ok(Self(list)) }
    }
}

/// As the kernel writes it: `0,2-3`.
impl fmt::Display for PcpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        let mut rest = self.0.iter().copied().peekable();
        while let Some(first) = rest.next() {
            let mut last = first;
            while let Some(next) = rest.next_if_eq(&(last + 1)) {
                last = next;
            }
            write!(f, "{separator}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

/// Where each vCPU may run, written as `[0@[0,2-3],1@[1]]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VcpuAffinity(
    /// pCPUs by vCPU number; a vCPU that is not there may run anywhere.
    pub BTreeMap<u8, PcpuList>,
);

impl FromStr for VcpuAffinity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "expected vCPU@pCPUs pairs such as [0@[0,2-3],1@[1]]".to_owned();
        let inside = strip_brackets(text).ok_or_else(expected)?;
        let mut map = BTreeMap::new();
        for entry in split_outside_brackets(inside).map_err(|error| error.to_string())? {
            let (vcpu, pcpus) = entry.split_once('@').ok_or_else(expected)?;
            let vcpu = vcpu.parse().map_err(|_| expected())?;
            if map.insert(vcpu, pcpus.parse()?).is_some() {
                return Err(format!("vCPU {vcpu} is there twice"));
            }
        }
        Ok(Self(map))
    }
}

fn strip_brackets(text: &str) -> Option<&str> {
    text.strip_prefix('[')?.strip_suffix(']')
}

/// Parses `0,2-3`, as both the options and the kernel's lists have it.
fn parse_ranges(text: &str) -> Result<BTreeSet<usize>, String> {
    let number = |text: &str| {
        let number = text.trim().parse::<usize>().map_err(|_| format!("`{text}` is not a pCPU number"))?;
        if number < CpuSet::count() {
            Ok(number)
        } else {
            Err(format!("pCPU {number} is beyond the {} there can be", CpuSet::count()))
        }
    };
    let mut set = BTreeSet::new();
    for part in text.split(',').filter(|part| !part.trim().is_empty()) {
        match part.split_once('-') {
            None => {
                set.insert(number(part)?);
            }
            Some((first, last)) => set.extend(number(first)?..=number(last)?),
        }
    }
    Ok(set)
}

/// What can go wrong with pCPUs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A pCPU that is not there or offline.
    #[error("pCPU {pcpu}, wanted for {what}, does not exist or is offline; online are {online}")]
    NotOnline {
        /// The pCPU.
        pcpu: usize,
        /// Whose affinity names it.
        what: String,
        /// Those that are.
        online: PcpuList,
    },
    /// The list of online pCPUs could not be read.
    #[error("cannot read which pCPUs are online ({ONLINE})")]
    Online(#[source] io::Error),
    /// The kernel refused an affinity.
    #[error("cannot pin {what} to pCPUs {pcpus}; is this process confined to other pCPUs (taskset, cpuset)?")]
    Pin {
        /// Which thread.
        what: String,
        /// Where to.
        pcpus: PcpuList,
        /// The error.
        source: nix::Error,
    },
}

const ONLINE: &str = "/sys/devices/system/cpu/online";

/// pCPUs that are online.
pub fn online() -> Result<BTreeSet<usize>, Error> {
    let text = fs::read_to_string(ONLINE).map_err(Error::Online)?;
    parse_ranges(text.trim())
        .map_err(|reason| Error::Online(io::Error::new(io::ErrorKind::InvalidData, reason)))
}

/// Refuses an affinity that names a pCPU which is not online.
pub fn check_online(what: &str, wanted: &PcpuList, online: &BTreeSet<usize>) -> Result<(), Error> {
    match wanted.0.difference(online).next() {
        None => Ok(()),
        Some(&pcpu) => {
            Err(Error::NotOnline { pcpu, what: what.to_owned(), online: PcpuList(online.clone()) })
        }
    }
}

/// Pins the calling thread, which the message calls `what`.
pub fn pin_current_thread(what: &str, pcpus: &BTreeSet<usize>) -> Result<(), Error> {
    let failed = |source| Error::Pin { what: what.to_owned(), pcpus: PcpuList(pcpus.clone()), source };
    let mut set = CpuSet::new();
    for &pcpu in pcpus {
        set.set(pcpu).map_err(failed)?;
    }
    sched_setaffinity(Pid::from_raw(0), &set).map_err(failed)
}

/// Keeps the calling thread, and every thread it starts from now on, off `taken`; does nothing if no pCPU is left.
pub fn keep_off(taken: &BTreeSet<usize>) -> Result<(), Error> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).map_err(|source| Error::Pin {
        what: "the VMM's own threads".to_owned(),
        pcpus: PcpuList::default(),
        source,
    })?;
    let rest: BTreeSet<usize> = (0..CpuSet::count())
        .filter(|&pcpu| allowed.is_set(pcpu).unwrap_or(false) && !taken.contains(&pcpu))
        .collect();
    if taken.is_empty() || rest.is_empty() {
        return Ok(());
    }
    pin_current_thread("the VMM's own threads", &rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(pcpus: &[usize]) -> PcpuList {
        PcpuList(pcpus.iter().copied().collect())
    }

    #[test]
    fn lists_have_numbers_and_ranges() {
        assert_eq!("[3]".parse(), Ok(list(&[3])));
        assert_eq!("[0,2-4]".parse(), Ok(list(&[0, 2, 3, 4])));
        for bad in ["", "3", "[", "[]", "[a]", "[1-]", "[3-1]", "[99999999]", "[-1]", "[1025]"] {
            assert!(bad.parse::<PcpuList>().is_err(), "{bad}");
        }
    }

    #[test]
    fn vcpu_affinity_is_cloud_hypervisors() {
        let affinity: VcpuAffinity = "[0@[0,2-3],1@[1]]".parse().unwrap();
        assert_eq!(affinity.0, BTreeMap::from([(0, list(&[0, 2, 3])), (1, list(&[1]))]));
        for bad in ["0@[0]", "[0@0]", "[0]", "[0@[0],0@[1]]", "[300@[0]]", "[0@[]]"] {
            assert!(bad.parse::<VcpuAffinity>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pcpu_that_is_not_online_is_named() {
        let error = check_online("vCPU 1", &list(&[0, 7]), &BTreeSet::from([0, 1])).unwrap_err().to_string();
        assert!(error.contains("pCPU 7, wanted for vCPU 1"), "{error}");
        assert!(error.ends_with("online are 0-1"), "{error}");
    }

    #[test]
    fn threads_started_later_stay_off_as_well() {
        std::thread::spawn(|| {
            let online = online().unwrap();
            let Some(&taken) = online.first() else { return };
            keep_off(&BTreeSet::from([taken])).unwrap();
            let inherited =
                std::thread::spawn(|| sched_getaffinity(Pid::from_raw(0)).unwrap()).join().unwrap();
            assert_eq!(inherited.is_set(taken).unwrap(), online.len() == 1);
        })
        .join()
        .unwrap();
    }

    proptest! {
        #[test]
        fn lists_are_written_as_they_are_read(
            pcpus in proptest::collection::btree_set(0..CpuSet::count(), 1..20)
        ) {
            let list = PcpuList(pcpus);
            prop_assert_eq!(format!("[{list}]").parse(), Ok(list));
        }

        #[test]
        fn no_text_panics(text in "[\\[\\]@,0-9a-f-]{0,40}") {
            let _ = text.parse::<PcpuList>();
            let _ = text.parse::<VcpuAffinity>();
        }
    }
}
