// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/*
 * Polls the NAPI contexts of chosen network interfaces, whatever their drivers, so that the devices do not interrupt.
 *
 * A device interrupts once; its driver schedules the context and leaves the interrupt off in the device until the
 * context is complete. Here it is not completed: the thread claims it as the kernel's busy polling does, by the bits
 * SCHED and IN_BUSY_POLL of its state, and napi_complete_done() then answers "do not interrupt". So neither this kernel
 * nor the host of a passed-through device sees an interrupt. One that comes all the same leaves MISSED in the state;
 * then the device needs masking (igbvf.c).
 *
 * Who set SCHED owns the context: napi_disable(), which comes before it is freed, waits for the owner. So a claimed
 * context may be pointed to, and one whose owner is waited for is given back in the same round. Others are found
 * anew each round under RCU in the list of their interface (ethtool -L exchanges them without telling).
 *
 * napi_synchronize() waits for the owner, too, and tells nobody. Drivers call it where they stop their device (e1000e, igb,
 * enetc), when the interface is not running any more or its carrier is off. So such an interface's contexts are given
 * back, and not claimed.
 *
 * Before the thread sleeps it gives its contexts back: scheduled as by an interrupt, they are polled once more by the
 * kernel, which completes them and so turns the interrupts on. What a context finds in the kernel's hands wakes
 * the thread, seen through the tracepoint napi_poll.
 *
 * What a driver does outside NAPI stays as it is. Contexts whose driver excludes them from busy polling are left alone.
 */
#include "interfaces.h"

#include <linux/bottom_half.h>
#include <linux/filter.h>
#include <linux/netpoll.h>
#include <linux/rculist.h>
#include <linux/version.h>
#include <net/gro.h>
#include <trace/events/napi.h>

/* More than these are left to their interrupts. */
#define MAX_CONTEXTS 64

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 11, 0)
/* Later kernels keep here, for the time of a poll, what XDP programs redirect. */
struct bpf_net_context { };
static struct bpf_net_context *bpf_net_ctx_set(struct bpf_net_context *unused) { return NULL; }
static void bpf_net_ctx_clear(struct bpf_net_context *unused) { }
#endif

/* Of the thread. */
static struct napi_struct *owned[MAX_CONTEXTS];
static unsigned int owned_count;
static unsigned int seen_changes;

/* Whether traffic can come; if not, its driver may be about to stop the device. */
static bool is_up(const struct net_device *dev)
{
	return netif_running(dev) && netif_device_present(dev) && netif_carrier_ok(dev);
}

/* The interface of a context; NULL if it is polled no more. Called under RCU. */
static struct ivcpu_interface *interface_of(const struct napi_struct *context)
{
	struct ivcpu_interface *interface;

	ivcpu_for_each_interface(interface)
		if (context->dev && rcu_access_pointer(interface->dev) == context->dev)
			return interface;
	return NULL;
}

static void claim(struct napi_struct *context, const struct ivcpu_igbvf *vf)
{
	/* Looked at first: a failing attempt leaves a mark. */
	if (READ_ONCE(context->state) & (NAPIF_STATE_SCHED | NAPIF_STATE_DISABLE | NAPIF_STATE_NO_BUSY_POLL))
		return;
	if (owned_count == MAX_CONTEXTS || !napi_schedule_prep(context))
		return;
	set_bit(NAPI_STATE_IN_BUSY_POLL, &context->state);
	ivcpu_igbvf_mask(vf);
	owned[owned_count++] = context;
}

static void claim_all(void)
{
	struct napi_struct *context;
	struct ivcpu_interface *interface;

	rcu_read_lock();
	ivcpu_for_each_interface(interface) {
		struct net_device *dev = rcu_dereference(interface->dev);

		if (!dev || !is_up(dev))
			continue;
		list_for_each_entry_rcu(context, &dev->napi_list, dev_list)
			claim(context, &interface->vf);
	}
	rcu_read_unlock();
}

/* Leaves the context to the kernel, which polls it at once and turns its interrupt on if that finds nothing more. */
static void give_back(struct napi_struct *context)
{
	struct ivcpu_interface *interface;

	rcu_read_lock();
	interface = interface_of(context);
	/* Of an interface that is going down, the driver turns interrupts off. */
	if (interface && netif_running(context->dev) && netif_device_present(context->dev))
		ivcpu_igbvf_resume(&interface->vf);
	rcu_read_unlock();
	local_bh_disable();
	/* An interrupt while it was owned asks for no more than that poll. */
	clear_bit(NAPI_STATE_MISSED, &context->state);
	clear_bit(NAPI_STATE_IN_BUSY_POLL, &context->state);
	__napi_schedule(context);
	local_bh_enable();
}

