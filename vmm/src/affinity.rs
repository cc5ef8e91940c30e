//! The host's interrupts of a VM's devices go to the IVCPU's pCPU, and back when the VM ends.
//!
//! [`HostIrqs`] is a guard: it moves the interrupts, keeps their former affinity in a journal and restores it
//! on drop. A run that was killed leaves its journal; the next run finds that nobody holds it any more and restores from it.
//!
//! Several VMMs may share an interrupt (the uplink's, say). They agree through the journals, under one lock: whoever comes
//! second takes over the first one's *former* affinity, not what the first one made of it, and whoever leaves hands a
//! shared interrupt to a VMM that still wants it. The last one restores. An affinity that somebody else has changed in the
//! meantime is left alone.
//!
//! Moving takes root. The interrupts of a device behind `vfio-pci` appear only when the guest sets up MSI-X, so
//! [`refresh::Refresh`] looks again while the VM runs.

mod journal;
pub mod refresh;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use journal::{Journal, Journals};

/// Why interrupts cannot be moved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such device.
    #[error("cannot find the interrupts of {source_name}: there is no {path}")]
    NoDevice {
        /// The device as it was named.
        source_name: String,
        /// Where it should be.
        path: PathBuf,
    },
    /// The interface has no hardware of its own.
    #[error("interface {name} has no interrupts of its own (a TAP, bridge or other software device?)")]
    NoHardware {
        /// The interface.
        name: String,
    },
    /// Interrupts may not be moved.
    #[error("no permission to move interrupt {irq} to pCPU {pcpu}: run this as root")]
    NotPermitted {
        /// The interrupt.
        irq: u32,
        /// Where it should go.
        pcpu: usize,
    },
    /// The kernel does not take the pCPU.
    #[error("interrupt {irq} cannot go to pCPU {pcpu}: is that CPU there and online?")]
    NoSuchPcpu {
        /// The interrupt.
        irq: u32,
        /// Where it should go.
        pcpu: usize,
    },
    /// Another failure of the affinity files.
    #[error("cannot {doing} the affinity of interrupt {irq}")]
    Affinity {
        /// What was tried.
        doing: &'static str,
        /// The interrupt.
        irq: u32,
        /// What the kernel answered.
        source: io::Error,
    },
    /// What is changed cannot be written down, so nothing is changed.
    #[error("cannot keep a journal of moved interrupts in {path}")]
    Journal {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// Something whose interrupts are to be moved. As text: `24`, `0000:01:10.0` or `eth0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IrqSource {
    /// One interrupt by its number in /proc/interrupts.
    Irq(u32),
    /// A PCI function by its address.
    PciDevice(String),
    /// A network interface by its name.
    Interface(String),
}

impl FromStr for IrqSource {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.parse() {
            Ok(irq) => IrqSource::Irq(irq),
            Err(_) if text.contains(':') => IrqSource::PciDevice(text.to_owned()),
            Err(_) => IrqSource::Interface(text.to_owned()),
        })
    }
}

/// Where the kernel shows interrupts, and takes their affinity.
pub const IRQS: &str = "/proc/irq";
/// Where the kernel links to PCI functions.
pub const PCI_DEVICES: &str = "/sys/bus/pci/devices";
/// Where the kernel links to network interfaces.
pub const INTERFACES: &str = "/sys/class/net";
/// Where journals are kept.
pub const JOURNALS: &str = "/run/ivcpu";

/// Where the kernel shows interrupts and devices, and where journals are kept; elsewhere in tests.
#[derive(Clone, Debug)]
struct Roots {
    irqs: PathBuf,
    pci_devices: PathBuf,
    interfaces: PathBuf,
    journals: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Roots {
            irqs: IRQS.into(),
            pci_devices: PCI_DEVICES.into(),
            interfaces: INTERFACES.into(),
            journals: JOURNALS.into(),
        }
    }
}

/// Interrupts moved to one pCPU. Dropping this restores them.
#[derive(Debug)]
pub struct HostIrqs {
    roots: Roots,
    pcpu: usize,
    sources: Vec<IrqSource>,
    /// The affinity from before this program touched each interrupt.
    former: BTreeMap<u32, Affinity>,
    refused: BTreeSet<u32>,
    /// `None` until there is something to restore.
    journal: Option<Journal>,
}

