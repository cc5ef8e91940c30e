//! The VFIO container: the IOMMU's map from guest-physical addresses to our memory, and the groups that use it.
//!
//! All of guest RAM is mapped, and so pinned: a function may write to any of it at any time. The registers of other functions
//! and the FIFO region are no RAM and are not mapped; a function that is told to write there gets an IOMMU fault.

use std::io;
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::VmFd;
use nix::sys::resource::{Resource, getrlimit};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioDeviceFd, VfioError, VfioOps};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::holders;
use super::sysfs::HostFunction;
use crate::memory::GuestMemory;
use crate::pci::address::PciAddress;

/// What can go wrong between the host's VFIO and us.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM has no VFIO device.
    #[error("KVM does not work together with VFIO")]
    Kvm(#[source] kvm_ioctls::Error),
    /// The container.
    #[error("cannot use /dev/vfio/vfio; {advice}")]
    Container {
        /// What to do.
        advice: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Another process has the group.
    #[error(
        "PCI function {address} is in use: {holders} has its IOMMU group {group} (/dev/vfio/{group}) open; end that first"
    )]
    Busy {
        /// The function.
        address: PciAddress,
        /// Its group.
        group: u32,
        /// Who.
        holders: String,
    },
    /// The group or the function.
    #[error("cannot open PCI function {address} through its IOMMU group, /dev/vfio/{group}; {advice}")]
    Open {
        /// The function.
        address: PciAddress,
        /// Its group.
        group: u32,
        /// What to do.
        advice: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Memory cannot be pinned.
    #[error(
        "the device needs all {needed} MiB of guest memory locked, and this process may lock {limit} MiB (RLIMIT_MEMLOCK); allow more (`ulimit -l`, LimitMEMLOCK= in a systemd unit), or run with CAP_IPC_LOCK"
    )]
    LockedMemory {
        /// MiB needed.
        needed: u64,
        /// MiB allowed.
        limit: u64,
    },
    /// Memory cannot be mapped for another reason.
    #[error("the IOMMU does not take guest memory at {start:#x} ({size} MiB); see `dmesg`")]
    Map {
        /// Guest-physical start.
        start: u64,
        /// MiB.
        size: u64,
        /// Why.
        source: io::Error,
    },
}

/// The container of a VM.
pub struct Container {
    vfio: Arc<VfioContainer>,
    memory: GuestMemory,
    is_mapped: bool,
}

impl Container {
    /// A container for the functions of this VM.
    pub fn new(vm: &VmFd, memory: GuestMemory) -> Result<Self, Error> {
        let mut request =
            kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, ..Default::default() };
        let device = vm.create_device(&mut request).map_err(Error::Kvm)?;
        let device = Arc::new(VfioDeviceFd::new_from_kvm(device));
        let vfio = VfioContainer::new(Some(device)).map_err(|source| Error::Container {
            advice: match errno(&source) {
                Some(libc::ENOENT | libc::ENODEV) => "load its modules: modprobe vfio-pci vfio_iommu_type1",
                Some(libc::EACCES | libc::EPERM) => "run as root, or as a user who may open it",
                _ => "see `dmesg | grep -i vfio`",
            },
            source: cause(&source),
        })?;
        Ok(Self { vfio: Arc::new(vfio), memory, is_mapped: false })
    }

    /// Opens a function whose group was checked, and lets it reach guest memory.
    pub fn open(&mut self, function: &HostFunction, group: u32) -> Result<VfioDevice, Error> {
        let ops = Arc::clone(&self.vfio) as Arc<dyn VfioOps>;
        let device = VfioDevice::new(function.path(), ops, false)
            .map_err(|source| refusal(function.address, group, source))?;
        if !self.is_mapped {
            self.map()?;
            self.is_mapped = true;
        }
        Ok(device)
    }

    /// Lets functions reach all of guest RAM.
    fn map(&self) -> Result<(), Error> {
        for region in self.memory.iter() {
            let start = region.start_addr().raw_value();
            // SAFETY: the range is a live mapping owned by `self.memory`, which every VMM thread and every backend accesses with
            // volatile or atomic operations only, as the guest may write it at any time just like the function. The machine drops
            // the functions, which drop the IOMMU's mapping with the last of them, before guest memory.
            let mapped = unsafe { self.vfio.vfio_dma_map(start, region.len() as usize, region.as_ptr()) };
            mapped.map_err(|source| self.map_refusal(start, region.len(), source))?;
        }
        Ok(())
    }

    fn map_refusal(&self, start: u64, size: u64, source: VfioError) -> Error {
        if errno(&source) != Some(libc::ENOMEM) {
            return Error::Map { start, size: size >> 20, source: cause(&source) };
        }
        let needed = self.memory.iter().map(GuestMemoryRegion::len).sum::<u64>() >> 20;
        let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft >> 20);
        Error::LockedMemory { needed, limit }
    }
}

