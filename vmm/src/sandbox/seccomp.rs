//! Filters: [`rules`](super::rules) compiled for each role, and given to threads.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter, sock_filter,
};

use super::rules::{Rule, When};
use super::witness::Witness;
use super::{Error, Role, Seccomp};

/// A filter for each role.
pub(super) struct Filters {
    programs: BTreeMap<Role, BpfProgram>,
    /// Who lets forbidden calls be made, with `--seccomp log`.
    witness: Option<Witness>,
}

impl Filters {
    /// Compiles all of them, and looks whether the kernel has filters.
    pub(super) fn compile(mode: Seccomp) -> Result<Self, Error> {
        check_kernel()?;
        let compiled = Role::ALL.into_iter().map(|role| match compile(role.rules(), mode) {
            Ok(program) => Ok((role, program)),
            Err(source) => Err(Error::Filter { role, source: source.into() }),
        });
        let programs = compiled.collect::<Result<_, _>>()?;
        let witness = match mode {
            Seccomp::Log => Some(Witness::start().map_err(|source| Error::System {
                step: "start the thread that says what is forbidden",
                source,
            })?),
            Seccomp::True | Seccomp::False => None,
        };
        Ok(Self { programs, witness })
    }

    /// Gives the calling thread the filter of its role.
    pub(super) fn apply(&self, role: Role) -> Result<(), Error> {
        let program = self.programs.get(&role).map(Vec::as_slice).unwrap_or_default();
        if let Some(witness) = &self.witness
            && witness.install(role, &asking(program)).is_ok()
        {
            return Ok(());
        }
        apply_filter(program).map_err(|source| Error::Apply { role, source })
    }
}

fn compile<'a>(
    rules: impl Iterator<Item = &'a Rule>,
    mode: Seccomp,
) -> Result<BpfProgram, seccompiler::BackendError> {
    // No condition means always; a call that is listed several times is allowed where any of them allows it.
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut always = Vec::new();
    for rule in rules {
        let number = i64::from(rule.call.id());
        let conditions = calls.entry(number).or_default();
        match rule.when {
            When::Always => always.push(number),
            when => conditions.extend(alternatives(when)?),
        }
    }
    for number in always {
        calls.insert(number, Vec::new());
    }
    let forbidden = match mode {
        Seccomp::Log => SeccompAction::Log,
        Seccomp::True | Seccomp::False => SeccompAction::Trap,
    };
    SeccompFilter::new(calls, forbidden, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// The same program, but what it only logs it asks the witness about: an action that seccompiler does not know.
fn asking(program: &[sock_filter]) -> BpfProgram {
    let returns = (libc::BPF_RET | libc::BPF_K) as u16;
    let ask = |mut instruction: sock_filter| {
        if instruction.code == returns && instruction.k == libc::SECCOMP_RET_LOG {
            instruction.k = libc::SECCOMP_RET_USER_NOTIF;
        }
        instruction
    };
    program.iter().cloned().map(ask).collect()
}

/// The conditions of which one must hold.
fn alternatives(when: When) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let one = |argument, length, operator, value| {
        SeccompRule::new(vec![SeccompCondition::new(argument, length, operator, value)?])
    };
    use SeccompCmpArgLen::{Dword, Qword};
    match when {
        When::Always => Ok(Vec::new()),
        When::OneOf(argument, values) => {
            values.iter().map(|&value| one(argument, Dword, SeccompCmpOp::Eq, value)).collect()
        }
        When::Without(argument, bits) => Ok(vec![one(argument, Qword, SeccompCmpOp::MaskedEq(bits), 0)?]),
        When::OwnProcess(argument) => {
            Ok(vec![one(argument, Dword, SeccompCmpOp::Eq, u64::from(std::process::id()))?])
        }
    }
}

/// Asks for the action that is wanted least often, before any thread depends on it.
fn check_kernel() -> Result<(), Error> {
    for action in [libc::SECCOMP_RET_TRAP, libc::SECCOMP_RET_LOG] {
        // SAFETY: the kernel reads the four bytes that the pointer leads to, and keeps nothing.
        let answer =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
        if answer != 0 {
            return Err(Error::NoSeccomp(io::Error::last_os_error()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use syscalls::Sysno;

    use super::*;

    #[test]
    fn every_role_has_a_filter_that_the_kernel_could_take() {
        for mode in [Seccomp::True, Seccomp::Log] {
            let filters = Filters::compile(mode).unwrap();
            for role in Role::ALL {
                let length = filters.programs[&role].len();
                // The kernel's limit is 4096 instructions.
                assert!((50..2048).contains(&length), "{role}: {length}");
            }
        }
    }

    #[test]
    fn a_call_that_is_allowed_always_and_sometimes_is_allowed_always() {
        let sometimes = Rule { call: Sysno::ioctl, when: When::OneOf(1, &[1]) };
        let always = Rule { call: Sysno::ioctl, when: When::Always };
        let both = compile([always, sometimes].iter(), Seccomp::True).unwrap();
        let one = compile([always].iter(), Seccomp::True).unwrap();
        assert_eq!(both.len(), one.len());
    }
}
