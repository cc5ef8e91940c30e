/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The consumer of the ivcpu FIFO region, for kernels and programs alike. The protocol, and why each step is
 * where it is, stands in docs/fifo-abi.md; guest-driver/abi/src/consumer.rs is the same in Rust.
 *
 * Theory of operation
 *   A pending word a source is the truth: not 0 = "look at this source's used ring". Rings of slots say where to
 *   look. The consumer polls the summary word and, for each ring whose bit is set, the one slot that is next; a
 *   slot proves by its sequence that it is. It clears the pending word before it hands the source out. Where
 *   the slots make no sense it looks at every pending word of that ring once ("rescan").
 *   Before it sleeps it writes the state, fences, and looks at the rings once more.
 *
 * Needs: nothing but a compiler. A kernel defines the IVCPU_* accessors below before it includes this file.
 * All functions of one consumer are called by one thread at a time.
 */
#ifndef IVCPU_CONSUMER_H
#define IVCPU_CONSUMER_H

#ifdef __KERNEL__
#include <linux/stddef.h>
#include <linux/types.h>
#else
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#endif

#include "ivcpu_fifo.h"

/* Loads acquire, stores release, the others do both. All are single accesses of their width. */
#ifndef IVCPU_LOAD32
#define IVCPU_LOAD32(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define IVCPU_LOAD64(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define IVCPU_STORE32(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)
#define IVCPU_SWAP32(p, v) __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL)
#define IVCPU_OR64(p, v) ((void)__atomic_fetch_or(p, v, __ATOMIC_ACQ_REL))
#define IVCPU_AND64(p, v) ((void)__atomic_fetch_and(p, v, __ATOMIC_ACQ_REL))
/* Orders earlier stores before later loads. */
#define IVCPU_FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
/* Index of the lowest bit that is set. */
#define IVCPU_LOWEST_BIT(v) ((uint32_t)__builtin_ctzll(v))
#endif

/* A completion handed out: look at the used ring of this source. */
struct ivcpu_completion {
	uint32_t ring;
	uint32_t source;
	/* Of the source's binding: a virtqueue kept for this source is the same while both are. */
	uint32_t generation;
	uint64_t used_ring;	/* guest-physical address, not 0 */
};

enum ivcpu_sleep {
	IVCPU_SLEEP_NOW,	/* sleep until called, then ivcpu_wake() */
	IVCPU_SLEEP_NOT_YET,	/* there is something to poll */
	IVCPU_SLEEP_REPLACED,	/* another consumer attached: stop, and touch the region no more */
};

/* Private to the functions below, except where noted. */
struct ivcpu_consumer {
	volatile uint8_t *base;
	uint32_t rings;
	uint32_t sources;
	uint32_t owner;
	uint32_t cool_after;
	uint32_t turn;		/* the ring to look at first */
	uint32_t scan_at;	/* next source to look at of the lowest ring in scan */
	uint64_t scan;		/* rings whose pending words are being looked at */
	uint64_t rescans;	/* may be read: how often a ring's pending words were looked at */
	uint32_t next[IVCPU_MAX_RINGS];		/* sequence of the entry to take next */
	uint32_t started_at[IVCPU_MAX_RINGS];	/* head at the last resync: a gap counts once a head */
	uint32_t empty[IVCPU_MAX_RINGS];	/* looks in a row that found nothing */
};

static inline volatile uint32_t *ivcpu_word(const struct ivcpu_consumer *c, uint32_t offset)
{
	return (volatile uint32_t *)(c->base + offset);
}

static inline volatile uint64_t *ivcpu_long(const struct ivcpu_consumer *c, uint32_t offset)
{
	return (volatile uint64_t *)(c->base + offset);
}

static inline uint32_t ivcpu_ring(uint32_t ring)
{
	return IVCPU_HEADER_SIZE + ring * IVCPU_RING_STRIDE;
}

static inline uint32_t ivcpu_head(const struct ivcpu_consumer *c, uint32_t ring)
{
	return IVCPU_LOAD32(ivcpu_word(c, ivcpu_ring(ring) + IVCPU_RING_HEAD_AT));
}

