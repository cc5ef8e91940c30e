//! A testbed: wire, backend and guest, brought up as a setup says.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::fifo_guest::{load_module, poll_interface, run};
use super::huge_pages::{self, HugePages};
use super::vmm::HUGE_MEMORY;
use super::{
    Backend, BackendConfig, Cable, FifoRegion, Host, Layout, Net, TAP, VirtualFunction, Vm, VmConfig, Vmm,
    Wire,
};
use crate::link::Link;
use crate::pcpu;
use crate::provision::Kernel;
use crate::result::{self, Carrier, Mode, Role};

/// Two real cores carry the emulated host's five: while an emulated pCPU waits for one of them, so do entries.
const PATIENCE: &str = "bound_us=200000";

/// What to bring up.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct Setup {
    /// Who runs the guest
    #[arg(long, default_value = "ivcpu-vmm")]
    pub vmm: Vmm,
    /// What feeds its network device (vhost-net: under QEMU only; vfio: a virtual function)
    #[arg(long, default_value = "ivcpu")]
    pub backend: result::Backend,
    /// How completions reach it; all but `stock` add the IVCPU, `fifo` loads the guest module, the others start the
    /// interrupt service in the guest
    #[arg(long, default_value = "irq")]
    pub mode: Mode,
    /// What shows the FIFO region to the guest
    #[arg(long, default_value = "ivshmem")]
    pub carrier: Carrier,
    /// The guest module's poll_us: microseconds the IVCPU polls without work before it sleeps [default: the module's]
    #[arg(long)]
    pub ivcpu_poll_us: Option<u64>,
    /// More suboptions for the backend's --fifo [default: none; in the emulated host a bound_us=]
    #[arg(long)]
    pub fifo_option: Option<String>,
    /// Show the FIFO region, but start the interrupt service instead of loading the guest module
    #[arg(long)]
    pub without_module: bool,
    /// Microseconds an idle application vCPU polls before it halts [default: the guest kernel's own choice]
    #[arg(long)]
    pub halt_poll_us: Option<u64>,
    /// Give the guest a virtual function, too, as its second interface
    #[arg(long)]
    pub with_function: bool,
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
    /// Make the guest's memory, 256 MiB then, of huge pages, and have the host set those aside (under ivcpu-vmm only)
    #[arg(long)]
    pub huge_pages: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            vmm: Vmm::IvcpuVmm,
            backend: result::Backend::Ivcpu,
            mode: Mode::Irq,
            carrier: Carrier::Ivshmem,
            ivcpu_poll_us: None,
            fifo_option: None,
            without_module: false,
            halt_poll_us: None,
            with_function: false,
            layout: Layout::Pinned,
            pv_eoi: true,
            queue_pairs: 1,
            poll_us: Some("50".into()),
            kernel: Kernel::V6_12,
            huge_pages: false,
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
        roles[pcpu::IVCPU] = if self.mode.has_ivcpu() { Role::Ivcpu } else { Role::Other };
        for vcpu in 0..pcpu::APPLICATION.len() {
            self.layout.application(vcpu).into_iter().for_each(|pcpu| roles[pcpu] = Role::App);
        }
        roles
    }

    /// Where the FIFO region's file is, in a mode that has one.
    fn fifo(&self, host: &Host) -> Option<FifoRegion> {
        let path = host.scratch().join("fifo");
        (self.mode == Mode::Fifo).then_some(FifoRegion { path, carrier: self.carrier })
    }

    fn vm_config(&self, host: &Host, net: Net, function: Option<String>) -> anyhow::Result<VmConfig> {
        ensure!(!self.huge_pages || self.vmm == Vmm::IvcpuVmm, "--huge-pages goes with --vmm ivcpu-vmm only");
        let (kernel, image) = host.guest_files(self.kernel)?;
        Ok(VmConfig {
            vmm: self.vmm,
            kernel,
            image,
            kernel_words: String::new(),
            application_vcpus: pcpu::APPLICATION.len(),
            layout: self.layout,
            ivcpu: self.mode.has_ivcpu(),
            fifo: self.fifo(host),
            pv_eoi: self.pv_eoi,
            net,
            function,
            queue_pairs: self.queue_pairs,
            huge_pages: self.huge_pages,
        })
    }

    fn set_pages_aside(&self) -> anyhow::Result<Option<HugePages>> {
        self.huge_pages.then(|| HugePages::set_aside(HUGE_MEMORY / huge_pages::MEBIBYTES)).transpose()
    }

    fn backend_config(&self, host: &Host) -> anyhow::Result<BackendConfig> {
        let fifo = self.fifo(host).map(|region| {
            let more = self.fifo_option.as_deref().or(host.is_emulated().then_some(PATIENCE));
            let more = more.map(|more| format!(",{more}")).unwrap_or_default();
            format!("path={}{more}", region.path.display())
        });
        Ok(BackendConfig {
            uplink: format!("tap:{TAP}"),
            queue_pairs: self.queue_pairs,
            poll: self.poll_us.clone().context("ivcpu-backend needs a --poll-us")?,
            // In the paper's layout no pCPU is left for it alone; beside an emulated guest there is no plan at all.
            pcpus: match (self.vmm, self.layout) {
                (Vmm::QemuTcg, _) => vec![],
                (_, Layout::Pinned) => vec![pcpu::BACKEND],
                (_, Layout::Paper) => vec![pcpu::wire()],
            },
            control_queue: self.vmm != Vmm::Alioth,
            fifo,
        })
    }
}

