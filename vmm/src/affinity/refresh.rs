//! Looking again, every few seconds while the VM runs: interrupts appear when a guest sets up MSI-X, and a balancer may
//! move others away.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::timerfd::TimerFd;

use super::HostIrqs;
use crate::chain::Chain;
use crate::events;

/// How often.
const PERIOD: Duration = Duration::from_secs(2);

/// Keeps the interrupts where they belong. Dropping this restores them.
pub struct Refresh {
    irqs: HostIrqs,
    timer: TimerFd,
    /// Whether the log says already why it does not work.
    complained: bool,
}

impl Refresh {
    /// Looks after `irqs`.
    pub fn new(irqs: HostIrqs) -> io::Result<Self> {
        let mut timer = TimerFd::new().map_err(io::Error::from)?;
        timer.reset(PERIOD, Some(PERIOD)).map_err(io::Error::from)?;
        Ok(Self { irqs, timer, complained: false })
    }

    fn refresh(&mut self) {
        let updated = self.irqs.update();
        if let Err(error) = &updated
            && !self.complained
        {
            tracing::warn!("host interrupts stay where they are: {}", Chain(error));
        }
        self.complained = updated.is_err();
    }
}

impl MutEventSubscriber for Refresh {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.timer.wait();
        self.refresh();
    }

    fn init(&mut self, ops: &mut EventOps) {
        events::watch(ops, self.timer.as_raw_fd());
    }
}
