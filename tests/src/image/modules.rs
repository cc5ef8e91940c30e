//! Kernel modules with everything they depend on, in loading order, read from the module files themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use lzma_rust2::XzReader;
use object::{Object, ObjectSection};

use super::Error;
use crate::provision::KernelFiles;

/// One module, ready to be loaded.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// The modules of one kernel.
pub(super) struct Modules {
    release: String,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Modules {
    pub(super) fn of(kernel: &KernelFiles) -> Result<Self, Error> {
        let list = kernel.modules.join("modules.builtin");
        let text = fs::read_to_string(&list).map_err(Error::file("read", &list))?;
        let builtin = text.lines().filter_map(|line| module_name(Path::new(line))).collect();
        let mut files = BTreeMap::new();
        collect(&kernel.modules, &mut files)?;
        Ok(Self { release: kernel.release.clone(), files, builtin })
    }

    /// `names` and all they need, each once and after what it depends on; what is built in is left out.
    pub(super) fn in_loading_order(&self, names: &[&str]) -> Result<Vec<Module>, Error> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            self.visit(name, &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, seen: &mut BTreeSet<String>, order: &mut Vec<Module>) -> Result<(), Error> {
        let name = name.replace('-', "_");
        if self.builtin.contains(&name) || !seen.insert(name.clone()) {
            return Ok(());
        }
        let Some(path) = self.files.get(&name) else {
            return Err(Error::NoModule { release: self.release.clone(), name });
        };
        let content = read_module(path)?;
        for dependency in depends(path, &content)? {
            self.visit(&dependency, seen, order)?;
        }
        order.push(Module { name, content });
        Ok(())
    }
}

/// The module a file such as `kernel/drivers/net/virtio-net.ko.xz` holds.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = file.strip_suffix(".ko").or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(stem.replace('-', "_"))
}

fn collect(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), Error> {
    for entry in fs::read_dir(folder).map_err(Error::file("read", folder))? {
        let path = entry.map_err(Error::file("read", folder))?.path();
        if path.is_dir() && !path.is_symlink() {
            collect(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

fn read_module(path: &Path) -> Result<Vec<u8>, Error> {
    let content = fs::read(path).map_err(Error::file("read", path))?;
    if path.extension().is_some_and(|extension| extension == "xz") {
        let mut plain = Vec::new();
        XzReader::new(content.as_slice(), true)
            .read_to_end(&mut plain)
            .map_err(Error::file("decompress", path))?;
        return Ok(plain);
    }
    Ok(content)
}

/// What the module's own `.modinfo` section says it depends on.
fn depends(path: &Path, content: &[u8]) -> Result<Vec<String>, Error> {
    let not_a_module = |why: &str| Error::NotAModule(path.into(), why.into());
    let elf = object::File::parse(content).map_err(|e| not_a_module(&e.to_string()))?;
    let section = elf.section_by_name(".modinfo").ok_or_else(|| not_a_module("no .modinfo section"))?;
    let facts = section.data().map_err(|e| not_a_module(&e.to_string()))?;
    let list = facts
        .split(|byte| *byte == 0)
        .find_map(|fact| fact.strip_prefix(b"depends="))
        .ok_or_else(|| not_a_module("no depends= in .modinfo"))?;
    Ok(String::from_utf8_lossy(list).split(',').filter(|name| !name.is_empty()).map(String::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_names_of_files() {
        assert_eq!(module_name(Path::new("a/kvm-amd.ko.xz")).as_deref(), Some("kvm_amd"));
        assert_eq!(module_name(Path::new("a/tun.ko")).as_deref(), Some("tun"));
        assert_eq!(module_name(Path::new("a/modules.order")), None);
    }

    #[test]
    fn a_file_that_is_no_module() {
        let error = depends(Path::new("x.ko"), b"not an ELF file").expect_err("garbage is refused");
        assert!(error.to_string().starts_with("x.ko is not a kernel module"), "{error}");
    }
}
