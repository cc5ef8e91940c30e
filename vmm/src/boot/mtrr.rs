//! Model-specific registers at start: MTRRs on, with write-back as the default type.
//!
//! PC firmware would mark the 32-bit PCI hole uncached and leave the rest as found. With write-back as the default and no
//! variable range, a guest may map shared memory in a BAR above 4 GiB write-back, as polling it at speed needs;
//! device registers stay uncached because drivers map them so themselves.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_TYPE_WRITE_BACK: u64 = 6;

/// KVM did not take a register.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The call failed.
    #[error("KVM refuses the start MSRs")]
    Set(#[source] kvm_ioctls::Error),
    /// The call stopped at one of them.
    #[error("KVM refuses MSR {0:#x}")]
    Refused(u32),
}

/// Sets the registers of one vCPU.
pub fn set_up(vcpu: &VcpuFd) -> Result<(), Error> {
    let entries =
        [(MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_TYPE_WRITE_BACK), (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING)];
    for (index, data) in entries {
        let msrs = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
            .map_err(|_| Error::Refused(index))?;
        if vcpu.set_msrs(&msrs).map_err(Error::Set)? != 1 {
            return Err(Error::Refused(index));
        }
    }
    Ok(())
}
