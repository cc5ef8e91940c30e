//! Manual pages and shell completions, out of the declarations of the command lines.

use std::fs;
use std::io;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;

use super::compressed;

/// Writes `PROGRAM.1.gz` and a page for each of its subcommands into `pages`, and a file a shell into `completions`.
pub(super) fn write(pages: &Path, completions: &Path) -> io::Result<()> {
    for folder in [pages, completions] {
        fs::create_dir_all(folder)?;
    }
    for mut program in programs() {
        let name = program.get_name().to_owned();
        write_pages(program.clone(), pages)?;
        for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
            generate_to(shell, &mut program, &name, completions)?;
        }
    }
    Ok(())
}

/// The programs' command lines.
pub fn programs() -> [Command; 2] {
    [ivcpu_backend::cli::Options::command(), ivcpu_vmm::cli::Cli::command()]
}

fn write_pages(program: Command, pages: &Path) -> io::Result<()> {
    // What `help` says is in the pages themselves.
    let mut program = program.disable_help_subcommand(true);
    program.build();
    write_page(&program, program.get_name(), pages)
}

/// Writes the page of `command`, which is called by `name`, its words joined by `-` as git does it, and those of its
/// subcommands.
fn write_page(command: &Command, name: &str, pages: &Path) -> io::Result<()> {
    let mut page = Vec::new();
    // A page's name is one word; its synopsis has the words as they are typed.
    let titled = command.clone().display_name(name.to_owned());
    Man::new(titled)
        .title(name.to_uppercase())
        .section("1")
        .source(concat!("ivcpu ", env!("CARGO_PKG_VERSION")))
        .manual("User Commands")
        .render(&mut page)?;
    fs::write(pages.join(format!("{name}.1.gz")), compressed(&page)?)?;
    for subcommand in command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
        write_page(subcommand, &format!("{name}-{}", subcommand.get_name()), pages)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::read::GzDecoder;

    use super::*;

    #[test]
    fn every_command_has_a_page_that_names_its_options() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        write(dir.path(), dir.path()).expect("written");
        let page = |name: &str| {
            let file = fs::File::open(dir.path().join(format!("{name}.1.gz"))).expect(name);
            let mut text = String::new();
            GzDecoder::new(file).read_to_string(&mut text).expect(name);
            text
        };
        assert!(page("ivcpu-vmm").contains("\\-\\-kernel"), "{}", page("ivcpu-vmm"));
        let names =
            ["ivcpu-vmm-exits", "ivcpu-vmm-doctor", "ivcpu-vmm-vfio-bind", "ivcpu-backend-fifo-create"];
        for name in names {
            let (text, written) = (page(name), name.replace('-', "\\-"));
            assert!(text.contains(&format!("{written} \\-")), "{text}");
        }
        for file in ["ivcpu-vmm.bash", "_ivcpu-vmm", "ivcpu-vmm.fish"] {
            let text = fs::read_to_string(dir.path().join(file)).expect(file);
            assert!(text.contains("doctor"), "{file}");
        }
    }
}
