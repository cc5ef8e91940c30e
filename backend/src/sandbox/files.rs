//! Landlock: the files that may still be opened.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The kernel interface that was known when this was written: all rights of it are taken away. Rights that came later
/// (Landlock's are never taken away unasked) stay.
const KNOWN: ABI = ABI::V6;

/// Files that stay in use.
#[derive(Clone, Debug, Default)]
pub struct Files {
    shared: Vec<PathBuf>,
    inherited: Vec<RawFd>,
    removable: Vec<PathBuf>,
}

/// How far the kernel went along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restriction {
    /// All the way.
    Full,
    /// It knows a part of the rights to take away.
    Partial,
    /// It has no Landlock.
    None,
}

impl Files {
    /// The file at `path` will be opened to read and write. It may come later, or be replaced, and so it is the
    /// directory that stays open to us: what is in there that our user may open. Where a link leads now counts too.
    pub fn share(&mut self, path: &Path) {
        self.shared.push(directory(path));
        self.shared.extend(path.canonicalize().map(|real| directory(&real)));
    }

    /// The file open as `fd` will be opened again.
    pub fn share_inherited(&mut self, fd: RawFd) {
        self.inherited.push(fd);
    }

    /// The file at `path` will be removed.
    pub fn remove(&mut self, path: &Path) {
        self.removable.push(directory(path));
    }

    /// Hides all other files from the calling thread and those it will start, and the network's ports with them.
    pub(super) fn restrict(&self) -> Result<Restriction, RulesetError> {
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(KNOWN))?
            .handle_access(AccessNet::from_all(KNOWN))?
            .scope(Scope::from_all(KNOWN))?
            .create()?;
        for directory in &self.shared {
            if !directory.exists() {
                tracing::warn!(
                    "{} does not exist yet, and what comes there later stays hidden by Landlock: make it before the \
                     start, or say --landlock false",
                    directory.display()
                );
            }
            rules = beneath(rules, directory, AccessFs::ReadFile | AccessFs::WriteFile)?;
        }
        for directory in &self.removable {
            rules = beneath(rules, directory, AccessFs::RemoveFile.into())?;
        }
        for fd in &self.inherited {
            let path = PathBuf::from(format!("/proc/self/fd/{fd}"));
            rules = beneath(rules, &path, AccessFs::ReadFile | AccessFs::WriteFile)?;
        }
        Ok(match rules.restrict_self()?.ruleset {
            RulesetStatus::FullyEnforced => Restriction::Full,
            RulesetStatus::PartiallyEnforced => Restriction::Partial,
            RulesetStatus::NotEnforced => Restriction::None,
        })
    }
}

/// Allows `access` to `path` and all below. One that cannot be opened now, or has no place in the file system (a
/// memfd, which Landlock does not restrict), needs no rule.
fn beneath(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    let Ok(opened) = PathFd::new(path) else { return Ok(rules) };
    if is_memfd(path) {
        return Ok(rules);
    }
    rules.add_rule(PathBeneath::new(opened, access))
}

/// Whether a link of `/proc/self/fd` leads to a file that no file system shows.
fn is_memfd(path: &Path) -> bool {
    std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:"))
}

/// The directory that a file is in.
fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
