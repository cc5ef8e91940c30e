// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/*
 * The consumer: a thread on the IVCPU that takes completions from the region and runs the virtqueues they name, as
 * their interrupts would have: the handler with interrupts off, then the bottom halves it raised, here.
 *
 * It polls until it has found nothing for poll_us, then sleeps until called (docs/fifo-abi.md, "Sleeping"). A call is
 * an interrupt of a served device, seen before its handler runs. That handler delivers its queue's completion itself;
 * the thread then finds what else there is. An interrupt whose work the thread took first finds nothing and counts
 * as spurious; the kernel gives up a line only if 99,900 of 100,000 are, and while the thread sleeps none is.
 */
#include "ivcpu.h"
#include "consumer.h"

#include <linux/bottom_half.h>
#include <linux/cpumask.h>
#include <linux/err.h>
#include <linux/interrupt.h>
#include <linux/irqflags.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/random.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/version.h>
#include <linux/virtio.h>
#include <linux/virtio_ring.h>

/* Looks at the rings between two PAUSEs: a host ends a loop of PAUSEs less than 128 cycles apart by an exit. */
#define LOOKS 8
/* Bottom halves wait for the end of a batch, so it is short. */
#define BATCH_ENTRIES 64
#define BATCH_NS (NSEC_PER_MSEC)
/* A look at all pending words because of a call costs some ten microseconds, so not oftener than this. */
#define RESCAN_NS (250 * NSEC_PER_USEC)
/* RCU asks for more than this only after 100 ms. */
#define QUIESCENT_NS (32 * NSEC_PER_MSEC)
/* Looks that find a ring empty before it is not looked at any more. */
#define EMPTY_LOOKS 64

struct ivcpu_counts ivcpu_counts;
unsigned int ivcpu_poll_us = 50;

/* The virtqueue of a source, as its binding was when it was looked up. */
struct kept {
	u64 used_ring;
	u32 generation;
	struct virtqueue *queue;	/* NULL: this guest has none */
};

/* Of the thread. */
static struct ivcpu_consumer consumer;
static struct ivcpu_region *region;
static struct kept *kept;
static u64 rescans_before;

enum state { ABSENT, AWAKE, SLEEPING };
static enum state state;	/* as published */

static DEFINE_RAW_SPINLOCK(call_lock);
static struct task_struct *thread;	/* NULL: nobody to call; changed under call_lock */
static bool called;

static void count(u64 *counter)
{
	WRITE_ONCE(*counter, *counter + 1);
}

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
		count(&ivcpu_counts.entries);
	if (!queue) {
		count(&ivcpu_counts.ignored);
		return;
	}
	local_irq_save(flags);
	if (!READ_ONCE(queue->reset))
		result = vring_interrupt(0, queue);
	local_irq_restore(flags);
	if (result == IRQ_HANDLED)
		count(&ivcpu_counts.delivered);
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
static void rescan_if_called(u64 now)
{
	static u64 last;

	if (!READ_ONCE(called) || now - last < RESCAN_NS)
		return;
	last = now;
	WRITE_ONCE(called, false);
	count(&ivcpu_counts.fallbacks);
	ivcpu_rescan(&consumer);
}

/* Sleeps unless there is something to do. A call from the first line on makes that short. */
static void sleep(void)
{
	set_current_state(TASK_IDLE);
	if (kthread_should_stop() || READ_ONCE(called))
		goto up;
	switch (ivcpu_prepare_sleep(&consumer)) {
	case IVCPU_SLEEP_NOW:
		WRITE_ONCE(state, SLEEPING);
		count(&ivcpu_counts.sleeps);
		schedule();
		ivcpu_wake(&consumer);
		WRITE_ONCE(state, AWAKE);
		if (READ_ONCE(called)) {
			/* The call is answered: what comes from here on is polled. */
			WRITE_ONCE(called, false);
			count(&ivcpu_counts.wakeups);
		}
		break;
	case IVCPU_SLEEP_NOT_YET:
		break;
	case IVCPU_SLEEP_REPLACED:
		WRITE_ONCE(region->replaced, true);
		break;
	}
up:
	__set_current_state(TASK_RUNNING);
}

/* Lets others run, and RCU go on, also where no tick does it. */
static void breathe(u64 now)
{
	static u64 last;

	/*
	 * Bottom halves that took too long are ksoftirqd's now, which waits for this CPU: without giving it up, some
	 * 700 microseconds each time on 6.12.
	 */
	if (local_softirq_pending())
		yield();
	else
		cond_resched();
	if (now - last < QUIESCENT_NS)
		return;
	last = now;
	local_irq_disable();
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
	rcu_momentary_eqs();
#else
	rcu_momentary_dyntick_idle();
#endif
	local_irq_enable();
}

