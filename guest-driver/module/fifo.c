// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/*
 * The FIFO: takes completions from the region and runs the virtqueues they name, as their interrupts would have: the
 * handler with interrupts off, then the bottom halves it raised, on the IVCPU.
 *
 * While the thread sleeps (docs/fifo-abi.md, "Sleeping") a call wakes it: an interrupt of a served device, seen before
 * its handler runs. That handler delivers its queue's completion itself; the thread then finds what else there is. An
 * interrupt whose work the thread took first finds nothing and counts as spurious; the kernel gives up a line only if
 * 99,900 of 100,000 are, and while the thread sleeps none is.
 */
#include "ivcpu.h"
#include "consumer.h"

#include <linux/bottom_half.h>
#include <linux/interrupt.h>
#include <linux/irqflags.h>
#include <linux/mm.h>
#include <linux/random.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/slab.h>
#include <linux/virtio.h>
#include <linux/virtio_ring.h>

/* Looks at the rings between two PAUSEs: a host ends a loop of PAUSEs less than 128 cycles apart by an exit. */
#define LOOKS 8
/* Bottom halves wait for the end of a batch, so it is short. */
#define BATCH_ENTRIES 64
#define BATCH_NS (NSEC_PER_MSEC)
/* A look at all pending words because of a call costs some ten microseconds, so not oftener than this. */
#define RESCAN_NS (250 * NSEC_PER_USEC)
/* Looks that find a ring empty before it is not looked at any more. */
#define EMPTY_LOOKS 64

/* The virtqueue of a source, as its binding was when it was looked up. */
struct kept {
	u64 used_ring;
	u32 generation;
	struct virtqueue *queue;	/* NULL: this guest has none */
};

static struct ivcpu_region *region;	/* NULL: not attached */
static struct ivcpu_consumer consumer;
static struct kept *kept;
static u64 rescans_before;

enum state { ABSENT, AWAKE, SLEEPING };
static enum state state;	/* as published */
static bool called;

static struct virtqueue *queue_of(const struct ivcpu_completion *completion)
{
	struct kept *at = &kept[completion->ring * consumer.sources + completion->source];

	if (at->used_ring != completion->used_ring || at->generation != completion->generation) {
		at->queue = ivcpu_queue_of(completion->used_ring);
		at->generation = completion->generation;
		at->used_ring = completion->used_ring;
	}
	return at->queue;
}

/* Runs the virtqueue's interrupt handler. Called with bottom halves off. */
static void deliver(const struct ivcpu_completion *completion)
{
	struct virtqueue *queue = queue_of(completion);
	irqreturn_t result = IRQ_NONE;
	unsigned long flags;

	/* What a scan of the pending words finds comes while the scan is still on. */
	if (!consumer.scan)
		ivcpu_count(&ivcpu_counts.entries);
	if (!queue) {
		ivcpu_count(&ivcpu_counts.ignored);
		return;
	}
	local_irq_save(flags);
	if (!READ_ONCE(queue->reset))
		result = vring_interrupt(0, queue);
	local_irq_restore(flags);
	if (result == IRQ_HANDLED)
		ivcpu_count(&ivcpu_counts.delivered);
}

typedef bool next_completion(struct ivcpu_consumer *consumer, struct ivcpu_completion *completion);

/* Takes what next finds, up to a batch. Returns whether that was anything. */
static __always_inline bool serve(next_completion *next)
{
	struct ivcpu_completion completion;
	unsigned int looks = 0, entries = 0;
	u64 end;

	while (!next(&consumer, &completion))
		if (++looks == LOOKS)
			return false;
	end = local_clock() + BATCH_NS;
	local_bh_disable();
	do
		deliver(&completion);
	while (++entries < BATCH_ENTRIES && local_clock() < end && next(&consumer, &completion));
	local_bh_enable();
	return true;
}

/* Called though awake: the host found us too slow, or lost something. */
static void rescan_if_called(void)
{
	static u64 last;
	u64 now;

	if (!READ_ONCE(called))
		return;
	now = local_clock();
	if (now - last < RESCAN_NS)
		return;
	last = now;
	WRITE_ONCE(called, false);
	ivcpu_count(&ivcpu_counts.fallbacks);
	ivcpu_rescan(&consumer);
}

/**
 * ivcpu_fifo_serve() - delivers what the rings announce, up to a batch
 *
 * Return: whether there was anything.
 */
bool ivcpu_fifo_serve(void)
{
	bool busy;

	if (!region)
		return false;
	busy = serve(ivcpu_poll);
	rescan_if_called();
	WRITE_ONCE(ivcpu_counts.rescans, rescans_before + consumer.rescans);
	return busy;
}

/**
 * ivcpu_fifo_is_contended() - whether the host asks to sleep at once rather than to poll without work
 *
 * Return: true if it does.
 */
bool ivcpu_fifo_is_contended(void)
{
	return region && ivcpu_is_contended(&consumer);
}