fn refusal(address: PciAddress, group: u32, source: VfioError) -> Error {
    let code = errno(&source);
    if code == Some(libc::EBUSY) {
        let holders = holders::of_group(Path::new("/proc"), group);
        let names: Vec<_> = holders.iter().map(ToString::to_string).collect();
        let holders = if names.is_empty() { "another process".to_owned() } else { names.join(", ") };
        return Error::Busy { address, group, holders };
    }
    let advice = match (&source, code) {
        (VfioError::OpenGroup(..), Some(libc::EACCES | libc::EPERM)) => {
            "run as root, or let this user open that file"
        }
        (VfioError::OpenGroup(..), Some(libc::ENOENT)) => "is the module vfio-pci loaded?",
        (VfioError::ContainerSetIOMMU(_), Some(libc::EPERM)) => {
            "the host has no interrupt remapping; switch it on in the firmware, or accept the risk with vfio_iommu_type1.allow_unsafe_interrupts=1"
        }
        (VfioError::GroupViable, _) => "another driver has a function of the group",
        (VfioError::GroupGetDeviceFD(_), Some(libc::EAGAIN)) => {
            "it is being reset or opened just now; try again"
        }
        _ => "see `dmesg | grep -i vfio`",
    };
    Error::Open { address, group, advice, source: cause(&source) }
}

/// What is behind an error of VFIO's, whose text would repeat it.
fn cause(error: &VfioError) -> io::Error {
    errno(error).map_or_else(|| io::Error::other(error.to_string()), io::Error::from_raw_os_error)
}

/// The system's error in one of VFIO's, where it keeps it.
fn errno(error: &VfioError) -> Option<i32> {
    match error {
        VfioError::OpenContainer(source) | VfioError::OpenGroup(source, _) => source.raw_os_error(),
        VfioError::ContainerSetIOMMU(source)
        | VfioError::GroupGetDeviceFD(source)
        | VfioError::VfioDeviceGetInfo(source)
        | VfioError::IommuDmaMap(source) => Some(source.errno()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(source: VfioError) -> String {
        refusal("0000:01:10.0".parse().unwrap(), 7, source).to_string()
    }

    #[test]
    fn what_the_kernel_refuses_is_explained() {
        let os = |code| io::Error::from_raw_os_error(code);
        let sys = |code| vmm_sys_util::errno::Error::new(code);
        let group = |code| VfioError::OpenGroup(os(code), "7".to_owned());
        for (source, expected) in [
            (group(libc::EBUSY), "is in use: another process has its IOMMU group 7"),
            (group(libc::EACCES), "run as root"),
            (group(libc::ENOENT), "vfio-pci loaded"),
            (VfioError::ContainerSetIOMMU(sys(libc::EPERM)), "interrupt remapping"),
            (VfioError::GroupGetDeviceFD(sys(libc::EAGAIN)), "try again"),
            (VfioError::GroupViable, "another driver"),
        ] {
            let line = line(source);
            assert!(line.contains("0000:01:10.0") && line.contains(expected), "{line}");
        }
    }
}
