//! A driver, friendly and hostile, against a disk with its thread.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::virtio_blk::*;

use super::super::Block;
use super::super::options::DiskOptions;
use super::*;
use crate::virtio::{Activation, Device};

const RINGS: u64 = 0x1000;
const RING_STRIDE: u64 = 0x4000;
const SIZE: u16 = 16;
const HEADERS: u64 = 0x2_0000;
const DATA: u64 = 0x4_0000;
const MEMORY: usize = 1 << 20;
const SECTORS: u64 = 256;

struct Driver {
    file: tempfile::NamedTempFile,
    memory: GuestMemory,
    block: Option<Block>,
    thread: Option<JoinHandle<()>>,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    /// Chains made available in each queue.
    made: [u16; 2],
}

impl Driver {
    /// A disk whose thread runs.
    fn new(more: &str, features: u64) -> Option<Self> {
        let (mut driver, worker) = Self::without_thread(more)?;
        driver.thread = Some(worker.start("disk".into(), Arc::new(EndSignal::new().unwrap())).unwrap());
        driver.start(features);
        Some(driver)
    }

    /// A disk with two queues on an image whose byte at each place is the number of its sector; `None` without io_uring.
    fn without_thread(more: &str) -> Option<(Self, Worker)> {
        let file = tempfile::NamedTempFile::new().unwrap();
        for sector in 0..SECTORS {
            file.as_file().write_all_at(&[sector as u8; 512], sector * 512).unwrap();
        }
        let options: DiskOptions =
            format!("path={},num_queues=2,serial=abc{more}", file.path().display()).parse().unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let image = match Image::open(&options) {
            Err(error @ super::super::image::Error::Direct { .. }) => {
                eprintln!("SKIPPED: {error}");
                return None;
            }
            image => image.unwrap(),
        };
        let (block, worker) = match Block::new(&options, image, 0, 1, memory.clone()) {
            Ok(made) => made,
            Err(error) => {
                eprintln!("SKIPPED: {error}");
                return None;
            }
        };
        let (block, thread) = (Some(block), None);
        let driver = Self { file, memory, block, thread, kicks: Vec::new(), calls: Vec::new(), made: [0; 2] };
        Some((driver, worker))
    }

    fn start(&mut self, features: u64) {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (self.kicks, self.calls) = ((0..2).map(|_| event()).collect(), (0..2).map(|_| event()).collect());
        self.made = [0; 2];
        self.memory.write_slice(&[0; 2 * RING_STRIDE as usize], GuestAddress(RINGS)).unwrap();
        let queues = (0..2u16).map(|index| {
            let start = RINGS + RING_STRIDE * u64::from(index);
            Queue {
                index,
                size: SIZE,
                descriptors: start,
                available: start + 0x1000,
                used: start + 0x2000,
                kick: self.kicks[usize::from(index)].try_clone().unwrap(),
                call: self.calls[usize::from(index)].try_clone().unwrap(),
                config_change: Arc::default(),
            }
        });
        let activation = Activation { features, queues: queues.collect(), config_change: Arc::default() };
        self.block.as_mut().unwrap().activate(activation);
    }