/*
 * Takes what is announced for the source, if anything is: the pending word is cleared before the used ring is
 * read. The binding is read after that, because the announcement may be newer than the entry that led here.
 */
static inline bool ivcpu_take(const struct ivcpu_consumer *c, uint32_t ring, uint32_t source,
			      struct ivcpu_completion *out)
{
	uint64_t binding;

	if (!IVCPU_SWAP32(ivcpu_word(c, ivcpu_ring(ring) + IVCPU_RING_PENDING_AT + 4 * source), 0u))
		return false;
	binding = IVCPU_LOAD64(ivcpu_long(c, ivcpu_ring(ring) + IVCPU_RING_DIRECTORY_AT + 8 * source));
	out->ring = ring;
	out->source = source;
	out->generation = (uint32_t)(binding >> IVCPU_BINDING_GENERATION_SHIFT);
	out->used_ring = binding & IVCPU_BINDING_ADDRESS_MASK;
	return out->used_ring != 0;
}

/* Publishes the state with the next epoch; anything but "awake" is fenced against what is looked at next. */
static inline void ivcpu_publish(const struct ivcpu_consumer *c, uint32_t state)
{
	uint32_t epoch = (IVCPU_LOAD32(ivcpu_word(c, IVCPU_STATE_AT)) & ~IVCPU_STATE_MASK) + IVCPU_STATE_MASK + 1;

	IVCPU_STORE32(ivcpu_word(c, IVCPU_STATE_AT), epoch | state);
	if (state != IVCPU_STATE_AWAKE)
		IVCPU_FENCE();	/* Leaving; partners: the producer's fences Pushed and Raised */
}

/*
 * Reads the shape of the rings, each word once, so that what is checked is what is used, whatever the other side
 * writes meanwhile. Why they make none in len bytes; NULL if they do.
 */
static inline const char *ivcpu_read_shape(struct ivcpu_consumer *c, uint64_t len)
{
	if (len < IVCPU_HEADER_SIZE)
		return "smaller than a header";
	c->rings = IVCPU_LOAD32(ivcpu_word(c, IVCPU_RINGS_AT));
	c->sources = IVCPU_LOAD32(ivcpu_word(c, IVCPU_SOURCES_AT));
	if (c->rings < 1 || c->rings > IVCPU_MAX_RINGS || c->sources < 1 || c->sources > IVCPU_MAX_SOURCES ||
	    (c->sources & (c->sources - 1)) ||
	    IVCPU_LOAD32(ivcpu_word(c, IVCPU_RING_OFFSET_AT)) != IVCPU_HEADER_SIZE ||
	    IVCPU_LOAD32(ivcpu_word(c, IVCPU_RING_STRIDE_AT)) != IVCPU_RING_STRIDE)
		return "a header that makes no sense";
	if (len < ivcpu_ring(c->rings))
		return "smaller than its rings";
	return NULL;
}

/* Why the len bytes at base, which start on a page, are no region for this consumer; NULL if they are one. */
static inline const char *ivcpu_check(volatile void *base, uint64_t len)
{
	struct ivcpu_consumer c = { .base = (volatile uint8_t *)base };

	if (len < IVCPU_HEADER_SIZE)
		return "smaller than a header";
	if (IVCPU_LOAD64(ivcpu_long(&c, IVCPU_MAGIC_AT)) != IVCPU_MAGIC)
		return "no FIFO region: wrong magic";
	if (IVCPU_LOAD32(ivcpu_word(&c, IVCPU_VERSION_AT)) != IVCPU_VERSION)
		return "a version this driver does not speak";
	if (IVCPU_LOAD32(ivcpu_word(&c, IVCPU_FEATURES_AT)) & ~IVCPU_FEATURES)
		return "feature bits this driver does not know";
	return ivcpu_read_shape(&c, len);
}

static inline void ivcpu_resync(struct ivcpu_consumer *c, uint32_t ring)
{
	c->next[ring] = c->started_at[ring] = ivcpu_head(c, ring);
	c->scan |= 1ull << ring;
	c->scan_at = 0;
	c->rescans++;
}