/* What a driver does outside NAPI. */
static void attend(struct napi_struct *context)
{
	struct ivcpu_interface *interface;

	rcu_read_lock();
	interface = interface_of(context);
	if (interface) {
		/* The device interrupts all the same: its driver turned the interrupt on meanwhile, or it just does. */
		if (test_and_clear_bit(NAPI_STATE_MISSED, &context->state))
			ivcpu_igbvf_mask(&interface->vf);
		ivcpu_igbvf_reap(&interface->vf, context->dev);
	}
	rcu_read_unlock();
}

/* What napi_complete_done() leaves to a busy poller: packets held back to be merged or passed on together. */
static void pass_on(struct napi_struct *context)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 15, 0)
	struct napi_struct *held = context;
#else
	struct gro_node *held = &context->gro;
#endif
	LIST_HEAD(packets);

	napi_gro_flush(context, false);
	list_splice_init(&held->rx_list, &packets);
	held->rx_count = 0;
	netif_receive_skb_list(&packets);
}

/* Returns how many packets came. */
static int poll(struct napi_struct *context)
{
	struct bpf_net_context redirects, *used;
	void *netpoll;
	int work;

	attend(context);
	local_bh_disable();
	used = bpf_net_ctx_set(&redirects);
	netpoll = netpoll_poll_lock(context);
	work = context->poll(context, NAPI_POLL_WEIGHT);
	pass_on(context);
	netpoll_poll_unlock(netpoll);
	bpf_net_ctx_clear(used);
	local_bh_enable();
	ivcpu_count(&ivcpu_counts.napi_polls);
	return work;
}

/*
 * A number that changes when something is sent, which a poll does not count as work: what the driver counts itself,
 * and the bytes it reports for its byte queue limits.
 */
static unsigned long sent(const struct net_device *dev)
{
	unsigned long sum = READ_ONCE(dev->stats.tx_packets);
#ifdef CONFIG_BQL
	unsigned int queue;

	for (queue = 0; queue < READ_ONCE(dev->real_num_tx_queues); queue++)
		sum += READ_ONCE(netdev_get_tx_queue(dev, queue)->dql.num_completed);
#endif
	return sum;
}

static bool has_sent(void)
{
	struct ivcpu_interface *interface;
	bool any = false;

	rcu_read_lock();
	ivcpu_for_each_interface(interface) {
		struct net_device *dev = rcu_dereference(interface->dev);
		unsigned long now = dev ? sent(dev) : 0;

		any |= now != interface->sent;
		WRITE_ONCE(interface->sent, now);
	}
	rcu_read_unlock();
	return any;
}

/**
 * ivcpu_napi_serve() - polls each context of the chosen interfaces once
 *
 * Return: whether a packet came or was sent.
 */
bool ivcpu_napi_serve(void)
{
	unsigned int i, packets = 0;

	if (seen_changes != smp_load_acquire(&ivcpu_interface_changes)) {
		ivcpu_napi_release();
		seen_changes = smp_load_acquire(&ivcpu_interface_changes);
	}
	claim_all();
	for (i = 0; i < owned_count;) {
		if (napi_disable_pending(owned[i]) || !is_up(owned[i]->dev)) {
			give_back(owned[i]);
			owned[i] = owned[--owned_count];
		} else {
			packets += poll(owned[i++]);
		}
	}
	WRITE_ONCE(ivcpu_counts.napi_contexts, owned_count);
	WRITE_ONCE(ivcpu_counts.napi_packets, ivcpu_counts.napi_packets + packets);
	return packets || has_sent();
}

/**
 * ivcpu_napi_release() - gives all contexts back to their interrupts
 */
void ivcpu_napi_release(void)
{
	if (!owned_count)
		return;
	while (owned_count)
		give_back(owned[--owned_count]);
	WRITE_ONCE(ivcpu_counts.napi_contexts, 0);
	ivcpu_count(&ivcpu_counts.napi_sleeps);
}

/* The kernel polled a context. */
static void on_napi_poll(void *unused, struct napi_struct *context, int work, int budget)
{
	struct ivcpu_interface *interface;

	rcu_read_lock();
	interface = interface_of(context);
	if (interface && (work > 0 || sent(context->dev) != READ_ONCE(interface->sent)))
		ivcpu_poller_call(NULL);
	rcu_read_unlock();
}

/**
 * ivcpu_napi_init() - begins to see when the kernel polls
 *
 * Return: 0 or an error, which the log explains.
 */
int ivcpu_napi_init(void)
{
	int err;

	err = register_trace_napi_poll(on_napi_poll, NULL);
	if (err)
		pr_err("cannot see NAPI polls: error %d from register_trace_napi_poll()\n", -err);
	return err;
}

/**
 * ivcpu_napi_exit() - sees none any more
 */
void ivcpu_napi_exit(void)
{
	unregister_trace_napi_poll(on_napi_poll, NULL);
	tracepoint_synchronize_unregister();
}
