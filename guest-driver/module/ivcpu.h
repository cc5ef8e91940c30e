/* SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause */
/*
 * What the files of ivcpu.ko need from each other.
 *
 * Theory of operation
 *   One kernel thread, bound to the IVCPU (poller.c), polls two kinds of things in turn and sleeps when neither has
 *   work. ivcpu_settle() in main.c compares what there is to poll with what is polled, and starts or stops the thread;
 *   everything that changes one of them calls it. Without the thread everything interrupts as ever: nothing is ever
 *   lost by stopping.
 *
 *   The FIFO region (fifo.c) has a consumer, the thread, while all of this holds: there is a region (region.c), the
 *   IVCPU is online, the system is not about to suspend or reboot, and no virtio device is being bound to or released
 *   by its driver (queues.c). So virtqueues are only pointed to between two such changes. Whoever is about to free some
 *   (a driver's remove, a failing probe, suspend) is held in the notifier until the thread is gone, and the next one
 *   starts with nothing. Without a consumer the region says "absent".
 *
 *   Network interfaces (interfaces.c, napi.c) are polled while any are named. Their NAPI contexts are claimed, and given back, by
 *   the rules of NAPI itself, so an interface may come and go while the thread runs.
 *
 *   What wakes the sleeping thread: for the FIFO, any interrupt of a virtio device while an entry waits (interrupts.c
 *   sees interrupts before their handlers); for interfaces, a NAPI poll of the kernel's that found something.
 *
 * Locking, outermost first
 *   device locks, the lock of CPU hotplug   held by whoever calls ivcpu_settle()
 *   names_lock in interfaces.c              likewise
 *   lock in main.c                          held while the thread is started and stopped
 *   call_lock in poller.c                   a raw spinlock, taken by interrupts
 *   The thread itself takes none but the last, so it can be waited for under them, and under RTNL, which is taken
 *   inside names_lock and never together with the lock in main.c. Whatever takes the lock of CPU
 *   hotplug (cpuhp_setup_state(), patching a tracepoint in or out) is called without the lock in main.c.
 */
#ifndef IVCPU_H
#define IVCPU_H

#include <linux/compiler.h>
#include <linux/types.h>

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

struct device;
struct kernel_param_ops;
struct net_device;
struct notifier_block;
struct virtqueue;

/**
 * struct ivcpu_region - the FIFO region, mapped
 * @base: where it is mapped, write-back
 * @length: how much of it is mapped, bytes
 * @address: guest-physical address
 * @carrier: what shows it to this guest, for messages
 * @announced: the log says already that it is polled
 * @lost: another consumer took it over, or its header is damaged; it is not touched any more
 */
struct ivcpu_region {
	void *base;
	size_t length;
	phys_addr_t address;
	char carrier[48];
	bool announced;
	bool lost;
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
 * @napi_polls: polls of a NAPI context
 * @napi_packets: packets these brought
 * @napi_sleeps: how often contexts were given back to their interrupts
 * @napi_contexts: not a count: the contexts that are polled now
 * @napi_reaps: how often a transmit ring was looked at in the place of its interrupt
 */
struct ivcpu_counts {
	u64 entries;
	u64 delivered;
	u64 wakeups;
	u64 rescans;
	u64 sleeps;
	u64 fallbacks;
	u64 ignored;
	u64 napi_polls;
	u64 napi_packets;
	u64 napi_sleeps;
	u64 napi_contexts;
	u64 napi_reaps;
};

/**
 * struct ivcpu_igbvf - what of a network interface is outside NAPI, if its driver is igbvf
 * @registers: start of BAR 0; NULL: not igbvf
 * @irq: number of the transmit interrupt
 * @reaped: when the transmit ring was looked at last
 */
struct ivcpu_igbvf {
	void __iomem *registers;
	unsigned int irq;
	u64 reaped;
};

static inline void ivcpu_count(u64 *counter)
{
	WRITE_ONCE(*counter, *counter + 1);
}

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
void ivcpu_poller_call(bool (*is_needed)(void));

/* fifo.c */
int ivcpu_fifo_attach(struct ivcpu_region *region, unsigned int cpu);
bool ivcpu_fifo_serve(void);
bool ivcpu_fifo_is_contended(void);
bool ivcpu_fifo_prepare_sleep(void);
void ivcpu_fifo_wake(void);
bool ivcpu_fifo_call(void);
void ivcpu_fifo_leave(void);
void ivcpu_fifo_forget(void);
const char *ivcpu_fifo_state(void);

/* interfaces.c */
extern const struct kernel_param_ops ivcpu_interface_names;
int ivcpu_interfaces_init(void);
void ivcpu_interfaces_exit(void);
bool ivcpu_interfaces_are_wanted(void);
void ivcpu_interfaces_interrupt(unsigned int irq);

/* napi.c */
int ivcpu_napi_init(void);
void ivcpu_napi_exit(void);
bool ivcpu_napi_serve(void);
void ivcpu_napi_release(void);

/* igbvf.c */
void ivcpu_igbvf_find(struct ivcpu_igbvf *vf, const struct net_device *dev);
void ivcpu_igbvf_forget(struct ivcpu_igbvf *vf);
void ivcpu_igbvf_mask(const struct ivcpu_igbvf *vf);
void ivcpu_igbvf_resume(const struct ivcpu_igbvf *vf);
void ivcpu_igbvf_reap(struct ivcpu_igbvf *vf, struct net_device *dev);
bool ivcpu_igbvf_sends_by(const struct ivcpu_igbvf *vf, unsigned int irq);

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
