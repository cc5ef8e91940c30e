//! A set of packages unpacked into a folder, and how to run its programs there.
//!
//! Every program is started through the *folder's own* dynamic loader and libraries, so it neither needs nor
//! disturbs what the system has installed.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::NamedTempFile;

use super::Error;

const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
const LIBRARY_FOLDERS: [&str; 3] =
    ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/pulseaudio"];

/// A folder with unpacked packages.
#[derive(Clone, Debug)]
pub struct Unpacked {
    dir: PathBuf,
}

impl Unpacked {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The file `path` of the packages.
    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.join(path)
    }

    /// The first of `paths` the packages have (a program's place differs between releases).
    pub fn find(&self, paths: &[&str]) -> Result<PathBuf, Error> {
        let found = paths.iter().map(|path| self.path(path)).find(|path| path.exists());
        found.ok_or_else(|| Error::Missing(self.path(paths.first().unwrap_or(&""))))
    }

    /// The program's own argument list: loader, library folders, program.
    fn command_words(&self, loader: &Path, program: &Path) -> Vec<String> {
        let libraries = LIBRARY_FOLDERS.map(|folder| self.path(folder).display().to_string()).join(":");
        vec![loader.display().to_string(), "--library-path".into(), libraries, program.display().to_string()]
    }

    /// The dynamic loader.
    pub fn loader(&self) -> PathBuf {
        self.path(LOADER)
    }

    /// A loader beside `program`, for one that finds its own files, and itself to start again, beside what the kernel
    /// says it runs, which is the loader.
    pub(super) fn loader_beside(&self, program: &Path) -> Result<PathBuf, Error> {
        let loader = program.with_file_name("loader");
        if !loader.exists() {
            // Whole or not at all: someone else may do the same.
            let partial = NamedTempFile::new_in(loader.parent().unwrap_or(&loader));
            let copied = partial.and_then(|partial| {
                fs::copy(self.loader(), partial.path())?;
                Ok(partial.persist(&loader)?)
            });
            copied.map_err(|e| Error::Write(loader.clone(), e))?;
        }
        Ok(loader)
    }

    /// Writes a launcher for `program`: a script that replaces itself by the program, run by `loader`, so that its process
    /// id is the program's.
    pub fn write_launcher(
        &self,
        at: &Path,
        loader: &Path,
        program: &Path,
        environment: &str,
        arguments: &str,
    ) -> Result<(), Error> {
        let words: Vec<_> =
            self.command_words(loader, program).iter().map(|word| format!("'{word}'")).collect();
        let text = format!("#!/bin/sh\n{environment}exec {} {arguments} \"$@\"\n", words.join(" "));
        write_executable(at, &text).map_err(|e| Error::Write(at.into(), e))
    }

    /// The loader and the shared libraries `program` needs, all in this folder.
    pub fn libraries(&self, program: &Path) -> Result<Vec<PathBuf>, Error> {
        let words = self.command_words(&self.loader(), program);
        let output = Command::new(&words[0])
            .arg("--list")
            .args(&words[1..])
            .stdin(Stdio::null())
            .output()
            .map_err(|e| Error::Loader(program.into(), e.to_string()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() || text.contains("not found") {
            return Err(Error::Loader(program.into(), text.trim().into()));
        }
        Ok(listed_libraries(&text))
    }
}

/// Reads the dynamic loader's list: `NAME => PATH (ADDRESS)`, or `PATH (ADDRESS)` for the loader itself.
pub fn listed_libraries(list: &str) -> Vec<PathBuf> {
    list.lines()
        .filter_map(|line| {
            let entry = line.split_once("=>").map_or(line, |(_, path)| path).trim();
            let path = entry.split(" (").next()?;
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect()
}

fn write_executable(at: &Path, text: &str) -> io::Result<()> {
    if fs::read_to_string(at).is_ok_and(|present| present == text) {
        // Inside the emulated host the file system is read-only.
        return Ok(());
    }
    // Someone may be starting it right now: the old one or the new one, never half of one.
    let folder = at.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut partial = NamedTempFile::new_in(folder)?;
    partial.write_all(text.as_bytes())?;
    partial.as_file().set_permissions(fs::Permissions::from_mode(0o755))?;
    partial.persist(at)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loader_list_with_and_without_names() {
        let list = "\tlinux-vdso.so.1 (0x0001)\n\tlibc.so.6 => /x/libc.so.6 (0x0002)\n\t/x/ld.so (0x0003)\n";
        assert_eq!(listed_libraries(list), [PathBuf::from("/x/libc.so.6"), PathBuf::from("/x/ld.so")]);
    }
}
