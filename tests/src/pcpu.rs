//! The lab's plan of physical CPUs, and pinning to it.

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Application vCPUs run here.
pub const APPLICATION: [usize; 2] = [0, 1];
/// The backend (our poll threads, or the kernel's vhost worker).
pub const BACKEND: usize = 2;
/// The IVCPU.
pub const IVCPU: usize = 3;
/// The far end of the wire, the agent, and whatever else there is, where the plan fits; see [`wire`].
pub const WIRE: usize = 4;
/// How many the emulated host has.
pub const COUNT: usize = 5;
/// Fewest a machine needs.
pub const FEWEST: usize = 4;

/// Where the far end of the wire is on this machine: the backend's pCPU if there are only four.
pub fn wire() -> usize {
    let count = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN).ok().flatten().unwrap_or(0);
    if count > WIRE as i64 { WIRE } else { BACKEND }
}

/// Pins thread `thread` (0: the calling one) to `pcpus`.
pub fn pin(thread: i32, pcpus: &[usize]) -> Result<(), Errno> {
    let mut set = CpuSet::new();
    for pcpu in pcpus {
        set.set(*pcpu)?;
    }
    sched_setaffinity(Pid::from_raw(thread), &set)
}
