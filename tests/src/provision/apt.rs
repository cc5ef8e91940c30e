//! apt with a state of our own.
//!
//! The system's configuration says how to reach the archive (proxy, credentials) and is read as it is; sources,
//! lists and downloads are ours, and the system's hooks do not run, so nothing of the system changes. An empty
//! dpkg status makes apt resolve *complete* sets of packages, C library included: what is unpacked runs the same
//! whatever is installed beside it.

use std::ffi::OsStr;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::archive::Error;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Commands of the system's that apt would run; they change the system's own state.
const HOOKS: [&str; 8] = [
    "APT::Update::Pre-Invoke",
    "APT::Update::Post-Invoke",
    "APT::Update::Post-Invoke-Success",
    "DPkg::Pre-Invoke",
    "DPkg::Post-Invoke",
    "DPkg::Pre-Install-Pkgs",
    "Binary::apt-get::APT::Update",
    "Binary::apt-get::DPkg",
];

/// apt, pointed at a folder of ours.
pub(super) struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Writes the configuration, for packages of `suites`, into `dir`.
    pub(super) fn configure(dir: &Path, suites: &[&str]) -> Result<Self, Error> {
        for folder in ["state/lists/partial", "cache/archives/partial"] {
            let folder = dir.join(folder);
            fs::create_dir_all(&folder).map_err(|e| Error::Write(folder, e))?;
        }
        let apt = Self { dir: dir.into() };
        apt.write("status", "")?;
        apt.write("sources.list", &sources_list(&system_archive()?, suites))?;
        let system = System::ask()?;
        apt.write("first.conf", &first(&system, &apt.dir))?;
        apt.write("last.conf", &last(&system, &apt.dir))?;
        Ok(apt)
    }

    pub(super) fn run(
        &self,
        tool: &'static str,
        what: &str,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Output, Error> {
        run(self.command(tool).args(arguments), tool, what)
    }

    pub(super) fn command(&self, tool: &str) -> Command {
        let mut command = Command::new(tool);
        command.env("APT_CONFIG", self.dir.join("first.conf")).env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    fn write(&self, name: &str, text: &str) -> Result<(), Error> {
        let path = self.dir.join(name);
        fs::write(&path, text).map_err(|e| Error::Write(path, e))
    }
}

/// Runs a tool of the distribution.
pub(super) fn run(command: &mut Command, tool: &'static str, what: &str) -> Result<Output, Error> {
    let output = command.output().map_err(|e| Error::Tool(tool, e))?;
    if output.status.success() {
        return Ok(output);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let message = text.lines().rev().find(|line| line.starts_with("E:")).or(text.lines().last());
    Err(Error::Failed { what: what.into(), message: message.unwrap_or("no message").trim().into() })
}

/// The system's configuration files that ours stand in for.
struct System {
    /// What `APT_CONFIG` names.
    first: Option<PathBuf>,
    /// apt.conf.
    main: PathBuf,
}

impl System {
    fn ask() -> Result<Self, Error> {
        let mut tool = Command::new("apt-config");
        tool.args(["shell", "MAIN", "Dir::Etc::main/f"]).env("LC_ALL", "C").stdin(Stdio::null());
        let output = run(&mut tool, "apt-config", "reading apt's configuration")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let main = text.trim().strip_prefix("MAIN=").unwrap_or_default().trim_matches('\'');
        let first = std::env::var_os("APT_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
        Ok(Self { first, main: main.into() })
    }
}

/// apt reads the file that `APT_CONFIG` names first, then apt.conf.d, then apt.conf: only a file that takes the
/// place of the latter can undo what the others said.
fn first(system: &System, dir: &Path) -> String {
    let include = system.first.as_ref().map(|first| format!("#include \"{}\";\n", first.display()));
    format!("{}Dir::Etc::main \"{}\";\n", include.unwrap_or_default(), dir.join("last.conf").display())
}

fn last(system: &System, dir: &Path) -> String {
    let mut text = String::new();
    // Writing to a String does not fail.
    if system.main.is_file() {
        let _ = writeln!(text, "#include \"{}\";", system.main.display());
    }
    for list in HOOKS.into_iter().chain(["APT::Architectures"]) {
        let _ = writeln!(text, "#clear {list};");
    }
    let at = |name: &str| dir.join(name).display().to_string();
    for (option, value) in [
        ("Dir::Etc::sourcelist", at("sources.list")),
        ("Dir::Etc::sourceparts", "/dev/null".into()),
        ("Dir::Etc::preferencesparts", "/dev/null".into()),
        ("Dir::Etc::preferences", "/dev/null".into()),
        ("Dir::State", at("state")),
        ("Dir::State::status", at("status")),
        ("Dir::Cache", at("cache")),
        ("APT::Architecture", "amd64".into()),
        ("APT::Architectures::", "amd64".into()),
        ("APT::Sandbox::User", "root".into()),
        ("Acquire::Retries", "3".into()),
    ] {
        let _ = writeln!(text, "{option} \"{value}\";");
    }
    text
}

/// The URI of the Debian archive this system uses.
fn system_archive() -> Result<String, Error> {
    let format = "$(RELEASE) $(COMPONENT) $(REPO_URI)";
    let mut apt = Command::new("apt-get");
    apt.args(["indextargets", "--format", format, "Created-By: Packages"]).env("LC_ALL", "C");
    let output = run(apt.stdin(Stdio::null()), "apt-get", "reading apt's configuration")?;
    main_archive(&String::from_utf8_lossy(&output.stdout)).ok_or(Error::NoArchive)
}

/// Picks the main archive: the one that serves a plain Debian release (not its security or update suites, and
/// not a third party's repository).
fn main_archive(targets: &str) -> Option<String> {
    const RELEASES: [&str; 8] =
        ["bookworm", "trixie", "forky", "stable", "oldstable", "testing", "unstable", "sid"];
    targets.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (release, component, uri) = (words.next()?, words.next()?, words.next()?);
        (component == "main" && RELEASES.contains(&release)).then(|| uri.to_string())
    })
}

fn sources_list(uri: &str, suites: &[&str]) -> String {
    let signed = if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
    suites.iter().map(|suite| format!("deb {signed}{uri} {suite} main\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn main_archive_among_security_and_third_parties() {
        let targets = "nodistro main http://a.example/\n\
                       bookworm-security main http://b.example/security/\n\
                       bookworm contrib http://c.example/debian/\n\
                       bookworm main http://c.example/debian/\n";
        assert_eq!(main_archive(targets).as_deref(), Some("http://c.example/debian/"));
        assert_eq!(main_archive("nodistro main http://a.example/\n"), None);
    }

    #[test]
    fn the_systems_settings_stay_and_its_hooks_do_not() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).expect("written");
            path
        };
        let hook = "APT::Update::Post-Invoke { \"touch /x\"; };\nDPkg::Post-Invoke { \"touch /x\"; };\n";
        let system = System {
            first: Some(write(
                "user.conf",
                &format!("Acquire::http::Proxy \"http://proxy.example\";\n{hook}"),
            )),
            main: write("apt.conf", &format!("Acquire::ForceIPv4 \"1\";\n{hook}")),
        };
        write("first.conf", &first(&system, dir.path()));
        write("last.conf", &last(&system, dir.path()));

        let apt = Apt { dir: dir.path().into() };
        let dump = apt.run("apt-config", "dumping", ["dump"]).expect("apt-config runs").stdout;
        let dump = String::from_utf8_lossy(&dump);
        for kept in ["Acquire::http::Proxy \"http://proxy.example\"", "Acquire::ForceIPv4 \"1\""] {
            assert!(dump.contains(kept), "{kept} in {dump}");
        }
        assert!(!dump.contains("Invoke:: ") && !dump.contains("Pre-Install-Pkgs:: "), "{dump}");
        assert!(dump.contains("APT::Architectures:: \"amd64\""), "{dump}");
        assert!(dump.contains(&format!("Dir::State \"{}\"", dir.path().join("state").display())), "{dump}");
    }
}
