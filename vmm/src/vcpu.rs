//! A vCPU: its thread, the KVM run loop, and the few exits that come up to user space.
//!
//! How a vCPU is stopped: [`Running::stop`] raises a flag and sends the thread a signal. If the signal finds the thread
//! inside KVM_RUN, the call returns EINTR. If it comes just before, the signal handler has set `immediate_exit` in the
//! thread's shared `kvm_run` page and KVM_RUN returns at once. If it comes before the thread knows that page, the flag
//! is seen before the first KVM_RUN. A signal without the flag is somebody else's, and the vCPU goes on. A pause
//! ([`crate::pause`]) takes the same way.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::{c_int, c_void};
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::chain::Chain;
use crate::devices::Devices;
use crate::pause::{Gate, Member};
use crate::pin::{self, VcpuAffinity};
use crate::power::{EndSignal, Ending};
use crate::sandbox::{self, Role};
use crate::suboption::{self, SubOptions};

/// Most vCPUs a VM may have, the IVCPU included: local APIC ids are one byte and 255 means all of them.
pub const MAX_VCPUS: u8 = 254;

/// `--cpus boot=N[,affinity=[0@[0],1@[1]]][,pv_eoi=on|off]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpusOptions {
    /// Application vCPUs.
    pub boot: u8,
    /// Where each may run.
    pub affinity: VcpuAffinity,
    /// Whether the guest may end interrupts without an exit.
    pub pv_eoi: bool,
}

impl Default for CpusOptions {
    fn default() -> Self {
        Self { boot: 1, affinity: VcpuAffinity::default(), pv_eoi: true }
    }
}

impl FromStr for CpusOptions {
    type Err = suboption::Error;

    fn from_str(text: &str) -> Result<Self, suboption::Error> {
        let mut options = SubOptions::parse(text)?;
        let default = Self::default();
        let boot = options.take_with("boot", |value| match value.parse() {
            Ok(count) if (1..MAX_VCPUS).contains(&count) => Ok(count),
            _ => Err(format!("expected 1 to {} vCPUs", MAX_VCPUS - 1)),
        })?;
        let boot = boot.unwrap_or(default.boot);
        let affinity = options.take_with("affinity", |value| {
            let affinity: VcpuAffinity = value.parse()?;
            match affinity.0.keys().find(|&&vcpu| vcpu >= boot) {
                Some(vcpu) => Err(format!("there is no vCPU {vcpu}: boot={boot}")),
                None => Ok(affinity),
            }
        })?;
        let pv_eoi = options.take_switch("pv_eoi")?;
        options.finish()?;
        Ok(Self { boot, affinity: affinity.unwrap_or_default(), pv_eoi: pv_eoi.unwrap_or(default.pv_eoi) })
    }
}

thread_local! {
    /// The shared page of the vCPU this thread runs; null on every other thread.
    static SHARED_PAGE: Cell<*mut kvm_run> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn leave_guest(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    let page = SHARED_PAGE.get();
    if !page.is_null() {
        // SAFETY: `run` sets the pointer to the mapping owned by the `VcpuFd` it holds and clears it before that is
        // dropped, on this same thread, which is the one the handler runs on. The kernel only reads the byte.
        unsafe { std::ptr::addr_of_mut!((*page).immediate_exit).write_volatile(1) };
    }
}

/// Installs the signal handler that takes vCPU threads out of the guest. Call once, before any vCPU starts.
pub fn install_signal_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), leave_guest)?;
    // A message to a backend that a pause comes upon goes on after the handler; KVM_RUN returns all the same.
    // SAFETY: both calls get a whole `sigaction`, which the first one fills in; the second changes nothing but the flag.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let read = libc::sigaction(SIGRTMIN(), std::ptr::null(), &mut action);
        action.sa_flags |= libc::SA_RESTART;
        read == 0 && libc::sigaction(SIGRTMIN(), &action, std::ptr::null_mut()) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A vCPU about to run.
pub struct Vcpu {
    /// Its number, which is its local APIC id.
    pub number: u8,
    /// The thread's name.
    pub name: String,
    /// KVM's handle.
    pub fd: VcpuFd,
    /// pCPUs it may run on; empty for any.
    pub affinity: BTreeSet<usize>,
}

/// A vCPU whose thread runs.
#[derive(Debug)]
pub struct Running {
    thread: JoinHandle<()>,
    stop: Arc<AtomicBool>,
}

