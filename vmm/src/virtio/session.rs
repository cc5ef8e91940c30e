//! A session with a vhost-user backend: one connection, from the first message to the hang-up.
//!
//! Order of the messages: features and protocol features, owner; when the driver is ready memory, then for each ring its
//! size, addresses, base, call and kick; then the rings that are in use are enabled. A ring stops with GET_VRING_BASE. Every request
//! asks for an acknowledgement where the backend gives one, so an error is met where it happens.
//!
//! A backend that wants to know the device's status is told last when the driver is ready, and when it is gone. Such a one may
//! begin with all its rings at that moment and not with each one's kick (Alioth's does), so two things differ: one that
//! has a control queue of its own gets a kick for it, which nobody ever gives, because the control queue is here; and where
//! rings were used before, it has to prove first that it starts a ring where it is told to.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_net::VIRTIO_NET_F_CTRL_VQ;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::deadline::Deadline;
use super::{Queue, device_status};
use crate::memory::GuestMemory;

/// How long the backend may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// The same for the memory table: DPDK touches all of guest memory before it answers.
const MEMORY_WITHIN: Duration = Duration::from_secs(60);
/// Where the used index is in the used ring.
const USED_INDEX: u64 = 2;

/// What can go wrong with a backend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error(
        "cannot connect to the vhost-user backend at {path}; start the backend first and give the socket it listens on"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The peer listens but does not answer as a backend does, or hung up.
    #[error(
        "the vhost-user backend at {path} failed at {step}; is it a backend, and is no other VMM connected to it?"
    )]
    Message {
        /// The socket.
        path: PathBuf,
        /// Which message.
        step: &'static str,
        /// The error.
        source: vhost::Error,
    },
    /// The peer took the connection and says nothing: it is busy with another frontend, or hangs.
    #[error(
        "the vhost-user backend at {path} does not answer within {} s; another VMM is probably connected to it: stop that one or use another socket",
        within.as_secs()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// The time it had.
        within: Duration,
    },
    /// The backend cannot do what every guest needs.
    #[error("the vhost-user backend at {path} does not offer {feature}; use one that does")]
    Lacks {
        /// The socket.
        path: PathBuf,
        /// What.
        feature: &'static str,
    },
    /// The backend has fewer rings than wanted.
    #[error(
        "the vhost-user backend at {path} has {has} rings and {wanted} are wanted; lower num_queues= or raise the backend's number"
    )]
    TooFewRings {
        /// The socket.
        path: PathBuf,
        /// Rings it has.
        has: u64,
        /// Rings wanted.
        wanted: u64,
    },
    /// A backend that came back differs from the one the driver negotiated with.
    #[error(
        "the vhost-user backend at {path} came back without features {missing:#x} the guest uses; start it as before"
    )]
    Changed {
        /// The socket.
        path: PathBuf,
        /// The features.
        missing: u64,
    },
    /// A backend that came back does not go on where the one before stopped.
    #[error(
        "the vhost-user backend at {path} came back and starts ring {ring} at entry {said} although told {told}; have the guest set its network device up anew (unbind and bind the driver, or restart the VM)"
    )]
    Forgets {
        /// The socket.
        path: PathBuf,
        /// The ring.
        ring: usize,
        /// Where it was told to start.
        told: u16,
        /// Where it says it will.
        said: u32,
    },
    /// A ring lies outside guest memory; the transport checked that it does not.
    #[error("a ring at {0:#x} is outside guest memory")]
    Ring(u64),
    /// A file or thread of the VMM itself.
    #[error("cannot set up the connection to the vhost-user backend")]
    System(#[from] io::Error),
}

/// Where a ring starts in a backend that has not seen it yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// At its first entry: the driver just made it.
    Fresh,
    /// Where the backend before stopped: at the used index it left in guest memory. What it had taken and not
    /// returned is done again.
    UsedIndex,
}

/// A connection to a backend.
pub struct Session {
    frontend: Frontend,
    stream: UnixStream,
    deadline: Deadline,
    path: PathBuf,
    offered: u64,
    protocol: VhostUserProtocolFeatures,
    /// Number of the backend's own control queue, if it has one that wants a kick.
    own_control_queue: Option<usize>,
    /// The kick for that, which nobody gives.
    no_kick: EventFd,
    /// Whether the backend has the memory. It does not change.
    has_memory: bool,
    started: Vec<usize>,
}

