//! The Debian package: lintian finds no error in it; a clean Debian can install, use, remove and purge it, and nothing of it
//! is left; where there is DKMS, it builds the guest's module.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail, ensure};
use ivcpu_lab::package::{self, Programs, manual};
use ivcpu_lab::private_mounts::{Layer, Mounts, command_in, with_private_mounts};
use ivcpu_lab::provision::{Kernel, Provision};
use ivcpu_lab::workspace::Workspace;
use serde_json::Value;

/// Where the package is in the systems.
const PACKAGE: &str = "/tmp/ivcpu.deb";
/// What installing and removing any package changes.
const ALWAYS_CHANGED: [&str; 10] = [
    "etc/ld.so.cache",
    "tmp",
    "var/cache/debconf",
    "var/cache/ldconfig",
    "var/cache/man",
    // A key to sign modules with, which DKMS makes for itself.
    "var/lib/dkms/mok",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/status",
    "var/lib/dpkg/triggers",
    "var/log",
];

/// A Debian system with the package lying in it.
struct System<'a> {
    layer: Layer,
    lower: &'a Path,
}

impl System<'_> {
    /// Runs a program in it; what it said, if it ended well.
    fn run(&self, words: &[&str]) -> Result<String> {
        let output = self.output(words)?;
        let said = said(&output);
        ensure!(output.status.success(), "{words:?}: {}: {said}", output.status);
        Ok(said)
    }

    fn output(&self, words: &[&str]) -> Result<Output> {
        command_in(&self.layer.root, words).output().with_context(|| format!("running {words:?}"))
    }

    fn path(&self, path: &str) -> PathBuf {
        self.layer.root.join(path.trim_start_matches('/'))
    }

    /// What is different from the system that was there first, apart from what every package changes: new files, changed
    /// ones, and those that are gone.
    fn differences(&self) -> Result<Vec<String>> {
        let mut different = Vec::new();
        self.compare(Path::new(""), &mut different)?;
        Ok(different)
    }

    fn compare(&self, folder: &Path, different: &mut Vec<String>) -> Result<()> {
        for entry in fs::read_dir(self.layer.upper.join(folder))? {
            let entry = entry?;
            let path = folder.join(entry.file_name());
            if ALWAYS_CHANGED.iter().any(|always| path.to_string_lossy().starts_with(always)) {
                continue;
            }
            let (kind, before) = (entry.file_type()?, self.lower.join(&path));
            if kind.is_dir() && before.is_dir() {
                self.compare(&path, different)?;
            } else if !kind.is_file() || fs::read(&before).ok() != Some(fs::read(entry.path())?) {
                different.push(path.display().to_string());
            }
        }
        Ok(())
    }
}

fn said(output: &Output) -> String {
    [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat()
}

/// The package, made once for all tests.
fn the_package() -> Result<&'static Path> {
    static PATH: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let path = PATH.get_or_init(|| {
        let make = || -> Result<PathBuf> {
            let workspace = Workspace::locate()?;
            // What differs from the shipped ones is how far the compiler optimized.
            Ok(package::package(&workspace, &Provision::new(&workspace), Programs::OfTheLab)?)
        };
        make().map_err(|error| format!("{error:#}"))
    });
    path.as_deref().map_err(|error| anyhow!("making the package: {error}"))
}