impl Vcpu {
    /// Starts the thread. What ends the VM is told to `end`; `gate` keeps the vCPU while the VM is paused.
    pub fn start(self, devices: Arc<Devices>, end: Arc<EndSignal>, gate: Arc<Gate>) -> io::Result<Running> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::Builder::new().name(self.name.clone()).spawn(move || {
            let Self { number, name, mut fd, affinity } = self;
            if !affinity.is_empty()
                && let Err(error) = pin::pin_current_thread(&name, &affinity)
            {
                return end.give(Ending::Failed { vcpu: number, reason: Chain(&error).to_string() });
            }
            if let Err(error) = sandbox::enter(Role::Vcpu) {
                return end.give(Ending::Failed { vcpu: number, reason: Chain(&error).to_string() });
            }
            let run = AssertUnwindSafe(|| run(&mut fd, number, &devices, &seen, &gate.join()));
            // A vCPU that is gone must end the VM, or the others would wait for it for ever.
            let ending = panic::catch_unwind(run).unwrap_or_else(|_| {
                Some(Ending::Failed { vcpu: number, reason: "its thread panicked; this is a bug".to_owned() })
            });
            if let Some(ending) = ending {
                end.give(ending);
            }
        })?;
        Ok(Running { thread, stop })
    }
}

impl Running {
    /// Takes the thread out of the guest; it does not go back.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        // The thread is not joined yet, so its handle is valid; a thread that ended already needs no signal.
        let _ = self.thread.kill(SIGRTMIN());
    }

    /// Waits until the thread has ended, or until `deadline`; says whether it did.
    pub fn join_until(self, deadline: Instant) -> bool {
        while !self.thread.is_finished() {
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        self.thread.join().is_ok()
    }
}

/// Runs the vCPU until the VM ends or `stop` is set; returns why the VM ends, if this vCPU is the reason.
fn run(
    fd: &mut VcpuFd,
    number: u8,
    devices: &Devices,
    stop: &AtomicBool,
    gate: &Member<'_>,
) -> Option<Ending> {
    SHARED_PAGE.set(fd.get_kvm_run());
    let ending = run_loop(fd, number, devices, stop, gate);
    SHARED_PAGE.set(std::ptr::null_mut());
    ending
}

fn run_loop(
    fd: &mut VcpuFd,
    number: u8,
    devices: &Devices,
    stop: &AtomicBool,
    gate: &Member<'_>,
) -> Option<Ending> {
    let failed = |reason: String| Some(Ending::Failed { vcpu: number, reason });
    while !stop.load(Ordering::SeqCst) {
        if gate.pass() {
            // The guest's watchdogs must not take the pause for a hang. One without KVM's clock has none to tell.
            let _ = fd.kvmclock_ctrl();
            // The VM may have ended meanwhile.
            continue;
        }
        match fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => devices.port_in(port, data),
            Ok(VcpuExit::IoOut(port, data)) => {
                if let Some(ending) = devices.port_out(port, data) {
                    return Some(ending);
                }
            }
            Ok(VcpuExit::MmioRead(address, data)) => devices.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => devices.mmio_write(address, data),
            Ok(VcpuExit::Intr) => stay_in_guest(fd),
            Ok(VcpuExit::Shutdown) => return Some(Ending::TripleFault { vcpu: number }),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return failed(format!("the processor refuses to enter the guest (reason {reason:#x})"));
            }
            Ok(VcpuExit::InternalError) => {
                // SAFETY: KVM_EXIT_INTERNAL_ERROR says that `internal` is the member of the union that is filled in.
                let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
                let rip = fd.get_regs().map_or(0, |regs| regs.rip);
                return failed(format!("KVM internal error {suberror} at guest address {rip:#x}"));
            }
            Ok(exit) => return failed(format!("unexpected KVM exit {exit:?}")),
            Err(error) if error.errno() == libc::EINTR => stay_in_guest(fd),
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) => return failed(format!("KVM_RUN: {error}")),
        }
    }
    None
}

/// Takes back what [`leave_guest`] asked for, or KVM_RUN would return at once for ever. The flag is looked at after this: a
/// signal of [`Running::stop`] that came before has raised it, and one that comes later sets the byte again.
fn stay_in_guest(fd: &mut VcpuFd) {
    fd.set_kvm_immediate_exit(0);
    compiler_fence(Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_cloud_hypervisors_words() {
        let options: CpusOptions = "boot=2,affinity=[0@[0],1@[1]],pv_eoi=off".parse().unwrap();
        assert_eq!((options.boot, options.pv_eoi, options.affinity.0.len()), (2, false, 2));
        assert_eq!("".parse(), Ok(CpusOptions::default()));
        for bad in ["boot=0", "boot=254", "boot=two", "boot=1,affinity=[1@[0]]", "max=4", "pv_eoi=maybe"] {
            assert!(bad.parse::<CpusOptions>().is_err(), "{bad}");
        }
    }
}