    fn descriptor(&self, queue: usize, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = RINGS + RING_STRIDE * queue as u64 + 16 * u64::from(index);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes the chain at `head` available.
    fn offer(&mut self, queue: usize, head: u16) {
        let available = RINGS + RING_STRIDE * queue as u64 + 0x1000;
        let slot = available + 4 + 2 * u64::from(self.made[queue] % SIZE);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.made[queue] = self.made[queue].wrapping_add(1);
        self.memory
            .store(self.made[queue], GuestAddress(available + 2), std::sync::atomic::Ordering::Release)
            .unwrap();
    }

    fn used(&self, queue: usize) -> u16 {
        let used = RINGS + RING_STRIDE * queue as u64 + 0x2000;
        self.memory.load(GuestAddress(used + 2), std::sync::atomic::Ordering::Acquire).unwrap()
    }

    /// Kicks, and waits by way of interrupts until everything made available has come back.
    fn wait(&self, queue: usize) {
        // The interrupt that is wanted, where the device looks at that, is the one for the last of them.
        let available = RINGS + RING_STRIDE * queue as u64 + 0x1000;
        let last = self.made[queue].wrapping_sub(1);
        self.memory.write_obj(last, GuestAddress(available + 4 + 2 * u64::from(SIZE))).unwrap();
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.kicks[queue].write(1).unwrap();
        // SAFETY: the event file is open as long as `self`.
        let call = unsafe { BorrowedFd::borrow_raw(self.calls[queue].as_raw_fd()) };
        while self.used(queue) != self.made[queue] {
            let ready = poll(&mut [PollFd::new(call, PollFlags::POLLIN)], 10_000u16).unwrap();
            assert_eq!(ready, 1, "no interrupt: {} of {} used", self.used(queue), self.made[queue]);
            let _ = self.calls[queue].read();
        }
    }

    /// Prepares a request as Linux lays it out, in the three descriptors from `3 * number` on; its head.
    fn prepare(&self, queue: usize, number: u16, kind: u32, sector: u64, data: &[u8], reads: bool) -> u16 {
        let head = 3 * number;
        let header = HEADERS + 0x100 * u64::from(number) + 0x1000 * queue as u64;
        let at = DATA + 0x4000 * u64::from(number) + 0x2_0000 * queue as u64;
        self.memory.write_obj(kind, GuestAddress(header)).unwrap();
        self.memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
        self.memory.write_obj(0xffu8, GuestAddress(header + 16)).unwrap();
        self.memory.write_slice(data, GuestAddress(at)).unwrap();
        let written = if reads { 2 } else { 0 };
        self.descriptor(queue, head, header, 16, 1, if data.is_empty() { head + 2 } else { head + 1 });
        self.descriptor(queue, head + 1, at, data.len() as u32, 1 | written, head + 2);
        self.descriptor(queue, head + 2, header + 16, 1, 2, 0);
        head
    }

    fn status(&self, queue: usize, number: u16) -> u8 {
        let header = HEADERS + 0x100 * u64::from(number) + 0x1000 * queue as u64;
        self.memory.read_obj(GuestAddress(header + 16)).unwrap()
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[u8], reads: bool) -> (u8, Vec<u8>, u32) {
        let head = self.prepare(0, 0, kind, sector, data, reads);
        self.offer(0, head);
        self.wait(0);
        let mut after = vec![0; data.len()];
        self.memory.read_slice(&mut after, GuestAddress(DATA)).unwrap();
        let slot = RINGS + 0x2004 + 8 * u64::from(self.made[0].wrapping_sub(1) % SIZE);
        let written: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        (self.status(0, 0), after, written)
    }

    fn bytes(&self, sector: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.file.as_file().read_exact_at(&mut bytes, sector * 512).unwrap();
        bytes
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.block = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

#[test]
fn data_goes_both_ways() {
    for (more, features) in [("", FLUSH), ("", 0)] {
        let Some(mut driver) = Driver::new(more, features) else { return };
        assert_eq!(driver.request(VIRTIO_BLK_T_IN, 7, &[0; 512], true), (OK, vec![7; 512], 513));
        assert_eq!(driver.request(VIRTIO_BLK_T_OUT, 255, &[99; 512], false).0, OK);
        assert_eq!(driver.bytes(255, 512), [99; 512]);
        assert_eq!(driver.request(VIRTIO_BLK_T_FLUSH, 0, &[], false).0, OK);
        let (status, id, written) = driver.request(VIRTIO_BLK_T_GET_ID, 0, &[9; 20], true);
        assert_eq!((status, &id[..4], written), (OK, &b"abc\0"[..], 21));
        let id = driver.request(VIRTIO_BLK_T_GET_ID, 0, &[9; 2], true);
        assert_eq!(id, (OK, b"ab".to_vec(), 3));
    }
}

#[test]
fn direct_io_takes_aligned_and_unaligned_requests() {
    let Some(mut driver) = Driver::new(",direct=on", FLUSH) else { return };
    let page: Vec<u8> = (8..16).flat_map(|sector| [sector; 512]).collect();
    assert_eq!(driver.request(VIRTIO_BLK_T_IN, 8, &[0; 4096], true).1, page);
    assert_eq!(driver.request(VIRTIO_BLK_T_OUT, 8, &[1; 4096], false).0, OK);
    assert_eq!(driver.request(VIRTIO_BLK_T_OUT, 9, &[2; 512], false).0, OK);
    let (_, read, _) = driver.request(VIRTIO_BLK_T_IN, 8, &[0; 4096], true);
    assert_eq!(
        (&read[..512], &read[512..1024], &read[1024..]),
        (&[1; 512][..], &[2; 512][..], &[1; 3072][..])
    );
}

#[test]
fn what_the_disk_does_not_allow_is_an_error_and_no_more() {
    let Some(mut driver) = Driver::new("", FLUSH) else { return };
    assert_eq!(driver.request(VIRTIO_BLK_T_IN, SECTORS, &[5; 512], true), (FAILED, vec![5; 512], 1));
    assert_eq!(driver.request(VIRTIO_BLK_T_OUT, SECTORS - 1, &[5; 1024], false).0, FAILED);
    assert_eq!(driver.request(77, 0, &[0; 512], true).0, UNSUPPORTED);
    assert_eq!(driver.file.as_file().metadata().unwrap().len(), SECTORS * 512, "not longer");
    assert_eq!(driver.request(VIRTIO_BLK_T_IN, 1, &[0; 512], true).0, OK, "and the disk goes on");
    drop(driver);
    let Some(mut driver) = Driver::new(",readonly=on", FLUSH) else { return };
    assert_eq!(driver.request(VIRTIO_BLK_T_OUT, 1, &[9; 512], false).0, FAILED);
    assert_eq!(driver.bytes(1, 512), [1; 512]);
    assert_eq!(driver.request(VIRTIO_BLK_T_FLUSH, 0, &[], false).0, OK);
}

#[test]
fn each_queue_has_its_turn_where_one_takes_all_there_is() {
    let Some((mut driver, worker)) = Driver::without_thread("") else { return };
    driver.start(FLUSH);
    let mut service = Service::new(worker);
    assert!(service.obey());
    service.free.truncate(1);
    for (queue, number) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let head = driver.prepare(queue, number, VIRTIO_BLK_T_IN, 0, &[0; 512], true);
        driver.offer(queue, head);
    }
    for used in [(1, 0), (1, 1), (2, 1), (2, 2)] {
        service.serve();
        service.drain();
        assert_eq!((driver.used(0), driver.used(1)), used);
    }
}

#[test]
fn a_thread_that_panics_ends_the_vm() {
    let end = EndSignal::new().unwrap();
    end_on_panic("disk7 (/image)", &end, || ());
    assert_eq!(end.ending(), None);
    end_on_panic("disk7 (/image)", &end, || panic!("on purpose"));
    let ending = end.ending().unwrap();
    assert_eq!(ending.exit_status(), 1);
    assert!(ending.to_string().contains("the thread of disk7 (/image) panicked"), "{ending}");
}

#[test]
fn without_flushes_nothing_is_discarded_or_zeroed() {
    let Some(mut driver) = Driver::new("", 0) else { return };
    let range = [&8u64.to_le_bytes()[..], &8u32.to_le_bytes(), &0u32.to_le_bytes()].concat();
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(driver.request(kind, 0, &range, false).0, UNSUPPORTED);
    }
    assert_eq!(driver.bytes(8, 512), [8; 512]);
}

#[test]
fn discarded_and_zeroed_blocks_are_holes() {
    let Some(mut driver) = Driver::new("", FLUSH) else { return };
    if driver.block.as_ref().unwrap().features() & (1 << VIRTIO_BLK_F_DISCARD) == 0 {
        return eprintln!("SKIPPED: the temporary folder's file system has no holes");
    }
    let range = |sector: u64, count: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let blocks = || driver.file.as_file().metadata().unwrap().blocks();
    let before = blocks();
    assert_eq!(driver.request(VIRTIO_BLK_T_DISCARD, 0, &range(0, 64, 0), false).0, OK);
    assert_eq!(driver.file.as_file().metadata().unwrap().blocks(), before - 64);
    assert_eq!(driver.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(64, 64, 1), false).0, OK);
    assert_eq!(driver.bytes(0, 128 * 512), vec![0; 128 * 512]);
    assert_eq!(driver.bytes(128, 512), [128; 512]);
    // Without leave to make holes: where the file system cannot do that, the driver writes the zeroes.
    match driver.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(128, 8, 0), false).0 {
        OK => assert_eq!(driver.bytes(128, 4096), [0; 4096]),
        status => assert_eq!((status, driver.bytes(128, 512)), (UNSUPPORTED, vec![128; 512])),
    }
}

