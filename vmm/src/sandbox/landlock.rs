//! Landlock: the files that can still be opened while the VM runs, which are few, and for most VMs none.
//!
//! What is open stays open, and connecting to a Unix socket by its path is no matter of landlock's, so lost vhost-user backends are
//! found again. The kernel's own version decides how much it can enforce (files since 5.13, TCP since 6.7, abstract sockets since
//! 6.12); on one without landlock, or whose `lsm=` leaves it out, the VM runs with a warning.
//!
//! A thread that exists already keeps its rights: the ones that watch over vhost-user backends, whose
//! [rules](super::rules) have nothing that takes a path.

use std::fs;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope, path_beneath_rules,
};

use super::Error;
use crate::ivcpu::IvcpuOptions;
use crate::machine::MachineOptions;
use crate::{affinity, exits};

/// The newest version whose file rights are asked for: 6.12. Later ones know rights that this program has not been
/// tried with.
const VERSION: ABI = ABI::V6;

/// What a VM goes on to need of the file system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// Host interrupts are moved and given back.
    pub host_irqs: bool,
    /// The VM's exits are counted by tracing and printed at the end.
    pub exits: bool,
    /// The API's socket, which is removed at the end.
    pub api_socket: Option<PathBuf>,
}

impl From<&MachineOptions> for Needs {
    fn from(options: &MachineOptions) -> Self {
        let moves = |ivcpu: &IvcpuOptions| !(ivcpu.host_irqs.is_empty() && options.devices.is_empty());
        Self {
            host_irqs: options.ivcpu.as_ref().is_some_and(moves),
            exits: options.exits.is_some(),
            api_socket: options.api_socket.clone(),
        }
    }
}

impl Needs {
    /// Files and folders with what may be done in them.
    fn rules(&self) -> Vec<(PathBuf, BitFlags<AccessFs>)> {
        let mut rules: Vec<(PathBuf, BitFlags<AccessFs>)> = Vec::new();
        if self.host_irqs {
            let write = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::WriteFile | AccessFs::Truncate;
            rules.push((affinity::IRQS.into(), write));
            rules.push((affinity::JOURNALS.into(), write | AccessFs::MakeReg | AccessFs::RemoveFile));
            // Where the interrupts of a device are listed; the other two hold links to it.
            for folder in ["/sys/devices", affinity::PCI_DEVICES, affinity::INTERFACES] {
                rules.push((folder.into(), AccessFs::ReadDir.into()));
            }
        }
        if self.exits {
            let read = AccessFs::ReadFile | AccessFs::ReadDir;
            rules.push(("/proc/self".into(), read));
            rules.push((exits::KVM_DEBUGFS.into(), read));
            for tracefs in exits::TRACEFS {
                let remove = AccessFs::RemoveDir | AccessFs::RemoveFile;
                rules.push((tracefs.into(), read | AccessFs::WriteFile | AccessFs::Truncate | remove));
            }
        }
        // Landlock knows the right to remove files from a folder only.
        if let Some(folder) = self.api_socket.as_deref().and_then(Path::parent) {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            rules.push((folder.into(), AccessFs::RemoveFile.into()));
        }
        rules
    }
}

/// What a restricted process keeps, and whether the kernel restricted it at all.
#[derive(Debug)]
pub struct Restricted {
    /// What the rules are about, held for as long as they are to hold: landlock knows files by their inodes, and procfs makes
    /// new ones for files that nobody has had open for a while.
    pub kept: Vec<PathFd>,
    /// Whether the kernel has landlock.
    pub enforced: bool,
}

/// Takes the file system away from this thread and those it starts, but for `needs`.
pub fn restrict(needs: &Needs) -> Result<Restricted, Error> {
    if needs.host_irqs {
        // A rule is about a folder that is there. Whoever may not make it cannot move interrupts either.
        let _ = fs::create_dir_all(affinity::JOURNALS);
    }
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(VERSION))?
        .handle_access(AccessNet::from_all(VERSION))?
        .scope(Scope::AbstractUnixSocket)?
        .create()?;
    let mut kept = Vec::new();
    for (path, access) in needs.rules() {
        kept.extend(PathFd::new(&path).ok());
        ruleset = ruleset.add_rules(path_beneath_rules([path], access))?;
    }
    let status = ruleset.restrict_self()?.ruleset;
    match status {
        RulesetStatus::FullyEnforced => {}
        RulesetStatus::PartiallyEnforced => {
            tracing::info!("this kernel's landlock is older than 6.12 and enforces what it knows");
        }
        RulesetStatus::NotEnforced => tracing::warn!(
            "this kernel has no landlock, so files stay in reach of the VMM: boot with lsm=landlock,... or say --landlock false"
        ),
    }
    Ok(Restricted { kept, enforced: status != RulesetStatus::NotEnforced })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_vm_needs_no_files() {
        assert!(Needs::default().rules().is_empty());
    }

    #[test]
    fn nothing_is_ever_executed_or_made_into_a_device() {
        let needs = Needs { host_irqs: true, exits: true, api_socket: Some("/run/vm.sock".into()) };
        let never = AccessFs::Execute
            | AccessFs::MakeChar
            | AccessFs::MakeBlock
            | AccessFs::MakeSock
            | AccessFs::MakeSym;
        for (path, access) in needs.rules() {
            assert!((access & never).is_empty(), "{}: {access:?}", path.display());
        }
    }

    #[test]
    fn a_socket_in_the_current_folder_can_be_removed_again() {
        let needs = Needs { api_socket: Some("vm.sock".into()), ..Needs::default() };
        assert_eq!(needs.rules(), [(".".into(), AccessFs::RemoveFile.into())]);
    }

    /// On a kernel without landlock nothing is forbidden, and the VM would say so.
    #[test]
    fn what_is_open_stays_and_nothing_else_opens() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "content").unwrap();
        std::thread::spawn(move || {
            let open = fs::File::open(&file).unwrap();
            let Restricted { enforced, .. } = restrict(&Needs::default()).unwrap();
            assert_eq!(std::io::read_to_string(&open).unwrap(), "content");
            assert_eq!(fs::File::open(&file).is_err(), enforced);
        })
        .join()
        .unwrap();
    }
}
