//! The disk: a virtio-blk device over a raw image or block device of the host.
//!
//! The configuration space is here; requests are served by a thread of the disk's own ([`worker`]), kicked by KVM and interrupting
//! through KVM, so no vCPU comes to user space for them. The device offers as many queues as there are vCPUs but only two MSI-X
//! vectors, one for the configuration and one for all queues: Linux then leaves the latter where it is put. With a
//! vector for each queue the kernel would manage them itself, and the IVCPU could never have them.

mod flight;
pub mod image;
mod kernel_threads;
pub mod options;
pub mod request;
pub mod worker;

use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use self::image::{Image, SECTOR};
use self::options::DiskOptions;
use self::worker::{Command, Worker};
use super::{Activation, Device, read_bytes};
use crate::memory::GuestMemory;
use crate::pause::Pausable;

const CLASS_STORAGE: u32 = 0x01_8000;
/// Bytes of `struct virtio_blk_config` as far as it is used.
const CONFIG_SIZE: usize = 60;
/// Sectors a discard should be aligned to: the blocks of file systems.
const DISCARD_ALIGNMENT: u32 = 8;
/// One vector for the configuration, one for the queues.
const VECTORS: u16 = 2;

/// What can go wrong with a disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// No io_uring.
    #[error("the host lets no io_uring be made, which disks need; see /proc/sys/kernel/io_uring_disabled")]
    IoUring(#[source] std::io::Error),
    /// An event file.
    #[error("cannot make the event file of a disk")]
    EventFd(#[source] std::io::Error),
}

/// The device.
pub struct Block {
    features: u64,
    config: [u8; CONFIG_SIZE],
    queue_sizes: Vec<u16>,
    thread: Arc<Thread>,
}

/// The way to the disk's thread, which ends when this is dropped, with the device.
struct Thread {
    path: PathBuf,
    /// `None` only while it is dropped.
    commands: Option<Sender<Command>>,
    wake: EventFd,
}

impl Thread {
    fn tell(&self, command: Command) {
        // A thread that is gone has died of a bug; its disk does not answer any more.
        if let Some(commands) = &self.commands
            && commands.send(command).is_ok()
        {
            let _ = self.wake.write(1);
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // Before the thread is woken, which looks whether anybody can still tell it something.
        self.commands = None;
        let _ = self.wake.write(1);
    }
}

/// A disk, for whoever pauses the VM.
struct Rest(Weak<Thread>);

impl Pausable for Rest {
    fn pause(&self, within: Duration) -> bool {
        let Some(thread) = self.0.upgrade() else { return true };
        let (pausing, paused) = sync_channel(0);
        thread.tell(Command::Pause(pausing));
        // Also when the thread is gone.
        paused.recv_timeout(within) != Err(RecvTimeoutError::Timeout)
    }

    fn resume(&self) {
        if let Some(thread) = self.0.upgrade() {
            thread.tell(Command::Resume);
        }
    }

    fn name(&self) -> String {
        let path = self.0.upgrade().map(|thread| thread.path.display().to_string());
        format!("the disk {}", path.unwrap_or_default())
    }
}

impl Block {
    /// The device for an image, and its thread's part, which is to be started before the guest is. `number` counts disks, `vcpus`
    /// are the VM's.
    pub fn new(
        options: &DiskOptions,
        image: Image,
        number: usize,
        vcpus: u8,
        memory: GuestMemory,
    ) -> Result<(Self, Worker), Error> {
        let queues = options.queues.unwrap_or_else(|| default_queues(vcpus));
        let mut bits = vec![
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
        ];
        if image.readonly {
            bits.push(VIRTIO_BLK_F_RO);
        }
        if image.discards {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        let text = options.serial.clone().unwrap_or_else(|| format!("disk{number}"));
        serial.iter_mut().zip(text.bytes()).for_each(|(place, byte)| *place = byte);
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::EventFd)?;
        let (commands, receiver) = channel();
        let config = config(&image, queues);
        let woken = wake.try_clone().map_err(Error::EventFd)?;
        let worker = Worker::new(Arc::new(image), memory, serial, receiver, woken).map_err(Error::IoUring)?;
        let block = Self {
            features: bits.iter().fold(0, |features, bit| features | 1 << bit),
            config,
            queue_sizes: vec![options.queue_size; usize::from(queues)],
            thread: Arc::new(Thread { path: options.path.clone(), commands: Some(commands), wake }),
        };
        Ok((block, worker))
    }

    /// What pauses it.
    pub fn pausable(&self) -> Box<dyn Pausable> {
        Box::new(Rest(Arc::downgrade(&self.thread)))
    }
}

/// Queues of a disk whose options name no number.
pub fn default_queues(vcpus: u8) -> u16 {
    u16::from(vcpus).min(options::MAX_QUEUES)
}

/// `struct virtio_blk_config`.
fn config(image: &Image, queues: u16) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &image.sectors.to_le_bytes());
    put(12, &(request::MAX_SEGMENTS as u32).to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(34, &queues.to_le_bytes());
    if image.discards {
        let one = 1u32.to_le_bytes();
        put(36, &request::MAX_DISCARD.to_le_bytes());
        put(40, &one);
        put(44, &DISCARD_ALIGNMENT.to_le_bytes());
        put(48, &request::MAX_DISCARD.to_le_bytes());
        put(52, &one);
        put(56, &[1]); // zeroes may be holes
    }
    config
}

impl Device for Block {
    fn id(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn class(&self) -> u32 {
        CLASS_STORAGE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.queue_sizes.clone()
    }

    fn vectors(&self) -> u16 {
        VECTORS
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        self.thread.tell(Command::Start(activation.queues, activation.features));
    }

    fn serves(&self, _: u16) -> bool {
        false
    }

    fn kicked(&mut self, _: u16) {}

    fn reset(&mut self) {
        let (stopping, stopped) = sync_channel(0);
        self.thread.tell(Command::Stop(stopping));
        // Ends when the thread drops its side, also when it does so because it is gone.
        let _ = stopped.recv();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_says_what_the_image_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let memory = || GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), 1 << 20)]).unwrap();
        let block = |more: &str| {
            let options: DiskOptions = format!("path={}{more}", file.path().display()).parse().unwrap();
            Block::new(&options, Image::open(&options).unwrap(), 3, 4, memory()).unwrap().0
        };
        let has = |block: &Block, bit: u32| block.features() & (1 << bit) != 0;
        let number = |block: &Block, offset, length| {
            let mut bytes = [0; 8];
            block.read_config(offset, &mut bytes[..length]);
            u64::from_le_bytes(bytes)
        };
        let writable = block("");
        assert_eq!(
            (number(&writable, 0, 8), number(&writable, 20, 4), number(&writable, 34, 2)),
            (2048, 512, 4)
        );
        assert_eq!((writable.queue_sizes(), writable.vectors()), (vec![256; 4], 2));
        assert!(!has(&writable, VIRTIO_BLK_F_RO) && has(&writable, VIRTIO_BLK_F_FLUSH));
        assert_eq!(number(&writable, u64::MAX, 8), 0);
        drop(writable);
        let readonly = block(",readonly=on,num_queues=1");
        assert!(has(&readonly, VIRTIO_BLK_F_RO) && !has(&readonly, VIRTIO_BLK_F_DISCARD));
        assert_eq!((number(&readonly, 34, 2), number(&readonly, 36, 4)), (1, 0));
    }
}
