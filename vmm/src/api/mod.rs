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

use std::io;
use std::os::unix::net::UnixListener;
use std::thread;

use crate::sandbox::{self, Role};
use routes::Control;

/// Starts to serve. The thread ends with the process.
pub fn serve(listener: UnixListener, control: Control) -> io::Result<()> {
    thread::Builder::new().name("api".into()).spawn(move || {
        sandbox::enter_or_exit(Role::Api);
        accept(&listener, &control);
    })?;
    Ok(())
}

fn accept(listener: &UnixListener, control: &Control) {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                if let Err(error) = http::serve_one(&stream, |method, path| control.answer(method, path)) {
                    tracing::info!("a connection to the API socket failed: {error}");
                }
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
