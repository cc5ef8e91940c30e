//! Which processes have an IOMMU group open.

use std::fmt;
use std::fs;
use std::path::Path;

use serde::Serialize;

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.name, self.pid)
    }
}

/// The processes under `proc` that have /dev/vfio/`group` open; only root sees those of others.
pub fn of_group(proc: &Path, group: u32) -> Vec<Holder> {
    let file = format!("/dev/vfio/{group}");
    let Ok(entries) = fs::read_dir(proc) else { return Vec::new() };
    let mut holders: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let fds = fs::read_dir(entry.path().join("fd")).ok()?;
            let holds =
                |fd: fs::DirEntry| fs::read_link(fd.path()).is_ok_and(|target| target == Path::new(&file));
            fds.flatten().any(holds).then(|| {
                let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                Holder { pid, name: name.trim().to_owned() }
            })
        })
        .collect();
    holders.sort_by_key(|holder| holder.pid);
    holders
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn whoever_has_the_group_open_holds_it() {
        let proc = tempfile::tempdir().unwrap();
        for (pid, file) in
            [("120", "/dev/vfio/7"), ("34", "/dev/vfio/7"), ("56", "/dev/vfio/77"), ("self", "/dev/vfio/7")]
        {
            let directory = proc.path().join(pid);
            fs::create_dir_all(directory.join("fd")).unwrap();
            symlink(file, directory.join("fd/5")).unwrap();
            fs::write(directory.join("comm"), "qemu\n").unwrap();
        }
        let holders = of_group(proc.path(), 7);
        assert_eq!(holders.iter().map(|holder| holder.pid).collect::<Vec<_>>(), [34, 120]);
        assert_eq!(holders[0].to_string(), "qemu (process 34)");
    }
}
