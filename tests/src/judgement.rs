//! What a case's exits allow to be said: a share of the IVCPU's, or that a pCPU has no device exits left.

use ivcpu_vmm::exits::Row;

use crate::result::{Figures, Pcpu, Role};

/// Why a share of exits is or is not claimed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Share {
    /// The IVCPU's part of the net exits, from 0 to 1 (beyond where a net figure is negative).
    Claimed(f64),
    /// Net is under ten times the control's spread: too close to the noise to say.
    TooNoisy {
        /// Net exits over all pCPUs.
        net: i64,
        /// Spread of the control.
        spread: u64,
    },
    /// A single control window has no spread to compare with.
    NoSpread,
}

/// Net device exits beside what noise and the promise of an exitless mode allow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exitless {
    /// Net device exits, never clamped.
    pub net: i64,
    /// The most that is allowed.
    pub allowed: f64,
    /// Interrupts of the pCPU's own timer beyond those of the control. No device causes them.
    pub more_timer_interrupts: i64,
}

impl Exitless {
    /// Whether the promise is kept.
    pub fn holds(&self) -> bool {
        self.net as f64 <= self.allowed
    }

    /// Whether it is kept but for timer interrupts.
    pub fn holds_but_for_timers(&self) -> bool {
        (self.net - self.more_timer_interrupts.max(0)) as f64 <= self.allowed
    }
}

impl Pcpu {
    /// Exits of one row: raw less control, never clamped.
    pub fn net(&self, row: Row) -> i64 {
        self.exits.count(row) as i64 - self.control.count(row) as i64
    }

    /// Whether there was any exit of this row, with traffic or without.
    pub fn has_any(&self, row: Row) -> bool {
        self.exits.count(row) != 0 || self.control.count(row) != 0
    }
}

impl Figures {
    /// Net exits of one row over all pCPUs of a role, or of all roles.
    pub fn net_of(&self, row: Row, role: Option<Role>) -> i64 {
        self.pcpus.iter().filter(|p| role.is_none_or(|r| r == p.role)).map(|p| p.net(row)).sum()
    }

    /// Spread of the control of one row over all pCPUs of a role, or of all roles; none for a single window.
    pub fn control_spread(&self, row: Row, role: Option<Role>) -> Option<u64> {
        let pcpus = self.pcpus.iter().filter(|p| role.is_none_or(|r| r == p.role));
        pcpus.map(|p| p.control_spread.as_ref().map(|rows| rows.count(row))).sum()
    }

    /// The rows of exits that a device causes by an interrupt: its arrival, its acknowledgement, and port I/O.
    pub const DEVICE_ROWS: [Row; 3] = [Row::ExternalIntr, Row::ApicAccess, Row::IoInstruction];

    /// How one pCPU's net device exits compare with an allowance of `per_packet` exits a packet or three standard
    /// deviations of the control, whichever is more. Unknown for a single control window.
    pub fn exitless(&self, pcpu: &Pcpu, per_packet: f64) -> Option<Exitless> {
        let net = Self::DEVICE_ROWS.iter().map(|row| pcpu.net(*row)).sum();
        let allowed = (per_packet * self.packets? as f64).max(3.0 * pcpu.control_sigma?);
        let timer = pcpu.timer_interrupts;
        Some(Exitless { net, allowed, more_timer_interrupts: timer.traffic as i64 - timer.control as i64 })
    }

    /// The part of a row's net exits that the IVCPU's pCPU took. Claimed only where the net is at least ten times the
    /// control's spread, summed over the pCPUs.
    pub fn ivcpu_share(&self, row: Row) -> Share {
        let net = self.net_of(row, None);
        let Some(spread) = self.control_spread(row, None) else { return Share::NoSpread };
        if net <= 0 || (net as u64) < spread.saturating_mul(10) {
            return Share::TooNoisy { net, spread };
        }
        Share::Claimed(self.net_of(row, Some(Role::Ivcpu)) as f64 / net as f64)
    }
}

#[cfg(test)]
mod tests {
    use ivcpu_vmm::exits::Rows;

    use super::*;
    use crate::result::TimerInterrupts;

    fn pcpu(pcpu: u32, role: Role, exits: u64, control: u64, spread: u64) -> Pcpu {
        let rows = |n| {
            let mut rows = Rows::default();
            rows.add(Row::ExternalIntr, n);
            rows
        };
        let (exits, control, control_spread) = (rows(exits), rows(control), Some(rows(spread)));
        Pcpu {
            pcpu,
            role,
            exits,
            control,
            control_spread,
            control_sigma: Some(10.0),
            timer_interrupts: TimerInterrupts { traffic: 520, control: 500 },
            cpu_seconds: None,
        }
    }

    #[test]
    fn exitless_within_the_promise_or_the_noise() {
        let figures = Figures { packets: Some(10_000), ..Default::default() };
        let of = |exits| figures.exitless(&pcpu(0, Role::App, exits, 500, 5), 0.01);
        assert_eq!(of(600), Some(Exitless { net: 100, allowed: 100.0, more_timer_interrupts: 20 }));
        assert!(of(620).is_some_and(|e| !e.holds() && e.holds_but_for_timers()));
        assert!(of(621).is_some_and(|e| !e.holds_but_for_timers()));
        assert!(of(600).is_some_and(|e| e.holds()) && of(400).is_some_and(|e| e.holds()));
        assert!(of(601).is_some_and(|e| !e.holds()));
        let few = Figures { packets: Some(100), ..Default::default() };
        assert_eq!(few.exitless(&pcpu(0, Role::App, 530, 500, 5), 0.01).map(|e| e.allowed), Some(30.0));
    }

    #[test]
    fn share_is_the_ivcpus_part_of_net_exits() {
        let pcpus = vec![pcpu(0, Role::App, 510, 500, 5), pcpu(3, Role::Ivcpu, 990, 0, 5)];
        let figures = Figures { pcpus, ..Default::default() };
        assert_eq!(figures.ivcpu_share(Row::ExternalIntr), Share::Claimed(0.99));
    }

    #[test]
    fn share_is_not_claimed_inside_the_noise() {
        let pcpus = vec![pcpu(0, Role::App, 510, 500, 60), pcpu(3, Role::Ivcpu, 590, 0, 5)];
        let figures = Figures { pcpus, ..Default::default() };
        assert_eq!(figures.ivcpu_share(Row::ExternalIntr), Share::TooNoisy { net: 600, spread: 65 });
    }

    #[test]
    fn one_control_window_claims_nothing() {
        let mut pcpus = vec![pcpu(3, Role::Ivcpu, 990, 0, 0)];
        pcpus[0].control_spread = None;
        let figures = Figures { pcpus, ..Default::default() };
        assert_eq!(figures.ivcpu_share(Row::ExternalIntr), Share::NoSpread);
    }

    #[test]
    fn negative_net_is_not_clamped() {
        let pcpus = vec![pcpu(0, Role::App, 490, 500, 0), pcpu(3, Role::Ivcpu, 1000, 0, 0)];
        let figures = Figures { pcpus, ..Default::default() };
        assert_eq!(figures.net_of(Row::ExternalIntr, Some(Role::App)), -10);
        assert_eq!(figures.ivcpu_share(Row::ExternalIntr), Share::Claimed(1000.0 / 990.0));
    }
}
