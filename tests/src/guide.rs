//! The guides in docs: commands that tests run as they stand there.

use std::fs;

use anyhow::Context;

use crate::workspace::Workspace;

/// The commands of a page's block `name`, which begins with the line "```sh NAME".
pub fn commands(workspace: &Workspace, page: &str, name: &str) -> anyhow::Result<String> {
    let path = workspace.root().join("docs").join(page);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let (_, rest) = text
        .split_once(&format!("```sh {name}\n"))
        .with_context(|| format!("{} has no block {name}", path.display()))?;
    let (commands, _) = rest.split_once("```").context("a block without an end")?;
    Ok(commands.to_owned())
}
