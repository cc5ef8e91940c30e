//! `ivcpu-vmm vfio`.

use std::path::Path;

use clap::{Args, Subcommand};

use super::bind::host::ThisHost;
use super::bind::{self, BindOptions};
use super::list;
use super::sysfs::{self, Sysfs};
use crate::pci::address::PciAddress;
use crate::virtio::net_options::Mac;

/// What to do with PCI functions.
#[derive(Debug, Subcommand)]
pub enum VfioCommand {
    /// Bind a function to vfio-pci, so that --device can have it; of a NIC with SR-IOV, a virtual function made for that.
    /// Each change is shown, and written down for unbind
    Bind(BindArgs),
    /// Undo what bind changed for a function, and nothing else
    Unbind {
        /// The address that bind was given
        address: PciAddress,
    },
    /// List functions with SR-IOV, virtual functions, and what is bound to vfio-pci
    List {
        /// Print JSON instead of the table
        #[arg(long)]
        json: bool,
    },
}

/// What to bind.
#[derive(Debug, Args)]
pub struct BindArgs {
    /// Address such as 0000:01:00.0
    address: PciAddress,

    /// How many virtual functions to make if it is a physical one (1 if there are none yet); 0 binds that one itself
    #[arg(long, value_name = "N")]
    vfs: Option<u16>,

    /// MAC address of the virtual function; with several, of the first, and the others follow
    #[arg(long)]
    mac: Option<Mac>,

    /// VLAN of the virtual functions, which the NIC adds and removes; 0 is none
    #[arg(long, value_name = "ID")]
    vlan: Option<u16>,
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Binding or unbinding.
    #[error(transparent)]
    Bind(#[from] bind::Error),
    /// Listing.
    #[error(transparent)]
    Sysfs(#[from] sysfs::Error),
    /// Printing.
    #[error("cannot print the list")]
    Json(#[from] serde_json::Error),
}

/// Does it.
pub fn run(command: &VfioCommand) -> Result<(), Error> {
    let mut show = |line| println!("{line}");
    match command {
        VfioCommand::Bind(BindArgs { address, vfs, mac, vlan }) => {
            let options = BindOptions { virtual_functions: *vfs, mac: *mac, vlan: *vlan };
            for bound in bind::bind(&ThisHost::default(), *address, options, &mut show)? {
                println!("{bound}: ready for --device {bound}");
            }
        }
        VfioCommand::Unbind { address } => bind::unbind(&ThisHost::default(), *address, &mut show)?,
        VfioCommand::List { json } => {
            let list = list::list(&Sysfs::default(), Path::new("/proc"))?;
            if *json { println!("{}", serde_json::to_string(&list)?) } else { print!("{list}") }
        }
    }
    Ok(())
}
