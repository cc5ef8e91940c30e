//! The API socket: HTTP/1.1 over a Unix socket, with Cloud Hypervisor's paths and JSON, so that its tools find their way.
//!
//! One thread serves one connection after the other, one request each. Whoever may connect rules the VM anyway (the socket is
//! its owner's alone), so there is nothing to gain from serving many at once; a slow peer is cut off so that it delays the next
//! one by [`http::WITHIN`] at most. The request line and header are parsed by `httparse`, the parser of hyper: it neither allocates
//! nor starts threads, and does no I/O, so sizes, times and system calls stay ours. (`tiny_http` starts threads at will and has no
//! time limits; `micro_http`, which Cloud Hypervisor has, is on no registry.)

pub mod http;
pub mod info;
pub mod routes;
pub mod socket;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::thread;

use crate::exits::VcpuStats;
use crate::exits::lifetime::Lifetime;
use crate::machine::MachineOptions;
use crate::pause::Pause;
use crate::power::{EndSignal, PowerButton};
use crate::sandbox::{self, Role};
use crate::vcpu::Vcpu;
use info::VmConfig;
use routes::Control;
use socket::SocketFile;

/// The API of a VM that is being made: a socket on which nobody is answered yet.
pub struct Api {
    listener: UnixListener,
    file: SocketFile,
    config: VmConfig,
    memory: u64,
}

impl Api {
    /// Makes the socket.
    pub fn open(path: &Path, options: &MachineOptions) -> Result<Self, socket::Error> {
        let (listener, file) = socket::open(path)?;
        Ok(Self { listener, file, config: options.into(), memory: options.memory.size })
    }

    /// Starts to serve; the socket's file is there as long as what this returns. The thread ends with the process.
    pub fn serve(
        self,
        vcpus: &[Vcpu],
        pause: Pause,
        end: Arc<EndSignal>,
        button: PowerButton,
        exits: Arc<Mutex<Option<Lifetime>>>,
    ) -> io::Result<SocketFile> {
        let Self { listener, file, config, memory } = self;
        let (counters, shutdown) = (counters(vcpus), AtomicBool::new(false));
        let control = Control { config, memory, pause, end, button, counters, exits, shutdown };
        thread::Builder::new().name("api".into()).spawn(move || {
            sandbox::enter_or_exit(Role::Api);
            accept(&listener, &control);
        })?;
        Ok(file)
    }
}

/// KVM's counters of each vCPU, by its thread's name.
fn counters(vcpus: &[Vcpu]) -> BTreeMap<String, VcpuStats> {
    let open = |vcpu: &Vcpu| match VcpuStats::open(&vcpu.fd) {
        Ok(stats) => Some((vcpu.name.clone(), stats)),
        Err(error) => {
            tracing::info!("KVM has no counters of {}: {error}", vcpu.name);
            None
        }
    };
    vcpus.iter().filter_map(open).collect()
}

fn accept(listener: &UnixListener, control: &Control) {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                if let Err(error) = http::serve_one(&stream, |method, path| control.answer(method, path)) {
                    tracing::info!("a connection to the API socket failed: {error}");
                }
                drop(stream);
                control.answered();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Out of files, most likely: they may be closed again.
            Err(error) => {
                tracing::warn!("the API socket takes no connection: {error}");
                thread::sleep(http::WITHIN);
            }
        }
    }
}
