/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Layout of the ivcpu FIFO region, see docs/fifo-abi.md.
 * Printed from guest-driver/abi/src/layout.rs by its example c_header; do not edit.
 */
#ifndef IVCPU_FIFO_H
#define IVCPU_FIFO_H

/* Distance between fields that different sides write, bytes. */
#define IVCPU_LINE 0x80u
/* First eight bytes of a region: IVCPUFIF read as a little-endian word. */
#define IVCPU_MAGIC 0x4649465550435649ull
/* Version of this layout and protocol. A reader rejects any other. */
#define IVCPU_VERSION 0x1u
/* Feature bits this version defines: none. A reader rejects a region with bits it does not know. */
#define IVCPU_FEATURES 0x0u
/* u64: IVCPU_MAGIC, written last when a region is created. */
#define IVCPU_MAGIC_AT 0x0u
/* u32: IVCPU_VERSION. */
#define IVCPU_VERSION_AT 0x8u
/* u32: feature bits, see IVCPU_FEATURES. */
#define IVCPU_FEATURES_AT 0xcu
/* u64: bytes in the region that this layout accounts for; the carrier may be larger. */
#define IVCPU_REGION_SIZE_AT 0x10u
/* u32: number of rings, 1 to IVCPU_MAX_RINGS. */
#define IVCPU_RINGS_AT 0x18u
/* u32: sources a ring, and slots a ring: a power of two, 1 to IVCPU_MAX_SOURCES. */
#define IVCPU_SOURCES_AT 0x1cu
/* u32: offset of ring 0, IVCPU_HEADER_SIZE in this version. */
#define IVCPU_RING_OFFSET_AT 0x20u
/* u32: bytes from one ring to the next, IVCPU_RING_STRIDE in this version. */
#define IVCPU_RING_STRIDE_AT 0x24u
/* u32, consumer writes: what it is doing, see State. */
#define IVCPU_STATE_AT 0x80u
/* u32, consumer writes: the token of the consumer that attached last; 0 = nobody yet. */
#define IVCPU_OWNER_AT 0x84u
/* u32, host writes: advice to the consumer, see IVCPU_HINT_CONTENDED. */
#define IVCPU_HINTS_AT 0x100u
/* u64, both write: bit r = ring r may hold entries and is looked at by the consumer. */
#define IVCPU_SUMMARY_AT 0x180u
/* Bytes before ring 0: one page. */
#define IVCPU_HEADER_SIZE 0x1000u
/* u32, producer writes: sequence of the entry it will write next. */
#define IVCPU_RING_HEAD_AT 0x0u
/* u32 a source, both write: not 0 = a completion of this source is announced and not yet taken. */
#define IVCPU_RING_PENDING_AT 0x400u
/* u64 a source, producer writes: which virtqueue it is, see Binding. */
#define IVCPU_RING_DIRECTORY_AT 0x800u
/* u64 a slot, producer writes: see Entry. */
#define IVCPU_RING_SLOTS_AT 0x1000u
/* Bytes from one ring to the next; also the bytes a producer locks to own the ring. */
#define IVCPU_RING_STRIDE 0x2000u
/* Most rings a region can have: the bits of the summary word. */
#define IVCPU_MAX_RINGS 0x40u
/* Most sources, and so slots, a ring can have. */
#define IVCPU_MAX_SOURCES 0x100u
/* Regions are created in multiples of this, because virtio-pmem asks for it. */
#define IVCPU_REGION_ALIGN 0x200000u
/* Hint bit: the host runs more on the IVCPU's core than the IVCPU; sleep as soon as there is no work. */
#define IVCPU_HINT_CONTENDED 0x1u
/* State word, low two bits: no consumer; complete by interrupt, leave the rings alone. */
#define IVCPU_STATE_ABSENT 0x0u
/* State word, low two bits: the consumer polls. */
#define IVCPU_STATE_AWAKE 0x1u
/* State word, low two bits: the consumer sleeps or is about to; a new entry needs the source's call. */
#define IVCPU_STATE_SLEEPING 0x2u
/* Which bits of the state word are the state; the rest is the epoch, +1 at every change. */
#define IVCPU_STATE_MASK 0x3u
/* Binding word: bits that are the guest-physical address. */
#define IVCPU_BINDING_ADDRESS_MASK 0xfffffffffffffull
/* Binding word: lowest bit of the generation. */
#define IVCPU_BINDING_GENERATION_SHIFT 0x34u
/* Values a generation can take before it wraps. */
#define IVCPU_GENERATION_MASK 0xfffu
/* Entry word: lowest bit of the sequence. */
#define IVCPU_ENTRY_SEQUENCE_SHIFT 0x20u
/* Sequence of the first entry ever written to a ring, so that a zeroed slot is an old one. */
#define IVCPU_FIRST_SEQUENCE 0x1u

#endif /* IVCPU_FIFO_H */