/*
 * Looks at every pending word once, during the next polls. For a consumer that is called although it is awake:
 * the producer found it too slow, or something is wrong with the rings.
 */
static inline void ivcpu_rescan(struct ivcpu_consumer *c)
{
	uint32_t ring;

	for (ring = 0; ring < c->rings; ring++)
		ivcpu_resync(c, ring);
}

/*
 * Attaches to a region that ivcpu_check() accepted, len bytes of which are mapped, in the place of any other
 * consumer. owner: not 0, and no other consumer's. A ring leaves the polled set after cool_after empty looks; 64 is a
 * good value. Returns false, with nothing written, if the header makes no sense any more.
 */
static inline bool ivcpu_attach(struct ivcpu_consumer *c, volatile void *base, uint64_t len, uint32_t owner,
				uint32_t cool_after)
{
	uint32_t ring;

	c->base = (volatile uint8_t *)base;
	c->owner = owner;
	c->cool_after = cool_after;
	if (ivcpu_read_shape(c, len))
		return false;
	c->turn = 0;
	c->scan = 0;
	for (ring = 0; ring < IVCPU_MAX_RINGS; ring++)
		c->empty[ring] = 0;
	IVCPU_STORE32(ivcpu_word(c, IVCPU_OWNER_AT), owner);
	ivcpu_publish(c, IVCPU_STATE_AWAKE);
	ivcpu_rescan(c);
	c->rescans = 0;
	return true;
}

/* Goes on looking at pending words. */
static inline bool ivcpu_scan(struct ivcpu_consumer *c, struct ivcpu_completion *out)
{
	while (c->scan) {
		uint32_t ring = IVCPU_LOWEST_BIT(c->scan);

		while (c->scan_at < c->sources) {
			uint32_t source = c->scan_at++;

			if (IVCPU_LOAD32(ivcpu_word(c, ivcpu_ring(ring) + IVCPU_RING_PENDING_AT + 4 * source)) &&
			    ivcpu_take(c, ring, source, out))
				return true;
		}
		c->scan &= c->scan - 1;
		c->scan_at = 0;
	}
	return false;
}

static inline uint64_t ivcpu_slot(const struct ivcpu_consumer *c, uint32_t ring)
{
	uint32_t slot = c->next[ring] & (c->sources - 1);

	return IVCPU_LOAD64(ivcpu_long(c, ivcpu_ring(ring) + IVCPU_RING_SLOTS_AT + 8 * slot));
}

/* How far an entry is from the one that is due: 0 = it is, below = old, so nothing is new; above = a gap. */
static inline int32_t ivcpu_distance(const struct ivcpu_consumer *c, uint32_t ring, uint64_t entry)
{
	return (int32_t)((uint32_t)(entry >> IVCPU_ENTRY_SEQUENCE_SHIFT) - c->next[ring]);
}

/* Takes an empty ring out of the polled set once it has been empty for long. */
static inline bool ivcpu_has_cooled(struct ivcpu_consumer *c, uint32_t ring)
{
	if (++c->empty[ring] < c->cool_after)
		return false;
	c->empty[ring] = 0;
	IVCPU_AND64(ivcpu_long(c, IVCPU_SUMMARY_AT), ~(1ull << ring));
	IVCPU_FENCE();	/* Cooled; partner: the producer's fence Pushed */
	if (ivcpu_distance(c, ring, ivcpu_slot(c, ring)) < 0)
		return true;
	IVCPU_OR64(ivcpu_long(c, IVCPU_SUMMARY_AT), 1ull << ring);
	return false;
}

