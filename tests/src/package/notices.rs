//! The licences of the crates that the programs are made of, and of Rust's own library, which want to be passed on with them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// What every program of Rust is made of, beside its crates. Both texts stand below, because many crates have the same licences.
const STANDARD_LIBRARY: &str =
    "the Rust standard library: MIT OR Apache-2.0; copyright (c) The Rust Project Contributors";

/// What `cargo metadata` says.
#[derive(Debug, Deserialize)]
pub(super) struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Debug, Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    manifest_path: PathBuf,
    /// The registry; none for the workspace's own.
    source: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Debug, Deserialize)]
struct Kind {
    /// `dev` or `build`; none for what is linked.
    kind: Option<String>,
}

impl Metadata {
    /// The notices of everything by others that is linked into `programs`: each text once, below the names of its crates.
    pub(super) fn notices(&self, programs: &[&str]) -> io::Result<String> {
        let mut crates: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for package in self.linked_into(programs) {
            let name = format!("{} {}", package.name, package.version);
            let folder = package.manifest_path.parent().unwrap_or(Path::new("."));
            for text in texts(folder)? {
                crates.entry(text).or_default().insert(name.clone());
            }
        }
        let mut notices = String::from("Parts of ivcpu by others, and their licences.\n\n");
        let _ = writeln!(notices, "{STANDARD_LIBRARY}");
        for package in self.linked_into(programs) {
            let license = package.license.as_deref().unwrap_or("see below");
            // Writing to a String does not fail.
            let _ = writeln!(notices, "{} {}: {license}", package.name, package.version);
        }
        for (text, names) in crates {
            let names: Vec<_> = names.into_iter().collect();
            let _ = write!(notices, "\n{}\n{}\n\n{text}\n", "-".repeat(80), names.join(", "));
        }
        Ok(notices)
    }

    /// The crates by others that are linked into `programs`, by name.
    fn linked_into(&self, programs: &[&str]) -> Vec<&Package> {
        let nodes: BTreeMap<_, _> = self.resolve.nodes.iter().map(|node| (&node.id, node)).collect();
        let own = |package: &&Package| programs.contains(&package.name.as_str());
        let mut next: Vec<_> = self.packages.iter().filter(own).map(|package| &package.id).collect();
        let mut seen = BTreeSet::new();
        while let Some(id) = next.pop() {
            if seen.insert(id) {
                let dependencies = nodes.get(id).map(|node| node.deps.as_slice()).unwrap_or_default();
                let linked =
                    |dependency: &&Dependency| dependency.dep_kinds.iter().any(|kind| kind.kind.is_none());
                next.extend(dependencies.iter().filter(linked).map(|dependency| &dependency.pkg));
            }
        }
        let others = |package: &&Package| package.source.is_some() && seen.contains(&package.id);
        let mut packages: Vec<_> = self.packages.iter().filter(others).collect();
        packages.sort_by_key(|package| (&package.name, &package.version));
        packages
    }
}

/// The texts of a crate's licences.
fn texts(folder: &Path) -> io::Result<Vec<String>> {
    const NAMES: [&str; 4] = ["license", "licence", "copying", "notice"];
    let mut texts = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().to_lowercase();
        if NAMES.iter().any(|known| name.starts_with(known)) && entry.file_type()?.is_file() {
            texts.push(fs::read_to_string(entry.path())?.trim().to_owned());
        }
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_linked_is_named_and_each_text_once() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let package = |name: &str, source: &str| {
            let folder = dir.path().join(name);
            fs::create_dir(&folder).expect("made");
            fs::write(folder.join("LICENSE-MIT"), "Do as you like.\n").expect("written");
            format!(
                r#"{{"id":"{name}","name":"{name}","version":"1.0","license":"MIT","manifest_path":"{}/Cargo.toml","source":{source}}}"#,
                folder.display()
            )
        };
        let packages = [
            package("ours", "null"),
            package("linked", "\"registry\""),
            package("below", "\"registry\""),
            package("tested", "\"registry\""),
        ];
        let text = format!(
            r#"{{"packages":[{}],"resolve":{{"nodes":[
                {{"id":"ours","deps":[{{"pkg":"linked","dep_kinds":[{{"kind":null}}]}},{{"pkg":"tested","dep_kinds":[{{"kind":"dev"}}]}}]}},
                {{"id":"linked","deps":[{{"pkg":"below","dep_kinds":[{{"kind":null}}]}}]}}]}}}}"#,
            packages.join(",")
        );
        let metadata: Metadata = serde_json::from_str(&text).expect("understood");
        let notices = metadata.notices(&["ours"]).expect("read");
        assert_eq!(notices.matches("Do as you like.").count(), 1, "{notices}");
        assert!(notices.contains("below 1.0, linked 1.0"), "{notices}");
        assert!(!notices.contains("tested") && !notices.contains("ours"), "{notices}");
    }
}
