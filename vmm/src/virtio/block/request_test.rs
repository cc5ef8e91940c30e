//! Chains of every shape against the reader of requests.

use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits { sectors: 64, readonly: false, discards: true };
const READONLY: Limits = Limits { readonly: true, ..LIMITS };
const HEADER_AT: u64 = 0x1000;
const DATA: u64 = 0x2000;
const STATUS: u64 = 0x8000;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

fn memory(kind: u32, sector: u64) -> GuestMemory {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    memory.write_obj(kind, GuestAddress(HEADER_AT)).unwrap();
    memory.write_obj(sector, GuestAddress(HEADER_AT + 8)).unwrap();
    memory
}

/// Operation or refusal of a request with this header and these descriptors between header and status.
fn operation(kind: u32, sector: u64, data: &[(u64, u32, bool)], limits: Limits) -> Result<Operation, u8> {
    let chain = [&[(HEADER_AT, 16, false)], data, &[(STATUS, 1, true)]].concat();
    let request = Request::parse(chain.into_iter(), &memory(kind, sector), limits).unwrap();
    assert_eq!(request.status.0, STATUS);
    request.operation
}

#[test]
fn reads_and_writes_have_their_place() {
    match operation(VIRTIO_BLK_T_IN, 3, &[(DATA, 512, true), (DATA + 0x1000, 1024, true)], READONLY) {
        Ok(Operation::Read { offset: 1536, buffers }) => {
            let lengths: Vec<_> = buffers.pieces.iter().map(|piece| piece.iov_len).collect();
            assert_eq!((lengths, buffers.bytes), (vec![512, 1024], 1536));
        }
        other => panic!("{other:?}"),
    }
    let write = operation(VIRTIO_BLK_T_OUT, 63, &[(DATA, 512, false)], LIMITS);
    assert!(matches!(write, Ok(Operation::Write { offset: 32256, .. })), "{write:?}");
    assert!(matches!(operation(VIRTIO_BLK_T_FLUSH, 0, &[], LIMITS), Ok(Operation::Flush)));
}

#[test]
fn header_and_status_may_be_split_and_joined_with_data() {
    let memory = memory(VIRTIO_BLK_T_IN, 1);
    let split = [
        (HEADER_AT, 1, false),
        (HEADER_AT + 1, 0, false),
        (HEADER_AT + 1, 14, false),
        (HEADER_AT + 15, 1, false),
        (DATA, 100, true),
        (DATA + 100, 413, true),
        (0, 0, true),
    ];
    let request = Request::parse(split.into_iter(), &memory, LIMITS).unwrap();
    assert_eq!(request.status.0, DATA + 512);
    assert!(
        matches!(request.operation, Ok(Operation::Read { offset: 512, ref buffers }) if buffers.bytes == 512)
    );

    memory.write_obj(VIRTIO_BLK_T_OUT, GuestAddress(HEADER_AT)).unwrap();
    let joined = [(HEADER_AT, 16 + 1024, false), (STATUS, 1, true)];
    let request = Request::parse(joined.into_iter(), &memory, LIMITS).unwrap();
    assert!(matches!(request.operation, Ok(Operation::Write { ref buffers, .. }) if buffers.bytes == 1024));
}

#[test]
fn what_is_outside_the_disk_or_memory_is_refused() {
    let data = |length| [(DATA, length, true)];
    for (sector, length) in
        [(64, 512), (63, 1024), (u64::MAX, 512), (u64::MAX / 512, 1024), (0, 0), (0, 511), (0, 513)]
    {
        let refused = operation(VIRTIO_BLK_T_IN, sector, &data(length), LIMITS);
        assert_eq!(refused.unwrap_err(), IOERR, "{length} bytes at {sector}");
    }
    for address in [0xfe01, 0x1_0000, u64::MAX - 511, u64::MAX] {
        let refused = operation(VIRTIO_BLK_T_IN, 0, &[(address, 512, true)], LIMITS);
        assert_eq!(refused.unwrap_err(), IOERR, "{address:#x}");
    }
    let pieces = vec![(DATA, 512, true); MAX_SEGMENTS + 1];
    let large = Limits { sectors: u64::MAX / 512, ..LIMITS };
    assert_eq!(operation(VIRTIO_BLK_T_IN, 0, &pieces, large).unwrap_err(), IOERR);
    assert!(operation(VIRTIO_BLK_T_IN, 0, &pieces[1..], large).is_ok());
}

#[test]
fn a_disk_that_is_only_read_is_not_written() {
    for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(operation(kind, 0, &[(DATA, 512, false)], READONLY).unwrap_err(), IOERR);
    }
}