impl HostIrqs {
    /// Moves all interrupts of `sources` to `pcpu`, having first restored what runs that were killed left behind.
    ///
    /// Without anything to move this changes nothing and needs no permission.
    pub fn move_to(pcpu: usize, sources: Vec<IrqSource>) -> Result<HostIrqs, Error> {
        Self::move_in(Roots::default(), pcpu, sources)
    }

    fn move_in(roots: Roots, pcpu: usize, sources: Vec<IrqSource>) -> Result<HostIrqs, Error> {
        recover_in(&roots)?;
        let mut irqs = HostIrqs {
            roots,
            pcpu,
            sources,
            former: BTreeMap::new(),
            refused: BTreeSet::new(),
            journal: None,
        };
        irqs.update()?;
        Ok(irqs)
    }

    /// Looks again: moves interrupts that have appeared since, and those that somebody has moved away.
    pub fn update(&mut self) -> Result<(), Error> {
        let mut wanted = BTreeSet::new();
        for source in &self.sources {
            wanted.extend(irqs_of(&self.roots, source)?);
        }
        wanted.retain(|irq| !self.refused.contains(irq));
        let Some(&first) = wanted.first() else { return Ok(()) };
        let journals = Journals::lock(&self.roots.journals).map_err(|error| match error {
            Error::Journal { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Error::NotPermitted { irq: first, pcpu: self.pcpu }
            }
            other => other,
        })?;
        for irq in wanted {
            self.take(&journals, irq)?;
        }
        Ok(())
    }

    /// The interrupts that were moved.
    pub fn moved(&self) -> impl Iterator<Item = u32> {
        self.former.keys().copied().filter(|irq| !self.refused.contains(irq))
    }

    /// The interrupts that cannot be moved: the kernel manages their affinity, or they belong to one CPU.
    pub fn refused(&self) -> impl Iterator<Item = u32> {
        self.refused.iter().copied()
    }

    fn take(&mut self, journals: &Journals, irq: u32) -> Result<(), Error> {
        let Some(current) = affinity(&self.roots, irq)? else { return Ok(()) };
        let already_there = current.allowed == self.pcpu.to_string();
        let others = journals.others(self.journal.as_ref())?;
        if self.former.contains_key(&irq) {
            // A VMM that came later has it. Taking it back would set the two of them against each other.
            if others.have_moved(irq, &current.allowed) {
                return Ok(());
            }
        } else {
            let former = others.former_of(irq).unwrap_or(current);
            if self.journal.is_none() {
                self.journal = Some(journals.create(self.pcpu)?);
            }
            if let Some(journal) = &mut self.journal {
                journal.note(irq, &former)?;
            }
            self.former.insert(irq, former);
        }
        if already_there {
            return Ok(());
        }
        match set_affinity(&self.roots, irq, &self.pcpu.to_string()) {
            Ok(()) => Ok(()),
            Err(source) => match source.raw_os_error() {
                // The answer to root for interrupts that the kernel manages itself, and for per-CPU ones (EIO before 6.12).
                Some(libc::EIO | libc::EPERM) => {
                    self.refused.insert(irq);
                    Ok(())
                }
                Some(libc::EACCES) => Err(Error::NotPermitted { irq, pcpu: self.pcpu }),
                Some(libc::EINVAL | libc::EOVERFLOW | libc::ERANGE) => {
                    Err(Error::NoSuchPcpu { irq, pcpu: self.pcpu })
                }
                _ => Err(Error::Affinity { doing: "set", irq, source }),
            },
        }
    }

    fn restore(&mut self) -> Result<(), Error> {
        let Some(journal) = self.journal.take() else { return Ok(()) };
        let journals = Journals::lock(&self.roots.journals)?;
        let others = journals.others(Some(&journal))?;
        for (&irq, former) in &self.former {
            give_back(&self.roots, &others, irq, self.pcpu, former);
        }
        journal.remove()
    }
}

impl Drop for HostIrqs {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            tracing::warn!("cannot restore the host's interrupt affinities: {error}");
        }
    }
}

/// Restores what runs that were killed left behind. Whoever may not does nothing; the next run of root does it.
pub fn recover() -> Result<(), Error> {
    recover_in(&Roots::default())
}

