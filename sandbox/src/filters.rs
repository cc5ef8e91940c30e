//! Filters: the rules of each role compiled, and given to threads.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter, sock_filter,
};

use super::violation;
use super::witness::Witness;
use super::{Error, Program, Role, Rule, Seccomp, When};

/// A filter for each role.
#[derive(Debug)]
pub struct Filters {
    /// With the roles' names.
    programs: Vec<(&'static str, BpfProgram)>,
    /// Who lets forbidden calls be made, with `--seccomp log`.
    witness: Option<Witness>,
}

impl Filters {
    /// Gets a process ready to confine its threads: compiles the filters of all roles `R`, and installs what names forbidden calls. Call
    /// once, while there is one thread, after new privileges were given up (`no_new_privs`), in a program that
    /// [uses one arena](super::use_one_arena); `None` with [`Seccomp::False`].
    pub fn arm<R: Role>(program: Program, mode: Seccomp) -> Result<Option<Self>, Error> {
        match mode {
            Seccomp::False => return Ok(None),
            Seccomp::True => {
                // The hook that is there would open the program's own file for a backtrace, and end the process by that.
                std::panic::set_hook(Box::new(move |panic| eprintln!("{}: {panic}", program.name)));
                violation::install_handler(program)
                    .map_err(|source| Error::System { step: "catch forbidden system calls", source })?;
            }
            Seccomp::Log => {}
        }
        Self::compile::<R>(program, mode).map(Some)
    }

    fn compile<R: Role>(program: Program, mode: Seccomp) -> Result<Self, Error> {
        check_kernel()?;
        let compiled = R::ALL.iter().map(|role| match compile(role.rules(), mode) {
            Ok(filter) => Ok((role.name(), filter)),
            Err(source) => Err(Error::Filter { role: role.name(), source: source.into() }),
        });
        let programs = compiled.collect::<Result<Vec<_>, _>>()?;
        let names = programs.iter().map(|(name, _)| *name).collect();
        let witness = match mode {
            Seccomp::Log => Some(Witness::start(program, names).map_err(|source| Error::System {
                step: "start the thread that says what is forbidden",
                source,
            })?),
            Seccomp::True | Seccomp::False => None,
        };
        Ok(Self { programs, witness })
    }

    /// Confines the calling thread, and all that it starts, to `role`, for good.
    pub fn enter(&self, role: impl Role) -> Result<(), Error> {
        let role = role.name();
        violation::name_thread(role);
        let mut numbered = self.programs.iter().enumerate();
        // A role of another program has no filter, and an empty one the kernel refuses.
        let (number, program) = numbered
            .find_map(|(number, (name, program))| (*name == role).then_some((number, program.as_slice())))
            .unwrap_or_default();
        if let Some(witness) = &self.witness
            && witness.install(number, &asking(program)).is_ok()
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
    use crate::{any, one_of};

    #[test]
    fn a_call_that_is_allowed_always_and_sometimes_is_allowed_always() {
        let (sometimes, always) = (one_of(Sysno::ioctl, 1, &[1]), any(Sysno::ioctl));
        let both = compile([always, sometimes].iter(), Seccomp::True).unwrap();
        let one = compile([always].iter(), Seccomp::True).unwrap();
        assert_eq!(both.len(), one.len());
        let limited = compile([sometimes].iter(), Seccomp::True).unwrap();
        assert!(limited.len() > one.len());
    }

    #[test]
    fn only_what_is_logged_is_asked_about() {
        let logged = compile([any(Sysno::read)].iter(), Seccomp::Log).unwrap();
        let answers = |program: &[sock_filter], answer| program.iter().filter(|i| i.k == answer).count();
        let asked = asking(&logged);
        assert_eq!(asked.len(), logged.len());
        assert_eq!(answers(&asked, libc::SECCOMP_RET_LOG), 0);
        assert_eq!(answers(&asked, libc::SECCOMP_RET_USER_NOTIF), answers(&logged, libc::SECCOMP_RET_LOG));
        assert_eq!(answers(&asked, libc::SECCOMP_RET_ALLOW), 1);
    }
}
