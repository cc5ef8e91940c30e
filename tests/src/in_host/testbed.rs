//! A testbed: wire, backend and guest, brought up as a setup says.

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::{Backend, BackendConfig, Host, Layout, Net, TAP, Vm, VmConfig, Vmm, Wire};
use crate::pcpu;
use crate::provision::Kernel;
use crate::result::{self, Mode, Role};

/// What to bring up.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct Setup {
    /// Who runs the guest
    #[arg(long, default_value = "ivcpu-vmm")]
    pub vmm: Vmm,
    /// What feeds its network device (vhost-net: under QEMU only)
    #[arg(long, default_value = "ivcpu")]
    pub backend: result::Backend,
    /// How completions reach it; `irq` adds the IVCPU and starts the interrupt service in the guest
    #[arg(long, default_value = "irq")]
    pub mode: Mode,
    /// Where its vCPUs run
    #[arg(long, default_value = "pinned")]
    pub layout: Layout,
    /// Whether the guest may skip EOI exits
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub pv_eoi: bool,
    /// Queue pairs, and connections of a stream
    #[arg(long, default_value_t = 1)]
    pub queue_pairs: u16,
    /// The backend's --poll-us (vhost-net has none)
    #[arg(long, default_value = "50")]
    pub poll_us: Option<String>,
    /// The guest's kernel
    #[arg(long, default_value = "6.12")]
    pub kernel: Kernel,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            vmm: Vmm::IvcpuVmm,
            backend: result::Backend::Ivcpu,
            mode: Mode::Irq,
            layout: Layout::Pinned,
            pv_eoi: true,
            queue_pairs: 1,
            poll_us: Some("50".into()),
            kernel: Kernel::V6_12,
        }
    }
}

impl Setup {
    /// What each pCPU of this host is for.
    pub fn roles(&self) -> Vec<Role> {
        self.roles_with_wire(pcpu::wire())
    }

    fn roles_with_wire(&self, wire: usize) -> Vec<Role> {
        let mut roles = vec![Role::Other; pcpu::FEWEST.max(wire + 1)];
        roles[wire] = Role::Wire;
        roles[pcpu::BACKEND] = Role::Backend;
        roles[pcpu::IVCPU] = if self.mode == Mode::Irq { Role::Ivcpu } else { Role::Other };
        for vcpu in 0..pcpu::APPLICATION.len() {
            self.layout.application(vcpu).into_iter().for_each(|pcpu| roles[pcpu] = Role::App);
        }
        roles
    }

    fn backend_config(&self) -> anyhow::Result<BackendConfig> {
        Ok(BackendConfig {
            uplink: format!("tap:{TAP}"),
            queue_pairs: self.queue_pairs,
            poll: self.poll_us.clone().context("ivcpu-backend needs a --poll-us")?,
            // In the paper's layout no pCPU is left for it alone.
            pcpus: vec![match self.layout {
                Layout::Pinned => pcpu::BACKEND,
                Layout::Paper => pcpu::wire(),
            }],
        })
    }
}

/// A running testbed. What it started is ended, and its namespace gone, when it is dropped.
pub struct Testbed {
    /// The guest.
    pub vm: Vm,
    /// Its backend, where that is a program of ours.
    pub backend: Option<Backend>,
    /// The far end of its cable.
    pub wire: Wire,
    /// How the guest was told to run.
    pub config: VmConfig,
    setup: Setup,
}

impl Testbed {
    /// Brings it up to where traffic can start.
    pub fn start(host: &Host, setup: &Setup) -> anyhow::Result<Self> {
        let wire = Wire::set_up(setup.queue_pairs)?;
        let backend = match setup.backend {
            result::Backend::VhostNet => None,
            result::Backend::Ivcpu => Some(Backend::start(host, &setup.backend_config()?)?),
        };
        let (kernel, image) = host.guest_files(setup.kernel)?;
        let config = VmConfig {
            vmm: setup.vmm,
            kernel,
            image,
            kernel_words: String::new(),
            application_vcpus: pcpu::APPLICATION.len(),
            layout: setup.layout,
            ivcpu: setup.mode == Mode::Irq,
            pv_eoi: setup.pv_eoi,
            net: backend.as_ref().map_or(Net::VhostNet, |backend| Net::VhostUser(backend.socket().into())),
            queue_pairs: setup.queue_pairs,
        };
        let vm = boot(host, &config)?;
        Ok(Self { vm, backend, wire, config, setup: setup.clone() })
    }

    /// The guest's number of the IVCPU, if there is one.
    pub fn ivcpu(&self) -> Option<usize> {
        self.config.ivcpu.then_some(self.config.application_vcpus)
    }

    /// Kills the backend as a crash would.
    pub fn kill_backend(&mut self) -> anyhow::Result<()> {
        self.backend.take().context("no backend of ours runs")?.kill()
    }

    /// Starts it again.
    pub fn restart_backend(&mut self, host: &Host) -> anyhow::Result<()> {
        self.backend = Some(Backend::start(host, &self.setup.backend_config()?)?);
        Ok(())
    }

    /// Kills the VMM as a crash would, and boots the same guest anew.
    pub fn replace_vm(self, host: &Host) -> anyhow::Result<Self> {
        let Self { vm, backend, wire, config, setup } = self;
        vm.kill()?;
        Ok(Self { vm: boot(host, &config)?, backend, wire, config, setup })
    }
}

fn boot(host: &Host, config: &VmConfig) -> anyhow::Result<Vm> {
    let mut vm = Vm::boot(host, config)?;
    vm.bring_up_network(config.queue_pairs)?;
    if config.ivcpu {
        vm.start_service()?;
    }
    Ok(vm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pcpu_has_one_role() {
        let mut setup = Setup::default();
        let roles = setup.roles_with_wire(4);
        assert_eq!(roles, [Role::App, Role::App, Role::Backend, Role::Ivcpu, Role::Wire]);
        assert_eq!(setup.roles_with_wire(pcpu::BACKEND), roles[..4]);
        setup.layout = Layout::Paper;
        let roles = setup.roles_with_wire(4);
        assert_eq!(roles, [Role::App, Role::App, Role::App, Role::Ivcpu, Role::Wire]);
        setup.mode = Mode::Stock;
        assert_eq!(setup.roles_with_wire(4)[pcpu::IVCPU], Role::Other);
    }
}