#[test]
fn ranges_are_checked() {
    let range = |kind, sector: u64, count: u32, flags: u32, limits| {
        let memory = memory(kind, 0);
        memory.write_obj(sector, GuestAddress(DATA)).unwrap();
        memory.write_obj(count, GuestAddress(DATA + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(DATA + 12)).unwrap();
        let chain = [(HEADER_AT, 16, false), (DATA, 16, false), (STATUS, 1, true)];
        Request::parse(chain.into_iter(), &memory, limits).unwrap().operation
    };
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    let done = range(discard, 8, 16, 0, LIMITS);
    assert!(matches!(done, Ok(Operation::Discard { offset: 4096, bytes: 8192 })), "{done:?}");
    assert!(matches!(range(zeroes, 0, 64, 1, LIMITS), Ok(Operation::WriteZeroes { unmap: true, .. })));
    assert_eq!(range(discard, 0, 8, 1, LIMITS).unwrap_err(), UNSUPP);
    assert_eq!(range(zeroes, 0, 8, 2, LIMITS).unwrap_err(), UNSUPP);
    assert_eq!(range(discard, 0, 8, 0, Limits { discards: false, ..LIMITS }).unwrap_err(), UNSUPP);
    for (sector, count) in [(0, 65), (64, 1), (u64::MAX, 1), (0, 0), (0, u32::MAX)] {
        assert_eq!(range(discard, sector, count, 0, LIMITS).unwrap_err(), IOERR, "{count} at {sector}");
    }
    let two = [(DATA, 32, false)];
    assert_eq!(operation(discard, 0, &two, LIMITS).unwrap_err(), UNSUPP);
}

#[test]
fn chains_in_the_wrong_order_or_cut_short() {
    let memory = memory(VIRTIO_BLK_T_IN, 0);
    let parse = |chain: &[(u64, u32, bool)]| Request::parse(chain.iter().copied(), &memory, LIMITS);
    assert!(parse(&[]).is_none() && parse(&[(HEADER_AT, 16, false)]).is_none());
    for chain in [
        &[(STATUS, 1, true)][..],
        &[(HEADER_AT, 15, false), (STATUS, 1, true)],
        &[(DATA, 512, true), (HEADER_AT, 16, false), (STATUS, 1, true)],
        &[(0xfff8, 16, false), (STATUS, 1, true)],
    ] {
        assert_eq!(parse(chain).unwrap().operation.unwrap_err(), IOERR, "{chain:?}");
    }
    assert_eq!(operation(99, 0, &[], LIMITS).unwrap_err(), UNSUPP);
}

#[test]
fn a_chain_without_end_is_not_read_to_its_end() {
    for length in [0, 1] {
        let mut read = 0;
        let endless = std::iter::repeat((DATA, length, true)).inspect(|_| read += 1);
        assert!(Request::parse(endless, &memory(VIRTIO_BLK_T_IN, 0), LIMITS).is_none());
        assert_eq!(read, MAX_SEGMENTS + 4);
    }
}

proptest! {
    #[test]
    fn what_is_accepted_is_inside_disk_and_memory(
        kind in 0u32..16,
        sector in prop_oneof![0u64..70, any::<u64>()],
        chain in proptest::collection::vec((0u64..0x1_2000, 0u32..0x3000, any::<bool>()), 0..12),
        readonly in any::<bool>(),
    ) {
        let limits = Limits { readonly, ..LIMITS };
        let memory = memory(kind, sector);
        let whole = [&[(HEADER_AT, 16, false)], chain.as_slice()].concat();
        let Some(request) = Request::parse(whole.into_iter(), &memory, limits) else { return Ok(()) };
        let Ok(operation) = request.operation else { return Ok(()) };
        let base = memory.get_host_address(GuestAddress(0)).unwrap() as usize;
        let (offset, bytes) = match operation {
            Operation::Read { offset, buffers } | Operation::Write { offset, buffers } => {
                let mut sum = 0;
                for piece in &buffers.pieces {
                    let start = piece.iov_base as usize;
                    prop_assert!(start >= base && start + piece.iov_len <= base + 0x1_0000);
                    sum += piece.iov_len as u64;
                }
                prop_assert_eq!(sum, buffers.bytes);
                (offset, buffers.bytes)
            }
            Operation::Discard { offset, bytes } | Operation::WriteZeroes { offset, bytes, .. } => (offset, bytes),
            Operation::Flush | Operation::Identify(_) => (0, 0),
        };
        prop_assert!(offset + bytes <= LIMITS.sectors * SECTOR && bytes % SECTOR == 0);
    }
}