static void poll(void)
{
	u64 now, idle_since = local_clock();

	while (!kthread_should_stop() && !region->replaced) {
		bool busy = serve(ivcpu_poll);

		now = local_clock();
		rescan_if_called(now);
		if (busy)
			idle_since = now;
		else if (now - idle_since >= READ_ONCE(ivcpu_poll_us) * NSEC_PER_USEC || ivcpu_is_contended(&consumer)) {
			sleep();
			idle_since = local_clock();
		}
		WRITE_ONCE(ivcpu_counts.rescans, rescans_before + consumer.rescans);
		breathe(now);
		cpu_relax();
	}
}

/* Leaves the region, and delivers what was announced until then. */
static void leave(void)
{
	ivcpu_detach(&consumer);
	WRITE_ONCE(state, ABSENT);
	while (serve(ivcpu_scan))
		cond_resched();
}

static int run(void *unused)
{
	poll();
	if (region->replaced) {
		WRITE_ONCE(state, ABSENT);
		pr_err("another consumer took over the FIFO at %pa: stopped; load the module anew to take it back\n",
		       &region->address);
	} else {
		leave();
	}
	rescans_before = ivcpu_counts.rescans;
	/* Whoever started it waits for it. */
	set_current_state(TASK_IDLE);
	while (!kthread_should_stop()) {
		schedule();
		set_current_state(TASK_IDLE);
	}
	__set_current_state(TASK_RUNNING);
	return 0;
}

/* The header may have changed since it was checked, and it was read anew. */
static bool has_a_sane_shape(const struct ivcpu_consumer *c, size_t length)
{
	return c->rings && IVCPU_HEADER_SIZE + c->rings * (size_t)IVCPU_RING_STRIDE <= length &&
	       c->sources && !(c->sources & (c->sources - 1));
}

/**
 * ivcpu_poller_start() - attaches to a region and starts the thread
 * @polled: the region
 * @cpu: the IVCPU, online
 *
 * Return: 0, or an error with the region's state "absent".
 */
int ivcpu_poller_start(struct ivcpu_region *polled, unsigned int cpu)
{
	struct task_struct *task;
	int err = -EINVAL;

	region = polled;
	ivcpu_attach(&consumer, region->base, get_random_u32() | 1, EMPTY_LOOKS);
	if (!has_a_sane_shape(&consumer, region->length))
		goto failed;
	err = -ENOMEM;
	kept = kvcalloc(consumer.rings * consumer.sources, sizeof(*kept), GFP_KERNEL);
	if (!kept)
		goto failed;
	task = kthread_create_on_cpu(run, NULL, cpu, "ivcpu/%u");
	if (IS_ERR(task)) {
		err = PTR_ERR(task);
		goto free;
	}
	WRITE_ONCE(state, AWAKE);
	get_task_struct(task);
	raw_spin_lock_irq(&call_lock);
	called = false;
	thread = task;
	raw_spin_unlock_irq(&call_lock);
	wake_up_process(task);
	if (!region->announced)
		pr_info("CPU %u polls the FIFO at %pa (%s), %u rings\n",
			cpu, &region->address, region->carrier, consumer.rings);
	region->announced = true;
	return 0;

free:
	kvfree(kept);
failed:
	ivcpu_publish(&consumer, IVCPU_STATE_ABSENT);
	return err;
}

/**
 * ivcpu_poller_stop() - ends the thread; no virtqueue is in use afterwards
 */
void ivcpu_poller_stop(void)
{
	struct task_struct *task = thread;

	raw_spin_lock_irq(&call_lock);
	thread = NULL;
	raw_spin_unlock_irq(&call_lock);
	kthread_stop(task);
	put_task_struct(task);
	kvfree(kept);
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
 * ivcpu_poller_call() - a served device's interrupt is here: wakes the thread, or tells it that it is waited for
 *
 * Devices of other backends, which know no FIFO, interrupt too. A sleeping thread is left alone then: if their
 * interrupts are on other CPUs (virtio-blk's may be), each would cost an interrupt between CPUs.
 * Called with interrupts off.
 */
void ivcpu_poller_call(void)
{
	raw_spin_lock(&call_lock);
	if (thread && (READ_ONCE(state) == AWAKE || (READ_ONCE(state) == SLEEPING && is_awaited()))) {
		WRITE_ONCE(called, true);
		wake_up_process(thread);
	}
	raw_spin_unlock(&call_lock);
}

/**
 * ivcpu_poller_state() - what the consumer published
 *
 * Return: absent, awake or sleeping.
 */
const char *ivcpu_poller_state(void)
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