#[test]
fn two_queues_at_once_and_again_after_a_reset() {
    let Some(mut driver) =
        Driver::new("", FLUSH | 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX)
    else {
        return;
    };
    for round in 0..3u8 {
        for queue in 0..2 {
            for number in 0..4u16 {
                let content = [round.wrapping_mul(40) + (queue as u8) * 8 + number as u8; 0x2000];
                let sector = 32 * u64::from(number) + 128 * queue as u64;
                let head = driver.prepare(queue, number, VIRTIO_BLK_T_OUT, sector, &content, false);
                driver.offer(queue, head);
            }
        }
        driver.wait(0);
        driver.wait(1);
        for queue in 0..2 {
            for number in 0..4u16 {
                assert_eq!(driver.status(queue, number), OK);
                let content = [round.wrapping_mul(40) + (queue as u8) * 8 + number as u8; 0x2000];
                assert_eq!(driver.bytes(32 * u64::from(number) + 128 * queue as u64, 0x2000), content);
            }
        }
        driver.block.as_mut().unwrap().reset();
        driver.start(FLUSH);
    }
}

#[test]
fn a_reset_waits_for_what_is_in_flight() {
    let Some(mut driver) = Driver::new("", FLUSH) else { return };
    for number in 0..4 {
        let head = driver.prepare(0, number, VIRTIO_BLK_T_OUT, 0, &[1; 0x4000], false);
        driver.offer(0, head);
    }
    driver.kicks[0].write(1).unwrap();
    driver.block.as_mut().unwrap().reset();
    let used = driver.used(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.used(0), used, "nothing is touched any more");
    driver.kicks[0].write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.used(0), used);
}