/// Has `test` work in a layer over the system `lower`.
fn in_system(lower: &Path, test: impl FnOnce(&Mounts, &System<'_>) -> Result<()> + Send) -> Result<()> {
    let package = the_package()?;
    let at = tempfile::tempdir()?;
    with_private_mounts(|mounts| {
        let layer = mounts.layer(lower, at.path())?;
        mounts.enter(&layer.root)?;
        let system = System { layer, lower };
        fs::copy(package, system.path(PACKAGE))?;
        test(mounts, &system)
    })
}

#[test]
fn a_clean_system_installs_uses_and_purges_it() -> Result<()> {
    let clean = Provision::new(&Workspace::locate()?).clean_system()?;
    in_system(&clean, |_, system| {
        // Whatever it depends on is there: dpkg refuses otherwise.
        system.run(&["dpkg", "--install", PACKAGE])?;
        for program in manual::programs() {
            let version = system.run(&[program.get_name(), "--version"])?;
            let expected = format!("{} {} (features: ", program.get_name(), env!("CARGO_PKG_VERSION"));
            ensure!(version.starts_with(&expected), "{version}");
        }
        // Ready or not: the report is there, and the exit status says which.
        let doctor = system.output(&["ivcpu-vmm", "doctor", "--json"])?;
        ensure!(matches!(doctor.status.code(), Some(0 | 1)), "{}: {}", doctor.status, said(&doctor));
        let report: Value = serde_json::from_slice(&doctor.stdout).with_context(|| said(&doctor))?;
        ensure!(report.is_object(), "{report}");

        let guides = fs::read_to_string(system.path("usr/share/doc/ivcpu/README.md"))?;
        ensure!(guides.starts_with("# Guides"), "the index of guides is another page: {guides}");

        let description = fs::read(system.path("usr/share/qemu/vhost-user/50-ivcpu-backend.json"))?;
        let description: Value = serde_json::from_slice(&description)?;
        let program = description["binary"].as_str().context("the description names no program")?;
        let capabilities = system.run(&[program, "--print-capabilities"])?;
        let capabilities: Value = serde_json::from_str(&capabilities)?;
        for key in ["type", "features"] {
            ensure!(description[key] == capabilities[key], "{key}: {description} but {capabilities}");
        }

        // An instance that was set up and enabled is not, after a purge.
        fs::create_dir(system.path("etc/ivcpu"))?;
        fs::write(system.path("etc/ivcpu/net0.env"), "IVCPU_BACKEND_OPTIONS=\"--uplink null\"\n")?;
        let wants = system.path("etc/systemd/system/sockets.target.wants");
        fs::create_dir_all(&wants)?;
        let unit = "/usr/lib/systemd/system/ivcpu-backend@.socket";
        ensure!(system.path(unit).is_file(), "no {unit}");
        std::os::unix::fs::symlink(unit, wants.join("ivcpu-backend@net0.socket"))?;

        system.run(&["dpkg", "--remove", "ivcpu"])?;
        ensure!(!system.path("usr/bin/ivcpu-vmm").exists(), "not removed");
        system.run(&["dpkg", "--purge", "ivcpu"])?;
        let left = system.differences()?;
        ensure!(left.is_empty(), "purged, and these are not as before: {left:#?}");
        Ok(())
    })
}

#[test]
fn lintian_finds_no_error_and_the_dependencies_are_those_that_are_declared() -> Result<()> {
    let workbench = Provision::new(&Workspace::locate()?).workbench()?;
    in_system(&workbench, |_, system| {
        let output = system.output(&["lintian", "--allow-root", "--fail-on", "error", PACKAGE])?;
        println!("{}", said(&output));
        ensure!(output.status.success(), "lintian: {}: {}", output.status, said(&output));

        system.run(&["dpkg", "--unpack", PACKAGE])?;
        fs::create_dir_all(system.path("tmp/source/debian"))?;
        fs::write(
            system.path("tmp/source/debian/control"),
            "Source: ivcpu\n\nPackage: ivcpu\nArchitecture: any\n",
        )?;
        let needed = system.run(&[
            "sh",
            "-c",
            "cd /tmp/source && dpkg-shlibdeps -O /usr/bin/ivcpu-backend /usr/bin/ivcpu-vmm",
        ])?;
        let needed = needed.lines().find_map(|line| line.strip_prefix("shlibs:Depends="));
        let needed = needed.context("dpkg-shlibdeps says nothing")?;
        let declared = system.run(&["dpkg-deb", "--field", PACKAGE, "Depends"])?;
        for needed in needed.split(", ") {
            let (name, version) = words(needed);
            let found = declared.trim().split(", ").map(words).find(|(declared, _)| *declared == name);
            let (_, at_least) = found.with_context(|| format!("{name} is not in {declared}"))?;
            // Any libgcc will do that Debian 12 or later can have.
            if name == "libc6" {
                system.run(&["dpkg", "--compare-versions", at_least, "ge", version])?;
            }
        }
        Ok(())
    })
}

/// A dependency's name and its least version, empty if any will do.
fn words(dependency: &str) -> (&str, &str) {
    let (name, version) = dependency.split_once(" (>= ").unwrap_or((dependency, ""));
    (name, version.trim_end_matches(')'))
}

#[test]
fn its_manual_completions_and_module_are_of_use() -> Result<()> {
    let workspace = Workspace::locate()?;
    let provision = Provision::new(&workspace);
    let (kernel, workbench) = (provision.kernel(Kernel::V6_12)?, provision.workbench()?);
    in_system(&workbench, |mounts, system| {
        // The headers stay where they are, because they name themselves by that path.
        let headers = kernel.headers.ancestors().nth(2).context("headers are not in usr/src")?;
        let inside = system.path(&headers.display().to_string());
        fs::create_dir_all(&inside)?;
        mounts.bind(headers, &inside)?;
        let modules = system.path("usr/lib/modules").join(&kernel.release);
        fs::create_dir_all(&modules)?;
        std::os::unix::fs::symlink(&kernel.headers, modules.join("build"))?;
        let before = system.differences()?;

        let installing = system.run(&["dpkg", "--install", PACKAGE])?;
        let status = system.run(&["dkms", "status", "ivcpu"])?;
        ensure!(status.contains(&kernel.release) && status.contains(": installed"), "{status}: {installing}");
        let module = system.run(&["find", "/lib/modules/", "-name", "ivcpu.ko*"])?;
        let described = system.run(&["modinfo", "--field", "version", module.trim()])?;
        ensure!(described.trim() == env!("CARGO_PKG_VERSION"), "{described}");

        for page in pages(system)? {
            let text = system.run(&["man", "--warnings", "-l", &page])?;
            ensure!(text.contains("NAME") && !text.contains("warning:"), "{page}: {text}");
        }
        system.run(&["mandb", "--quiet"])?;
        let found = system.run(&["whatis", "ivcpu-vmm", "ivcpu-vmm-vfio-bind", "ivcpu-backend"])?;
        ensure!(found.lines().count() == 3, "{found}");

        // As a shell does it when the user presses TAB.
        for (line, expected) in [
            ("ivcpu-vmm doc", "doctor"),
            ("ivcpu-vmm vfio un", "unbind"),
            ("ivcpu-backend --print", "--print-capabilities"),
        ] {
            let completed = system.run(&["bash", "-c", COMPLETE, "bash", line])?;
            ensure!(completed.lines().any(|word| word.trim() == expected), "{line}: {completed}");
        }

        system.run(&["dpkg", "--remove", "ivcpu"])?;
        system.run(&["dpkg", "--purge", "ivcpu"])?;
        let left: Vec<_> = system.differences()?.into_iter().filter(|path| !before.contains(path)).collect();
        ensure!(left.is_empty(), "purged, and these are not as before: {left:#?}");
        if modules.join("updates").exists() {
            bail!("the module's folder is still there");
        }
        Ok(())
    })
}

/// Completes the command line $1 and prints what it could become.
const COMPLETE: &str = r#"
. /usr/share/bash-completion/bash_completion
COMP_LINE=$1 COMP_POINT=${#1}
read -ra COMP_WORDS <<< "$1"
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_completion_loader "${COMP_WORDS[0]}"
function=$(complete -p "${COMP_WORDS[0]}" | sed 's/.*-F \([^ ]*\) .*/\1/')
"$function" "${COMP_WORDS[0]}" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\n' "${COMPREPLY[@]}"
"#;

/// The manual pages of the package, and that there is one for each command.
fn pages(system: &System<'_>) -> Result<Vec<String>> {
    let listed = system.run(&["dpkg", "--listfiles", "ivcpu"])?;
    let pages: Vec<_> = listed.lines().filter(|path| path.ends_with(".1.gz")).map(str::to_owned).collect();
    let mut commands = 0;
    for program in manual::programs() {
        commands += count(&program);
    }
    ensure!(pages.len() == commands, "{commands} commands, but {pages:?}");
    Ok(pages)
}

fn count(command: &clap::Command) -> usize {
    1 + command.get_subcommands().map(count).sum::<usize>()
}
