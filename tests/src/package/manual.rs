//! Manual pages and shell completions, out of the declarations of the command lines.

use std::fs;
use std::io;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;

/// Writes `PROGRAM.1` and a page for each of its subcommands into `pages`, and a file a shell into `completions`.
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
    fs::write(pages.join(format!("{name}.1")), page)?;
    for subcommand in command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
        write_page(subcommand, &format!("{name}-{}", subcommand.get_name()), pages)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_that_names_its_options() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        write(dir.path(), dir.path()).expect("written");
        let text = |name: &str| fs::read_to_string(dir.path().join(name)).expect(name);
        assert!(text("ivcpu-vmm.1").contains("\\-\\-kernel"), "{}", text("ivcpu-vmm.1"));
        assert!(text("ivcpu-backend.1").contains("ivcpu\\-backend\\-fifo(1)"));
        for page in ["ivcpu-vmm-exits.1", "ivcpu-vmm-doctor.1", "ivcpu-vmm-vfio-bind.1", "ivcpu-backend-fifo-create.1"] {
            let (text, name) = (text(page), page.trim_end_matches(".1").replace('-', "\\-"));
            assert!(text.contains(&format!("{name} \\-")), "{text}");
        }
        for file in ["ivcpu-vmm.bash", "_ivcpu-vmm", "ivcpu-vmm.fish"] {
            assert!(text(file).contains("doctor"), "{file}");
        }
    }
}