/// A running testbed. What it started is ended, and its namespace gone, when it is dropped.
pub struct Testbed {
    /// The guest.
    pub vm: Vm,
    /// Its backend, where that is a program of ours.
    pub backend: Option<Backend>,
    /// Its virtual function, where it has one. Declared after the guest, which has to let go of it first.
    pub function: Option<VirtualFunction>,
    /// The far end of its cable.
    pub wire: Wire,
    /// The far end of its virtual function's cable, where that is its second interface.
    pub second_wire: Option<Wire>,
    /// How the guest was told to run.
    pub config: VmConfig,
    setup: Setup,
    /// What its memory is made of, if those are huge. Given back when all the others have ended.
    pages: Option<HugePages>,
}

impl Testbed {
    /// Brings it up to where traffic can start.
    pub fn start(host: &Host, setup: &Setup) -> anyhow::Result<Self> {
        let has_function = setup.with_function || setup.backend == result::Backend::Vfio;
        ensure!(
            host.is_emulated() || !has_function,
            "a virtual function is made of the emulated host's own NIC only; on this machine see docs/passthrough.md"
        );
        let wire = Wire::set_up(match setup.backend {
            result::Backend::Vfio => Cable::Nic,
            result::Backend::VhostNet | result::Backend::Ivcpu => Cable::Tap(setup.queue_pairs),
        })?;
        let beside = setup.with_function.then(|| Wire::set_up_for(Link::Second, Cable::Nic));
        let second_wire = beside.transpose()?;
        let function = has_function.then(|| VirtualFunction::bind(host)).transpose()?;
        let backend = match setup.backend {
            result::Backend::VhostNet | result::Backend::Vfio => None,
            result::Backend::Ivcpu => Some(Backend::start(host, &setup.backend_config(host)?)?),
        };
        if let (Some(region), Vmm::Qemu) = (&setup.fifo(host), setup.vmm) {
            // Our own VMM makes the region itself.
            Backend::create_region(host, region)?;
        }
        let pages = setup.set_pages_aside()?;
        let net = match (setup.backend, &backend) {
            (_, Some(backend)) => Net::VhostUser(backend.socket().into()),
            (result::Backend::Vfio, None) => Net::Absent,
            (_, None) => Net::VhostNet,
        };
        let function_address = function.as_ref().map(|function| function.address().into());
        let config = setup.vm_config(host, net, function_address)?;
        let vm = boot(host, setup, &config)?;
        Ok(Self { vm, backend, function, wire, second_wire, config, setup: setup.clone(), pages })
    }

