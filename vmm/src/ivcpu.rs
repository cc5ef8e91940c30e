//! The IVCPU: one more vCPU, the last, pinned to a pCPU of its own, that takes every device interrupt.
//!
//! It is an ordinary vCPU to KVM. What makes it an IVCPU is where it runs, that the guest's scheduler leaves it alone,
//! and that the guest routes its device interrupts to it. It sleeps in HLT inside KVM while nothing comes in.

use std::path::PathBuf;
use std::str::FromStr;

use kvm_bindings::{KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_PAUSE, kvm_enable_cap};
use kvm_ioctls::VmFd;

use crate::affinity::IrqSource;
use crate::fifo::{self, FifoOptions};
use crate::pin::{PcpuList, VcpuAffinity};
use crate::suboption::{self, ByteSize, SubOptions};

/// Name of the thread.
pub const THREAD_NAME: &str = "ivcpu";

/// `--ivcpu affinity=[3][,fifo=PATH[,fifo_size=2M]][,host_irqs=[eth0,0000:01:10.0,24]]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IvcpuOptions {
    /// The pCPUs it may run on; its own, no application vCPU's.
    pub affinity: PcpuList,
    /// Host interrupts that belong to the VM's devices (of an interface, a PCI function, or by number): they go to the
    /// IVCPU's pCPU while the VM runs.
    pub host_irqs: Vec<IrqSource>,
    /// The region through which backends hand it completions without an interrupt, if there is one.
    pub fifo: Option<FifoOptions>,
}

impl FromStr for IvcpuOptions {
    type Err = suboption::Error;

    fn from_str(text: &str) -> Result<Self, suboption::Error> {
        let mut options = SubOptions::parse(text)?;
        let affinity = options.take("affinity")?;
        let host_irqs = options.take_with("host_irqs", parse_sources)?;
        let path = options.take_with("fifo", parse_path)?;
        let size = options.take_with("fifo_size", parse_fifo_size)?;
        options.finish()?;
        let affinity = affinity.ok_or(suboption::Error::Missing("affinity="))?;
        if path.is_none() && size.is_some() {
            return Err(suboption::Error::Missing("fifo="));
        }
        let fifo = path.map(|path| FifoOptions { path, size });
        Ok(Self { affinity, host_irqs: host_irqs.unwrap_or_default(), fifo })
    }
}

impl IvcpuOptions {
    /// The pCPU that takes the host interrupts: the first one.
    pub fn interrupt_pcpu(&self) -> Option<usize> {
        self.affinity.0.first().copied()
    }
}

fn parse_sources(text: &str) -> Result<Vec<IrqSource>, String> {
    let inside = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let inside = inside.ok_or_else(|| "expected a list such as [eth0,0000:01:10.0,24]".to_owned())?;
    let source = |text: &str| text.parse::<IrqSource>().map_err(|error| error.to_string());
    inside.split(',').filter(|text| !text.is_empty()).map(source).collect()
}

fn parse_path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("expected a file, best in /dev/shm".to_owned()) } else { Ok(text.into()) }
}

fn parse_fifo_size(text: &str) -> Result<u64, String> {
    match text.parse()? {
        ByteSize(size) if fifo::is_size(size) => Ok(size),
        _ => Err("expected a power of two from 2M to 1G".to_owned()),
    }
}

/// The IVCPU would share a pCPU with an application vCPU.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "pCPU {pcpu} is given to the IVCPU and to vCPU {vcpu}; the IVCPU needs a pCPU of its own: change --ivcpu affinity= or --cpus affinity="
)]
pub struct Overlap {
    /// The pCPU.
    pub pcpu: usize,
    /// The application vCPU.
    pub vcpu: u8,
}

/// Refuses a pCPU that both the IVCPU and an application vCPU may use.
pub fn check_overlap(ivcpu: &IvcpuOptions, applications: &VcpuAffinity) -> Result<(), Overlap> {
    for (&vcpu, pcpus) in &applications.0 {
        if let Some(&pcpu) = pcpus.0.intersection(&ivcpu.affinity.0).next() {
            return Err(Overlap { pcpu, vcpu });
        }
    }
    Ok(())
}

