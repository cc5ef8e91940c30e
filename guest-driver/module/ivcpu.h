/* SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause */
/*
 * What the files of ivcpu.ko need from each other.
 *
 * Theory of operation
 *   The consumer of the FIFO region is one kernel thread, bound to the IVCPU (poller.c). It lives while all of this
 *   holds: there is a region (region.c), the IVCPU is online, the system is not about to suspend or reboot, and no
 *   virtio device is being bound to or released by its driver (queues.c). ivcpu_settle() in main.c compares that
 *   with what is, and starts or stops the thread; everything that changes one of them calls it. Without the thread
 *   the region says "absent", and every completion comes as an ordinary interrupt: nothing is ever lost by stopping.
 *
 *   So virtqueues are only pointed to between two such changes. Whoever is about to free some (a driver's remove, a
 *   failing probe, suspend) is held in the notifier until the thread is gone, and the next one starts with nothing.
 *
 *   While the thread sleeps, any interrupt of a virtio device wakes it if an entry waits; interrupts.c sees interrupts
 *   before their handlers.
 *
 * Locking, outermost first
 *   device locks, the lock of CPU hotplug   held by whoever calls ivcpu_settle()
 *   lock in main.c                          held while the thread is started and stopped
 *   call_lock in poller.c                   a raw spinlock, taken by interrupts
 *   The thread itself takes none of the first two, so it can be waited for under them. Whatever takes the lock of CPU
 *   hotplug (cpuhp_setup_state(), patching a tracepoint in or out) is called without the lock in main.c.
 */
#ifndef IVCPU_H
#define IVCPU_H

#include <linux/types.h>

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

struct device;
struct notifier_block;
struct virtqueue;

/**
 * struct ivcpu_region - the FIFO region, mapped
 * @base: where it is mapped, write-back
 * @length: how much of it is mapped, bytes
 * @address: guest-physical address
 * @carrier: what shows it to this guest, for messages
 * @announced: the log says already that it is polled
 * @replaced: another consumer took it over; it is not touched any more
 */
struct ivcpu_region {
	void *base;
	size_t length;
	phys_addr_t address;
	char carrier[48];
	bool announced;
	bool replaced;
};

/**
 * struct ivcpu_counts - what the thread did since the module was loaded; written by the thread only
 * @entries: entries taken from the rings
 * @delivered: runs of a virtqueue that had something in its used ring
 * @wakeups: sleeps that ended by an interrupt
 * @rescans: how often a ring's pending words were looked at
 * @sleeps: how often it slept
 * @fallbacks: interrupts of virtio devices that came although it was awake, each the reason of a rescan
 * @ignored: completions of sources that name no virtqueue of this guest
 */
struct ivcpu_counts {
	u64 entries;
	u64 delivered;
	u64 wakeups;
	u64 rescans;
	u64 sleeps;
	u64 fallbacks;
	u64 ignored;
};

/* main.c */
void ivcpu_settle(void);
int ivcpu_use_region(struct ivcpu_region *region);
void ivcpu_leave_region(struct ivcpu_region *region);

/* region.c */
int ivcpu_regions_init(void);
void ivcpu_regions_exit(void);

/* queues.c */
int ivcpu_queues_init(void);
void ivcpu_queues_exit(void);
bool ivcpu_queues_are_stable(void);
int ivcpu_queues_collect(void);
void ivcpu_queues_drop(void);
struct virtqueue *ivcpu_queue_of(u64 used_ring);
bool ivcpu_interrupt_is_served(unsigned int irq);
int ivcpu_virtio_notify(struct notifier_block *notifier);
void ivcpu_virtio_unnotify(struct notifier_block *notifier);
int ivcpu_for_each_virtio(int (*each)(struct device *dev, void *data));

/* poller.c */
extern struct ivcpu_counts ivcpu_counts;
extern unsigned int ivcpu_poll_us;
int ivcpu_poller_start(struct ivcpu_region *region, unsigned int cpu);
void ivcpu_poller_stop(void);
void ivcpu_poller_call(void);
const char *ivcpu_poller_state(void);

/* interrupts.c */
int ivcpu_interrupts_init(void);
void ivcpu_interrupts_exit(void);

/* affinity.c */
void ivcpu_affinity_keep(unsigned int cpu);
void ivcpu_affinity_release(void);
void ivcpu_affinity_handled(unsigned int irq);

/* counters.c */
int ivcpu_counters_init(void);
void ivcpu_counters_exit(void);

#endif /* IVCPU_H */
