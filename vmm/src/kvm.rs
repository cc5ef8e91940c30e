//! KVM: opened, and a VM made of it with the interrupt controllers of a PC.

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VmFd};

use crate::memory;

/// What can go wrong with KVM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// /dev/kvm could not be opened.
    #[error("cannot open /dev/kvm; {advice}")]
    Open {
        /// KVM's error.
        source: kvm_ioctls::Error,
        /// What to do.
        advice: &'static str,
    },
    /// A step of the VM's making that KVM refused.
    #[error("KVM refuses {step}")]
    Refused {
        /// Which.
        step: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
}

/// Opens /dev/kvm.
pub fn open() -> Result<Kvm, Error> {
    Kvm::new().map_err(|source| Error::Open {
        source,
        advice: match source.errno() {
            libc::EACCES | libc::EPERM => "run as a user who may, such as a member of the group kvm",
            libc::ENOENT | libc::ENODEV | libc::ENXIO => {
                "load kvm_intel or kvm_amd, and switch virtualization on in the firmware (or in the outer VM)"
            }
            _ => "see `dmesg | grep kvm`",
        },
    })
}

/// Makes a VM without vCPUs.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    let vm = kvm.create_vm().map_err(refused("a new VM"))?;
    vm.set_identity_map_address(memory::KVM_IDENTITY_MAP).map_err(refused("the identity map address"))?;
    vm.set_tss_address(memory::KVM_TSS as usize).map_err(refused("the task state address"))?;
    vm.create_irq_chip().map_err(refused("the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(refused("the interval timer"))?;
    Ok(vm)
}

/// KVM's refusal of this step.
pub fn refused(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |source| Error::Refused { step, source }
}