/// Asks KVM to let PAUSE run without an exit, which it takes before the first vCPU is made.
///
/// A processor that counts PAUSEs in a loop (pause-loop exiting, pause filter) takes an IVCPU that polls for one that
/// waits for a lock, and leaves the guest over and over. The switch is the whole VM's. HLT must go on exiting: it is how
/// an idle IVCPU gives its pCPU back.
pub fn keep_pause_inside(vm: &VmFd) {
    let wanted = u64::from(KVM_X86_DISABLE_EXITS_PAUSE);
    let offered = vm.check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into()) as u64;
    let request =
        kvm_enable_cap { cap: KVM_CAP_X86_DISABLE_EXITS, args: [wanted, 0, 0, 0], ..Default::default() };
    if offered & wanted == 0 {
        tracing::info!("KVM cannot let PAUSE run without exits; the IVCPU's polling may exit");
    } else if let Err(error) = vm.enable_cap(&request) {
        tracing::warn!("KVM does not let PAUSE run without exits ({error}); the IVCPU's polling may exit");
    } else {
        tracing::info!("PAUSE runs without exits on all vCPUs, so that the IVCPU can poll");
    }
}

/// What the guest's command line says about the IVCPU, which is guest CPU `number`: its scheduler keeps tasks off, interrupts
/// go there by default, and the guest service learns its number. `managed_irq` is left out on purpose: it would push
/// managed interrupts away from it.
pub fn guest_command_line(number: u8) -> String {
    format!("isolcpus=domain,{number} irqaffinity={number} ivcpu.cpu={number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_affinity_is_a_must() {
        assert_eq!("affinity=[3]".parse::<IvcpuOptions>().unwrap().affinity, "[3]".parse().unwrap());
        assert_eq!("".parse::<IvcpuOptions>(), Err(suboption::Error::Missing("affinity=")));
        let options: IvcpuOptions = "affinity=[3],host_irqs=[eth0,0000:01:10.0,24]".parse().unwrap();
        assert_eq!((options.host_irqs.len(), options.interrupt_pcpu()), (3, Some(3)));
        assert!("affinity=[3],host_irqs=24".parse::<IvcpuOptions>().is_err());
        assert!("affinity=3".parse::<IvcpuOptions>().is_err());
        assert!("affinity=[3],fast=on".parse::<IvcpuOptions>().is_err());
    }

    #[test]
    fn a_region_has_a_path_and_perhaps_a_size() {
        let fifo = |text: &str| text.parse::<IvcpuOptions>().map(|options| options.fifo);
        let path = PathBuf::from("/dev/shm/f");
        assert_eq!(fifo("affinity=[3]"), Ok(None));
        let expected = FifoOptions { path: path.clone(), size: None };
        assert_eq!(fifo("affinity=[3],fifo=/dev/shm/f"), Ok(Some(expected)));
        let expected = FifoOptions { path, size: Some(4 << 20) };
        assert_eq!(fifo("affinity=[3],fifo=/dev/shm/f,fifo_size=4M"), Ok(Some(expected)));
        assert_eq!(fifo("affinity=[3],fifo_size=2M"), Err(suboption::Error::Missing("fifo=")));
        assert_eq!(fifo("fifo=/dev/shm/f"), Err(suboption::Error::Missing("affinity=")));
        for bad in ["fifo=", "fifo=/x,fifo_size=3M", "fifo=/x,fifo_size=1M", "fifo=/x,fifo_size=2G"] {
            assert!(fifo(&format!("affinity=[3],{bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn sharing_a_pcpu_is_refused_and_named() {
        let ivcpu: IvcpuOptions = "affinity=[1,3]".parse().unwrap();
        let shared: VcpuAffinity = "[0@[0],1@[1-2]]".parse().unwrap();
        assert_eq!(check_overlap(&ivcpu, &shared), Err(Overlap { pcpu: 1, vcpu: 1 }));
        assert_eq!(check_overlap(&ivcpu, &"[0@[0],1@[2]]".parse().unwrap()), Ok(()));
    }
}