    /// Boots the guest of `setup` with a backend of somebody else's, which listens at `socket` and whose far end is `wire`.
    pub fn with_foreign_backend(
        host: &Host,
        setup: &Setup,
        socket: PathBuf,
        wire: Wire,
    ) -> anyhow::Result<Self> {
        let config = setup.vm_config(host, Net::VhostUser(socket), None)?;
        let pages = setup.set_pages_aside()?;
        let vm = boot(host, setup, &config)?;
        let setup = setup.clone();
        Ok(Self { vm, backend: None, function: None, wire, second_wire: None, config, setup, pages })
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
        self.backend = Some(Backend::start(host, &self.setup.backend_config(host)?)?);
        Ok(())
    }

    /// Has QEMU take the guest's NIC away, with all that QEMU has for it.
    pub fn unplug_nic(&mut self) -> anyhow::Result<()> {
        let qemu = self.vm.qemu()?;
        qemu.execute("device_del", json!({ "id": "nic" }))?;
        // The guest is asked for it; there is one event for the device and one for what is in it.
        while qemu.wait_for("DEVICE_DELETED")?["device"] != "nic" {}
        // Its chardev goes with it.
        qemu.execute("netdev_del", json!({ "id": "net" }))?;
        Ok(())
    }

    /// Gives it a new one, and brings that up.
    pub fn plug_nic(&mut self) -> anyhow::Result<()> {
        let plug = self.config.qemu_plug()?;
        let qemu = self.vm.qemu()?;
        for (command, arguments) in plug {
            qemu.execute(command, arguments)?;
        }
        let path = format!("/sys/class/net/{}", Link::First.interface());
        run(
            &mut self.vm,
            &format!("for i in $(seq 100); do [ -e {path} ] && exit 0; sleep 0.1; done; exit 1"),
        )
        .context("the guest has not found its new NIC")?;
        self.vm.bring_up_network(self.config.queue_pairs)
    }

    /// Kills the VMM as a crash would, and boots the same guest anew.
    pub fn replace_vm(self, host: &Host) -> anyhow::Result<Self> {
        let Self { vm, backend, function, wire, second_wire, config, setup, pages } = self;
        vm.kill()?;
        let vm = boot(host, &setup, &config)?;
        Ok(Self { vm, backend, function, wire, second_wire, config, setup, pages })
    }
}

fn boot(host: &Host, setup: &Setup, config: &VmConfig) -> anyhow::Result<Vm> {
    let mut vm = Vm::boot(host, config)?;
    vm.bring_up_network(config.queue_pairs)?;
    if setup.with_function {
        vm.bring_up(Link::Second, 1)?;
    }
    let ivcpu = config.application_vcpus;
    match setup.mode {
        Mode::Stock => {}
        Mode::Irq => vm.start_service()?,
        Mode::Fifo if setup.without_module => vm.start_service()?,
        Mode::Fifo => load_module(&mut vm, ivcpu, setup.ivcpu_poll_us)?,
        Mode::Poll => poll_interface(&mut vm, ivcpu, Link::First, setup.ivcpu_poll_us)?,
        Mode::ThreadedNapi => {
            vm.start_service()?;
            run(&mut vm, &threaded_napi_on(ivcpu))?;
        }
    }
    if let Some(us) = setup.halt_poll_us {
        run(&mut vm, &poll_when_idle(us))?;
    }
    Ok(vm)
}

/// Has the kernel run the network device's NAPI in threads on CPU `cpu`.
fn threaded_napi_on(cpu: usize) -> String {
    format!(
        "echo 1 > /sys/class/net/eth0/threaded && cd /proc && n=0 && for task in [0-9]*; do \
         case $(cat $task/comm 2>/dev/null) in napi/eth0-*) taskset -p {mask:x} $task > /dev/null && n=1;; esac; done; \
         [ $n = 1 ]",
        mask = 1u64 << cpu
    )
}

/// Has idle vCPUs poll for `us` microseconds before they halt, from the first time on.
fn poll_when_idle(us: u64) -> String {
    let ns = us * 1000;
    format!(
        "cd /sys/module/haltpoll/parameters && echo {ns} > guest_halt_poll_ns && \
         echo {ns} > guest_halt_poll_grow_start && echo N > guest_halt_poll_allow_shrink && \
         grep -q haltpoll /sys/devices/system/cpu/cpuidle/current_driver"
    )
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