static inline bool ivcpu_take_from(struct ivcpu_consumer *c, uint32_t ring, uint64_t *hot, struct ivcpu_completion *out)
{
	uint32_t entries;

	/*
	 * An entry whose pending word is clear was served before, one whose source is free is dropped; there are
	 * at most as many as slots.
	 */
	for (entries = 0; entries < c->sources; entries++) {
		uint64_t entry = ivcpu_slot(c, ring);
		uint32_t source = (uint32_t)entry;
		int32_t distance = ivcpu_distance(c, ring, entry);

		if (distance > 0 && ivcpu_head(c, ring) != c->started_at[ring]) {
			ivcpu_resync(c, ring);
			return ivcpu_scan(c, out);
		}
		if (distance != 0) {
			/* The last ring stays. */
			if ((*hot & (*hot - 1)) && ivcpu_has_cooled(c, ring))
				*hot &= ~(1ull << ring);
			return false;
		}
		c->next[ring]++;
		c->empty[ring] = 0;
		if (source < c->sources && ivcpu_take(c, ring, source, out))
			return true;
	}
	return false;
}

static inline uint64_t ivcpu_hot(const struct ivcpu_consumer *c)
{
	uint64_t valid = c->rings < 64 ? (1ull << c->rings) - 1 : ~0ull;

	return IVCPU_LOAD64(ivcpu_long(c, IVCPU_SUMMARY_AT)) & valid;
}

/* The next completion; false if there is none. */
static inline bool ivcpu_poll(struct ivcpu_consumer *c, struct ivcpu_completion *out)
{
	uint64_t hot, before, left;
	int pass;

	if (c->scan && ivcpu_scan(c, out))
		return true;
	hot = ivcpu_hot(c);
	/* Rings from turn on, then those before it. */
	before = hot & ((1ull << c->turn) - 1);
	left = hot & ~before;
	for (pass = 0; pass < 2; pass++, left = before) {
		for (; left; left &= left - 1) {
			uint32_t ring = IVCPU_LOWEST_BIT(left);

			if (ivcpu_take_from(c, ring, &hot, out)) {
				c->turn = (ring + 1) % 64;
				return true;
			}
		}
	}
	return false;
}

static inline bool ivcpu_has_work(struct ivcpu_consumer *c)
{
	uint64_t hot;

	if (c->scan)
		return true;
	for (hot = ivcpu_hot(c); hot; hot &= hot - 1) {
		uint32_t ring = IVCPU_LOWEST_BIT(hot);
		/* The head first: were it past this consumer, the slot could no longer be empty. */
		uint32_t head = ivcpu_head(c, ring);
		int32_t distance = ivcpu_distance(c, ring, ivcpu_slot(c, ring));

		if (distance == 0)
			return true;
		if ((distance > 0 || c->next[ring] - head > 1) && ivcpu_head(c, ring) != c->started_at[ring]) {
			ivcpu_resync(c, ring);
			return true;
		}
	}
	return false;
}

/* Says that the consumer is awake. Poll afterwards. */
static inline void ivcpu_wake(struct ivcpu_consumer *c)
{
	ivcpu_publish(c, IVCPU_STATE_AWAKE);
}

/*
 * Says that the consumer sleeps and looks at the rings once more; only after IVCPU_SLEEP_NOW it does. The means
 * of sleeping must remember a call that comes before.
 */
static inline enum ivcpu_sleep ivcpu_prepare_sleep(struct ivcpu_consumer *c)
{
	if (IVCPU_LOAD32(ivcpu_word(c, IVCPU_OWNER_AT)) != c->owner)
		return IVCPU_SLEEP_REPLACED;
	ivcpu_publish(c, IVCPU_STATE_SLEEPING);
	if (ivcpu_has_work(c)) {
		ivcpu_wake(c);
		return IVCPU_SLEEP_NOT_YET;
	}
	return IVCPU_SLEEP_NOW;
}

/* Whether the host asks to sleep at once rather than to poll without work. */
static inline bool ivcpu_is_contended(const struct ivcpu_consumer *c)
{
	return IVCPU_LOAD32(ivcpu_word(c, IVCPU_HINTS_AT)) & IVCPU_HINT_CONTENDED;
}

/*
 * Leaves the region: from now on completions come as interrupts. Afterwards take what is left:
 * while (ivcpu_scan(c, &completion)) ...
 */
static inline void ivcpu_detach(struct ivcpu_consumer *c)
{
	ivcpu_publish(c, IVCPU_STATE_ABSENT);
	ivcpu_rescan(c);
}

#endif /* IVCPU_CONSUMER_H */