fn recover_in(roots: &Roots) -> Result<(), Error> {
    if !roots.journals.exists() {
        return Ok(());
    }
    let journals = match Journals::lock(&roots.journals) {
        Err(Error::Journal { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            return Ok(());
        }
        locked => locked?,
    };
    // Before the abandoned ones are taken, which locks them.
    let others = journals.others(None)?;
    for dead in journals.abandoned()? {
        for (&irq, former) in dead.former() {
            give_back(roots, &others, irq, dead.pcpu(), former);
        }
        tracing::info!(
            "restored the affinity of {} host interrupts after a run that was killed",
            dead.former().len()
        );
        dead.remove()?;
    }
    Ok(())
}

/// Takes an interrupt off `pcpu`: to a VMM that still wants it, else to where it was before the first of them.
fn give_back(roots: &Roots, others: &journal::Held, irq: u32, pcpu: usize, former: &Affinity) {
    // The interrupt may be gone with its device, and what somebody else has set since is not ours to undo.
    let ours = |current: Option<Affinity>| current.is_some_and(|current| current.allowed == pcpu.to_string());
    if !affinity(roots, irq).is_ok_and(ours) {
        return;
    }
    let given = match others.pcpu_of(irq) {
        Some(other) => set_affinity(roots, irq, &other.to_string()),
        None => {
            // Where several pCPUs are allowed the kernel leaves the interrupt on ours: send it home first. That pCPU may
            // be offline by now, which is no reason not to restore the rest.
            let _ = set_affinity(roots, irq, &former.effective);
            set_affinity(roots, irq, &former.allowed)
        }
    };
    if let Err(error) = given {
        tracing::warn!("cannot give interrupt {irq} its former affinity {}: {error}", former.allowed);
    }
}

/// The interrupts of a device.
fn irqs_of(roots: &Roots, source: &IrqSource) -> Result<BTreeSet<u32>, Error> {
    match source {
        IrqSource::Irq(irq) => Ok(BTreeSet::from([*irq])),
        IrqSource::PciDevice(address) => {
            let device = roots.pci_devices.join(address);
            if !device.exists() {
                return Err(Error::NoDevice { source_name: address.clone(), path: device });
            }
            Ok(msi_irqs(&device))
        }
        IrqSource::Interface(name) => {
            let interface = roots.interfaces.join(name);
            if !interface.exists() {
                return Err(Error::NoDevice { source_name: name.clone(), path: interface });
            }
            // The interface's device is the PCI function itself, or (virtio) a child of it.
            let hardware = fs::canonicalize(interface.join("device")).ok();
            let function = hardware.as_deref().and_then(|device| {
                device.ancestors().take(3).find(|ancestor| ancestor.join("msi_irqs").is_dir())
            });
            function.map(msi_irqs).ok_or(Error::NoHardware { name: name.clone() })
        }
    }
}

/// The numbers of a PCI function's MSI and MSI-X interrupts: none before its driver, or the guest, has set them up.
fn msi_irqs(device: &Path) -> BTreeSet<u32> {
    let Ok(entries) = fs::read_dir(device.join("msi_irqs")) else { return BTreeSet::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Where an interrupt goes, both in the kernel's list syntax (`0-3`).
#[derive(Clone, Debug, PartialEq, Eq)]
struct Affinity {
    /// The pCPUs it may go to.
    allowed: String,
    /// The one of them it does go to.
    effective: String,
}

/// Where an interrupt goes; `None` if there is no such interrupt.
fn affinity(roots: &Roots, irq: u32) -> Result<Option<Affinity>, Error> {
    let read = |file: &str| match fs::read_to_string(roots.irqs.join(irq.to_string()).join(file)) {
        Ok(list) => Ok(Some(list.trim().to_owned())),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Affinity { doing: "read", irq, source }),
    };
    let Some(allowed) = read("smp_affinity_list")? else { return Ok(None) };
    let effective = read("effective_affinity_list")?.filter(|list| !list.is_empty());
    Ok(Some(Affinity { effective: effective.unwrap_or_else(|| allowed.clone()), allowed }))
}

fn set_affinity(roots: &Roots, irq: u32, pcpus: &str) -> io::Result<()> {
    fs::write(roots.irqs.join(irq.to_string()).join("smp_affinity_list"), pcpus)
}

#[cfg(test)]
mod tests;
