//! Looking again while the VM runs, when a guest sets up MSI-X and gets interrupts by that, and every few seconds: a balancer
//! may have moved some away.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::HostIrqs;
use crate::chain::Chain;
use crate::events;

/// How often.
pub(super) const PERIOD: Duration = Duration::from_secs(2);

/// Keeps the interrupts where they belong. Dropping this restores them.
pub struct Refresh {
    irqs: HostIrqs,
    timer: TimerFd,
    /// Written when interrupts have come or gone.
    changed: EventFd,
    /// Whether the log says already why it does not work.
    complained: bool,
}

impl Refresh {
    /// Looks after `irqs`, and at once whenever `changed` is written.
    pub fn new(irqs: HostIrqs, changed: EventFd) -> io::Result<Self> {
        let mut timer = TimerFd::new().map_err(io::Error::from)?;
        timer.reset(PERIOD, Some(PERIOD)).map_err(io::Error::from)?;
        Ok(Self { irqs, timer, changed, complained: false })
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
    fn process(&mut self, events: Events, _: &mut EventOps) {
        // Neither can block: the one that is read is readable.
        let _ = if events.fd() == self.changed.as_raw_fd() {
            self.changed.read().map(drop)
        } else {
            self.timer.wait().map(drop).map_err(io::Error::from)
        };
        self.refresh();
    }

    fn init(&mut self, ops: &mut EventOps) {
        events::watch(ops, self.timer.as_raw_fd());
        events::watch(ops, self.changed.as_raw_fd());
    }
}