/**
 * ivcpu_fifo_prepare_sleep() - says to the host that the thread sleeps, unless there is something to do
 *
 * Return: whether to sleep; then ivcpu_fifo_wake() afterwards.
 */
bool ivcpu_fifo_prepare_sleep(void)
{
	if (!region)
		return true;
	if (READ_ONCE(called))
		return false;
	switch (ivcpu_prepare_sleep(&consumer)) {
	case IVCPU_SLEEP_NOW:
		WRITE_ONCE(state, SLEEPING);
		ivcpu_count(&ivcpu_counts.sleeps);
		return true;
	case IVCPU_SLEEP_NOT_YET:
		break;
	case IVCPU_SLEEP_REPLACED:
		WRITE_ONCE(state, ABSENT);
		pr_err("another consumer took over the FIFO at %pa: stopped; load the module anew to take it back\n",
		       &region->address);
		WRITE_ONCE(region->lost, true);
		region = NULL;
		break;
	}
	return false;
}

/**
 * ivcpu_fifo_wake() - says to the host that the thread is awake again
 */
void ivcpu_fifo_wake(void)
{
	if (!region)
		return;
	ivcpu_wake(&consumer);
	WRITE_ONCE(state, AWAKE);
	if (READ_ONCE(called)) {
		/* The call is answered: what comes from here on is polled. */
		WRITE_ONCE(called, false);
		ivcpu_count(&ivcpu_counts.wakeups);
	}
}

/*
 * Whether an entry waits for the thread, which sleeps and so does not touch what is read here. Whoever calls it wrote
 * one before.
 */
static bool is_awaited(void)
{
	u64 hot;

	for (hot = ivcpu_hot(&consumer); hot; hot &= hot - 1) {
		u32 ring = IVCPU_LOWEST_BIT(hot);

		if (ivcpu_distance(&consumer, ring, ivcpu_slot(&consumer, ring)) >= 0)
			return true;
	}
	return false;
}

/**
 * ivcpu_fifo_call() - a served device's interrupt is here, and the thread exists
 *
 * Devices of other backends, which know no FIFO, interrupt too. A sleeping thread is left alone then: if their
 * interrupts are on other CPUs (virtio-blk's may be), each would cost an interrupt between CPUs.
 *
 * Return: whether the thread is to be woken.
 */
bool ivcpu_fifo_call(void)
{
	enum state now = READ_ONCE(state);

	if (now == ABSENT || (now == SLEEPING && !is_awaited()))
		return false;
	WRITE_ONCE(called, true);
	return true;
}

/**
 * ivcpu_fifo_attach() - becomes the consumer of a region
 * @attached: the region
 * @cpu: the IVCPU, for the log
 *
 * Return: 0, or an error with the region's state "absent".
 */
int ivcpu_fifo_attach(struct ivcpu_region *attached, unsigned int cpu)
{
	/* The header may have changed since it was checked, and it is read anew. */
	if (!ivcpu_attach(&consumer, attached->base, attached->length, get_random_u32() | 1, EMPTY_LOOKS)) {
		pr_err("the header of the FIFO at %pa is damaged: it is not polled any more; lay it out anew, then load the module anew\n",
		       &attached->address);
		attached->lost = true;
		return -EINVAL;
	}
	kept = kvcalloc(consumer.rings * consumer.sources, sizeof(*kept), GFP_KERNEL);
	if (!kept) {
		ivcpu_publish(&consumer, IVCPU_STATE_ABSENT);
		return -ENOMEM;
	}
	region = attached;
	rescans_before = ivcpu_counts.rescans;
	WRITE_ONCE(called, false);
	WRITE_ONCE(state, AWAKE);
	if (!region->announced)
		pr_info("CPU %u polls the FIFO at %pa (%s), %u rings\n",
			cpu, &region->address, region->carrier, consumer.rings);
	region->announced = true;
	return 0;
}

/**
 * ivcpu_fifo_leave() - leaves the region, if one is attached, and delivers what was announced until then
 */
void ivcpu_fifo_leave(void)
{
	if (!region)
		return;
	ivcpu_detach(&consumer);
	WRITE_ONCE(state, ABSENT);
	while (serve(ivcpu_scan))
		cond_resched();
	WRITE_ONCE(ivcpu_counts.rescans, rescans_before + consumer.rescans);
	region = NULL;
}

/**
 * ivcpu_fifo_forget() - forgets the virtqueues it pointed to; the thread is gone
 */
void ivcpu_fifo_forget(void)
{
	kvfree(kept);
	kept = NULL;
}

/**
 * ivcpu_fifo_state() - what the consumer published
 *
 * Return: absent, awake or sleeping.
 */
const char *ivcpu_fifo_state(void)
{
	switch (READ_ONCE(state)) {
	case AWAKE:
		return "awake";
	case SLEEPING:
		return "sleeping";
	default:
		return "absent";
	}
}