impl Session {
    /// Connects and negotiates; `vrings` rings will be used. `no_kick` is for a queue of the backend's that is not. (It is made
    /// by the caller: a thread that looks for a lost backend may not.)
    pub fn connect(path: &Path, vrings: u64, no_kick: EventFd) -> Result<Self, Error> {
        let stream =
            UnixStream::connect(path).map_err(|source| Error::Connect { path: path.into(), source })?;
        let deadline = Deadline::new(stream.try_clone()?)?;
        let frontend = Frontend::from_stream(stream.try_clone()?, vrings);
        let mut session = Self {
            frontend,
            stream,
            deadline,
            path: path.into(),
            offered: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            own_control_queue: None,
            no_kick,
            has_memory: false,
            started: Vec::new(),
        };
        session.negotiate(vrings)?;
        Ok(session)
    }

    fn negotiate(&mut self, vrings: u64) -> Result<(), Error> {
        let _guard = self.deadline.start(ANSWER_WITHIN);
        let failed = |step| failed(&self.path, &self.deadline, step);
        self.frontend.set_owner().map_err(failed("SET_OWNER"))?;
        self.offered = self.frontend.get_features().map_err(failed("GET_FEATURES"))?;
        if self.offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(Error::Lacks { path: self.path.clone(), feature: "protocol features" });
        }
        self.protocol = negotiate_protocol(&mut self.frontend, failed)?;
        let at_once = self.begins_at_once();
        if vrings <= 2 && !at_once {
            return Ok(());
        }
        let has = if self.protocol.contains(VhostUserProtocolFeatures::MQ) {
            self.frontend.get_queue_num().map_err(failed("GET_QUEUE_NUM"))?
        } else {
            2
        };
        if at_once && has == vrings + 1 && self.offered & (1 << VIRTIO_NET_F_CTRL_VQ) != 0 {
            self.own_control_queue = Some(vrings as usize);
        }
        if has >= vrings {
            return Ok(());
        }
        if 2 * has < vrings {
            return Err(Error::TooFewRings { path: self.path.clone(), has: 2 * has, wanted: vrings });
        }
        // A backend that counts queue pairs, as DPDK does. The crate has taken the number for a limit on rings, so it
        // is told anew on the same connection.
        self.frontend = Frontend::from_stream(self.stream.try_clone()?, vrings);
        self.frontend.get_features().map_err(failed("GET_FEATURES"))?;
        negotiate_protocol(&mut self.frontend, failed)?;
        Ok(())
    }

    /// Features the backend offers.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// The file to watch for the hang-up.
    pub fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Gives the rings to the backend; those for which `enabled` says so may carry packets.
    pub fn start(
        &mut self,
        memory: &GuestMemory,
        features: u64,
        rings: &[Queue],
        base: Base,
        enabled: impl Fn(u16) -> bool,
    ) -> Result<(), Error> {
        let features = (features & self.offered) | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let guard = self.deadline.start(ANSWER_WITHIN);
        let set = self.frontend.set_features(features);
        set.map_err(failed(&self.path, &self.deadline, "SET_FEATURES"))?;
        drop(guard);
        if !self.has_memory {
            self.give(memory)?;
            self.has_memory = true;
        }
        let _guard = self.deadline.start(ANSWER_WITHIN);
        let failed = |step| failed(&self.path, &self.deadline, step);
        for ring in rings {
            let index = usize::from(ring.index);
            let start = match base {
                Base::Fresh => 0,
                Base::UsedIndex => memory
                    .load(GuestAddress(ring.used + USED_INDEX), Ordering::Acquire)
                    .map_err(|_| Error::Ring(ring.used))?,
            };
            if start != 0 && self.begins_at_once() {
                // Before all else, because the question also stops a ring.
                self.frontend.set_vring_base(index, start).map_err(failed("SET_VRING_BASE"))?;
                let said = self.frontend.get_vring_base(index).map_err(failed("GET_VRING_BASE"))?;
                if said != u32::from(start) {
                    return Err(Error::Forgets { path: self.path.clone(), ring: index, told: start, said });
                }
            }
            self.frontend.set_vring_num(index, ring.size).map_err(failed("SET_VRING_NUM"))?;
            self.frontend
                .set_vring_addr(index, &addresses(memory, ring)?)
                .map_err(failed("SET_VRING_ADDR"))?;
            self.frontend.set_vring_base(index, start).map_err(failed("SET_VRING_BASE"))?;
            self.frontend.set_vring_call(index, &ring.call).map_err(failed("SET_VRING_CALL"))?;
            self.frontend.set_vring_kick(index, &ring.kick).map_err(failed("SET_VRING_KICK"))?;
            self.started.push(index);
        }
        for ring in rings {
            let on = enabled(ring.index);
            self.frontend
                .set_vring_enable(usize::from(ring.index), on)
                .map_err(failed("SET_VRING_ENABLE"))?;
        }
        if let Some(index) = self.own_control_queue {
            self.frontend.set_vring_kick(index, &self.no_kick).map_err(failed("SET_VRING_KICK"))?;
        }
        self.set_status(device_status::READY)
    }

    /// Gives it the guest's memory.
    fn give(&mut self, memory: &GuestMemory) -> Result<(), Error> {
        let _guard = self.deadline.start(MEMORY_WITHIN);
        let failed = |step| failed(&self.path, &self.deadline, step);
        let regions: Vec<_> = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<Result<_, _>>()
            .map_err(failed("the memory table"))?;
        if self.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            for region in &regions {
                self.frontend.add_mem_region(region).map_err(failed("ADD_MEM_REG"))?;
            }
        } else {
            self.frontend.set_mem_table(&regions).map_err(failed("SET_MEM_TABLE"))?;
        }
        Ok(())
    }

    /// Whether it wants to know the device's status, and so may begin with all rings when the driver is ready.
    fn begins_at_once(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::STATUS)
    }

    /// Says what the driver is, if the backend wants to know. The deadline is running.
    fn set_status(&self, status: u64) -> Result<(), Error> {
        if !self.begins_at_once() {
            return Ok(());
        }
        let acknowledged = self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        let failed = failed(&self.path, &self.deadline, "SET_STATUS");
        device_status::set(&self.stream, status, acknowledged)
            .map_err(|e| failed(vhost::Error::VhostUserProtocol(e)))
    }

    /// Lets a ring carry packets, or not.
    pub fn set_enabled(&mut self, ring: u16, on: bool) -> Result<(), Error> {
        let _guard = self.deadline.start(ANSWER_WITHIN);
        self.frontend.set_vring_enable(usize::from(ring), on).map_err(failed(
            &self.path,
            &self.deadline,
            "SET_VRING_ENABLE",
        ))
    }

    /// Whether rings can be taken back and given again in the middle of their use. One that begins with all rings at once may not
    /// start them where it is told to.
    pub fn can_rest(&self) -> bool {
        !self.begins_at_once()
    }

    /// Takes all rings back; the backend does not touch them when this returns.
    pub fn stop(&mut self) -> Result<(), Error> {
        let _guard = self.deadline.start(ANSWER_WITHIN);
        if self.started.is_empty() {
            return Ok(());
        }
        for index in self.started.drain(..) {
            let failed = failed(&self.path, &self.deadline, "GET_VRING_BASE");
            self.frontend.get_vring_base(index).map_err(failed)?;
        }
        self.set_status(device_status::RESET)
    }

    /// Gives the connection up. Whoever watches it sees a hang-up.
    pub fn abandon(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn negotiate_protocol<F: FnOnce(vhost::Error) -> Error>(
    frontend: &mut Frontend,
    failed: impl Fn(&'static str) -> F,
) -> Result<VhostUserProtocolFeatures, Error> {
    let offered = frontend.get_protocol_features().map_err(failed("GET_PROTOCOL_FEATURES"))?;
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::STATUS;
    let agreed = offered & wanted;
    frontend.set_protocol_features(agreed).map_err(failed("SET_PROTOCOL_FEATURES"))?;
    if agreed.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    Ok(agreed)
}

/// What a failed message means: a connection the deadline has shut says nothing by itself.
fn failed(path: &Path, deadline: &Deadline, step: &'static str) -> impl FnOnce(vhost::Error) -> Error {
    move |source| match deadline.expired() {
        Some(within) => Error::Silent { path: path.into(), within },
        None => Error::Message { path: path.into(), step, source },
    }
}

/// The addresses of a ring as the backend wants them: in this process.
fn addresses(memory: &GuestMemory, ring: &Queue) -> Result<VringConfigData, Error> {
    let host = |address| match memory.get_host_address(GuestAddress(address)) {
        Ok(pointer) => Ok(pointer as u64),
        Err(_) => Err(Error::Ring(address)),
    };
    Ok(VringConfigData {
        queue_max_size: ring.size,
        queue_size: ring.size,
        flags: 0,
        desc_table_addr: host(ring.descriptors)?,
        used_ring_addr: host(ring.used)?,
        avail_ring_addr: host(ring.available)?,
        log_addr: None,
    })
}