#[test]
fn a_paused_disk_has_nothing_in_flight_and_begins_nothing() {
    let Some(mut driver) = Driver::new("", FLUSH) else { return };
    let rest = driver.block.as_ref().unwrap().pausable();
    let ask = |driver: &mut Driver, byte: u8| {
        for number in 0..4 {
            let head = driver.prepare(0, number, VIRTIO_BLK_T_OUT, 0, &[byte; 0x4000], false);
            driver.offer(0, head);
        }
        driver.kicks[0].write(1).unwrap();
    };
    for round in 1..=3 {
        ask(&mut driver, round);
        assert!(rest.pause(Duration::from_secs(10)));
        // What it had begun is done, what it had not is not; all of it waits for the kick again.
        let (used, bytes) = (driver.used(0), driver.bytes(0, 512));
        driver.kicks[0].write(1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!((driver.used(0), driver.bytes(0, 512)), (used, bytes));
        rest.resume();
        driver.wait(0);
        assert_eq!(driver.bytes(0, 512), [round; 512]);
    }
    drop(driver);
    assert!(rest.pause(Duration::ZERO), "a disk that is gone rests");
}

#[test]
fn an_image_that_became_shorter_is_an_error() {
    let Some(mut driver) = Driver::new("", FLUSH) else { return };
    driver.file.as_file().set_len(512).unwrap();
    assert_eq!(driver.request(VIRTIO_BLK_T_IN, 0, &[7; 1024], true).0, FAILED);
    assert_eq!(driver.request(VIRTIO_BLK_T_IN, 0, &[7; 512], true).0, OK);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_ring_content_is_survived(
        descriptors in proptest::collection::vec((0u64..0x11_0000, 0u32..0x3000, 0u16..8, 0u16..20), usize::from(SIZE)),
        headers in proptest::collection::vec((0u32..16, 0u64..300), 16),
        heads in proptest::collection::vec(0u16..20, 8),
        jump in any::<u16>(),
    ) {
        let Some(mut driver) = Driver::new("", FLUSH) else { return Ok(()) };
        for (index, (kind, sector)) in headers.into_iter().enumerate() {
            let at = HEADERS + 0x100 * index as u64;
            driver.memory.write_obj(kind, GuestAddress(at)).unwrap();
            driver.memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
        }
        for (index, (address, length, flags, next)) in descriptors.into_iter().enumerate() {
            // Half of them are headers.
            let (address, length) = if address % 2 == 0 { (HEADERS + address % 0x1000, 16) } else { (address, length) };
            driver.descriptor(0, index as u16, address, length, flags, next);
        }
        for head in heads {
            driver.offer(0, head);
        }
        driver.kicks[0].write(1).unwrap();
        driver.made[0] = jump;
        driver.offer(0, 0);
        driver.kicks[0].write(1).unwrap();
        driver.block.as_mut().unwrap().reset();
        driver.start(FLUSH);
        prop_assert!(driver.request(VIRTIO_BLK_T_IN, 0, &[0; 512], true).0 == OK, "it works again");
        prop_assert_eq!(driver.file.as_file().metadata().unwrap().len(), SECTORS * 512);
    }
}
