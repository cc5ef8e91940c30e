//! `ivcpu-vmm doctor`: what of the host is ready for an IVCPU, and what to do about the rest.
//!
//! Each check reads files below a root, which is / but for tests, and says what it found. `bad` is what a VM with an IVCPU
//! cannot run without; `warn` is what it runs worse without, or what only some of it needs (passthrough, counting exits).

pub mod command;
mod interrupts;
mod memory;
mod passthrough;
mod processor;
mod root;

use std::fmt;

use serde::Serialize;

use self::root::Root;

/// What a check says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Could be better.
    Warn,
    /// Nothing works without.
    Bad,
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    name: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), advice: None }
    }

    fn warn(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warn, found: found.into(), advice: Some(advice.into()) }
    }

    fn bad(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Bad, ..Self::warn(name, found, advice) }
    }
}

/// All checks of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// Whether a VM with an IVCPU can run.
    ready: bool,
    checks: Vec<Check>,
}

impl Diagnosis {
    /// Looks at the host below `root`.
    fn of(root: &Root) -> Self {
        let checks = vec![
            processor::virtualization(root),
            processor::kvm(root),
            processor::pcpus(root),
            processor::isolated(root),
            processor::interrupt_virtualization(root),
            processor::halt_polling(root),
            interrupts::balancer(root),
            interrupts::tracing(root),
            memory::huge_pages(root),
            memory::locked(root),
            passthrough::iommu(root),
            passthrough::interrupt_remapping(root),
            passthrough::vfio(root),
            passthrough::iommufd(root),
            passthrough::virtual_functions(root),
        ];
        Self { ready: checks.iter().all(|check| check.verdict != Verdict::Bad), checks }
    }

    /// Whether a VM with an IVCPU can run.
    pub fn is_ready(&self) -> bool {
        self.ready
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        for Check { name, verdict, found, advice } in &self.checks {
            write!(f, "{verdict:4}  {name:width$}  {found}")?;
            match advice {
                Some(advice) => writeln!(f, "; {advice}")?,
                None => writeln!(f)?,
            }
        }
        let warnings = self.checks.iter().filter(|check| check.verdict == Verdict::Warn).count();
        writeln!(f, "{}ready for an IVCPU, {warnings} warnings", if self.ready { "" } else { "not " })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Bad => "bad",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::root::tests::Tree;
    use super::*;

    /// A host with everything.
    fn good() -> Tree {
        let tree = Tree::new();
        for (path, text) in [
            ("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu svm npt\n"),
            ("dev/kvm", ""),
            ("sys/devices/system/cpu/online", "0-4\n"),
            ("sys/devices/system/cpu/isolated", "3\n"),
            ("sys/module/kvm_amd/parameters/avic", "N\n"),
            ("sys/module/kvm/parameters/halt_poll_ns", "200000\n"),
            ("sys/kernel/tracing/instances/x", ""),
            ("sys/kernel/tracing/events/kvm/kvm_exit/id", "1"),
            ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "256\n"),
            (
                "proc/self/limits",
                "Max locked memory         unlimited            unlimited            bytes\n",
            ),
            ("sys/class/iommu/dmar0/x", ""),
            ("proc/interrupts", " 33: 1 IR-PCI-MSIX-0000:01:00.0 0-edge eth0\n"),
            ("sys/bus/pci/drivers/vfio-pci/bind", ""),
            ("dev/vfio/vfio", ""),
            ("dev/iommu", ""),
            ("sys/bus/pci/devices/0000:01:00.0/sriov_totalvfs", "7\n"),
        ] {
            tree.write(path, text);
        }
        tree
    }

    fn verdicts(tree: &Tree) -> Vec<(&'static str, Verdict)> {
        let diagnosis = Diagnosis::of(&tree.root());
        diagnosis.checks.iter().map(|check| (check.name, check.verdict)).collect()
    }

