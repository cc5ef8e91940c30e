//! The IVCPU: one more vCPU, the last, pinned to a pCPU of its own, that takes every device interrupt.
//!
//! It is an ordinary vCPU to KVM. What makes it an IVCPU is where it runs, that the guest's scheduler leaves it alone,
//! and that the guest routes its device interrupts to it. It sleeps in HLT inside KVM while nothing comes in.

use std::str::FromStr;

use crate::affinity::IrqSource;
use crate::pin::{PcpuList, VcpuAffinity};
use crate::suboption::{self, SubOptions};

/// Name of the thread.
pub const THREAD_NAME: &str = "ivcpu";

/// `--ivcpu affinity=[3][,host_irqs=[eth0,0000:01:10.0,24]]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IvcpuOptions {
    /// The pCPUs it may run on; its own, no application vCPU's.
    pub affinity: PcpuList,
    /// Host interrupts that belong to the VM's devices (of an interface, a PCI function, or by number): they go to the
    /// IVCPU's pCPU while the VM runs.
    pub host_irqs: Vec<IrqSource>,
}

impl FromStr for IvcpuOptions {
    type Err = suboption::Error;

    fn from_str(text: &str) -> Result<Self, suboption::Error> {
        let mut options = SubOptions::parse(text)?;
        let affinity = options.take("affinity")?;
        let host_irqs = options.take_with("host_irqs", parse_sources)?;
        options.finish()?;
        let affinity = affinity.ok_or(suboption::Error::Missing("affinity="))?;
        Ok(Self { affinity, host_irqs: host_irqs.unwrap_or_default() })
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
    fn sharing_a_pcpu_is_refused_and_named() {
        let ivcpu: IvcpuOptions = "affinity=[1,3]".parse().unwrap();
        let shared: VcpuAffinity = "[0@[0],1@[1-2]]".parse().unwrap();
        assert_eq!(check_overlap(&ivcpu, &shared), Err(Overlap { pcpu: 1, vcpu: 1 }));
        assert_eq!(check_overlap(&ivcpu, &"[0@[0],1@[2]]".parse().unwrap()), Ok(()));
    }
}