    #[test]
    fn a_good_host_is_ready_and_nothing_is_to_do() {
        let diagnosis = Diagnosis::of(&good().root());
        assert!(
            diagnosis.checks.iter().all(|check| check.verdict == Verdict::Ok && check.advice.is_none()),
            "{diagnosis}"
        );
        assert!(diagnosis.is_ready());
        assert!(diagnosis.to_string().ends_with("\nready for an IVCPU, 0 warnings\n"));
    }

    #[test]
    fn an_empty_host_is_not_ready_and_everything_has_advice() {
        let diagnosis = Diagnosis::of(&Tree::new().root());
        assert!(!diagnosis.is_ready());
        assert!(diagnosis.to_string().contains("\nnot ready for an IVCPU"));
        for check in &diagnosis.checks {
            assert_eq!(check.verdict == Verdict::Ok, check.advice.is_none(), "{check:?}");
        }
    }

    #[test]
    fn each_fault_is_found_and_only_that() {
        use Verdict::{Bad, Warn};
        let faults: [(&str, &str, &str, Verdict); 12] = [
            ("virtualization", "proc/cpuinfo", "flags\t: fpu\n", Bad),
            ("pCPUs", "sys/devices/system/cpu/online", "0\n", Bad),
            ("isolated pCPUs", "sys/devices/system/cpu/isolated", "\n", Warn),
            ("interrupt virtualization", "sys/module/kvm_amd/parameters/avic", "Y\n", Verdict::Ok),
            ("irqbalance", "proc/812/comm", "irqbalance\n", Warn),
            ("huge pages", "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "0\n", Warn),
            (
                "locked memory",
                "proc/self/limits",
                "Max locked memory         8388608              8388608              bytes\n",
                Warn,
            ),
            ("interrupt remapping", "proc/interrupts", " 33: 1 PCI-MSIX-0000:01:00.0 0-edge eth0\n", Warn),
            ("virtual functions", "sys/bus/pci/devices/0000:01:00.0/sriov_totalvfs", "0\n", Warn),
            ("halt polling", "sys/module/kvm/parameters/halt_poll_ns", "2000000\n", Warn),
            ("huge pages", "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "x", Warn),
            ("virtualization", "proc/cpuinfo", "", Bad),
        ];
        for (name, path, text, verdict) in faults {
            let tree = good();
            tree.write(path, text);
            for (checked, found) in verdicts(&tree) {
                assert_eq!(
                    found,
                    if checked == name { verdict } else { Verdict::Ok },
                    "{path}={text}: {checked}"
                );
            }
        }
        let missing = [
            ("/dev/kvm", "dev/kvm", Bad),
            ("tracing", "sys/kernel/tracing", Warn),
            ("IOMMU", "sys/class/iommu", Warn),
            ("VFIO", "sys/bus/pci/drivers", Warn),
            ("iommufd", "dev/iommu", Verdict::Ok),
        ];
        for (name, path, verdict) in missing {
            let tree = good();
            tree.remove(path);
            for (checked, found) in verdicts(&tree) {
                assert_eq!(
                    found,
                    if checked == name { verdict } else { Verdict::Ok },
                    "without {path}: {checked}"
                );
            }
        }
    }

    #[test]
    fn what_makes_up_for_it_is_seen() {
        let tree = good();
        tree.write("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "0");
        tree.write(
            "sys/kernel/mm/transparent_hugepage/shmem_enabled",
            "always within_size [advise] never deny force\n",
        );
        tree.write("proc/self/limits", "Max locked memory 65536 65536 bytes\n");
        tree.write("proc/self/status", "CapEff:\t000001ffffffffff\n");
        assert!(verdicts(&tree).iter().all(|(_, verdict)| *verdict == Verdict::Ok), "{:?}", verdicts(&tree));
    }

    #[test]
    fn as_json_it_says_whether_it_is_ready() {
        let json = serde_json::to_value(Diagnosis::of(&good().root())).unwrap();
        assert_eq!((&json["ready"], &json["checks"][0]["verdict"]), (&true.into(), &"ok".into()));
        assert_eq!(json["checks"][0]["name"], "virtualization");
    }
}
