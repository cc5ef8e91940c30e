// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/*
 * Sees every device interrupt before its handler runs, through the kernel's own tracepoint.
 *
 * Why not a wrapper around virtqueue::callback: the callback is not called when the queue was served already, but
 * the interrupt still means that somebody waits for a sleeping consumer. And a wrapper would have to be taken out of
 * queues that others free and whose interrupts may be running. A tracepoint touches nobody's data.
 */
#include "ivcpu.h"

#include <linux/interrupt.h>
#include <linux/string.h>
#include <linux/tracepoint.h>

static struct tracepoint *handler_entry;

static void on_interrupt(void *unused, int irq, struct irqaction *action)
{
	ivcpu_affinity_handled(irq);
	if (ivcpu_interrupt_is_served(irq))
		ivcpu_poller_call(ivcpu_fifo_call);
	ivcpu_interfaces_interrupt(irq);
}

static void find(struct tracepoint *candidate, void *unused)
{
	if (!strcmp(candidate->name, "irq_handler_entry"))
		handler_entry = candidate;
}

/**
 * ivcpu_interrupts_init() - begins to see interrupts
 *
 * Return: 0 or an error, which the log explains.
 */
int ivcpu_interrupts_init(void)
{
	int err;

	for_each_kernel_tracepoint(find, NULL);
	if (!handler_entry) {
		pr_err("this kernel has no tracepoint irq_handler_entry (CONFIG_TRACEPOINTS); nothing could wake the IVCPU\n");
		return -EOPNOTSUPP;
	}
	err = tracepoint_probe_register(handler_entry, on_interrupt, NULL);
	if (err)
		pr_err("cannot see interrupts: error %d from tracepoint_probe_register()\n", -err);
	return err;
}

/**
 * ivcpu_interrupts_exit() - sees none any more
 */
void ivcpu_interrupts_exit(void)
{
	tracepoint_probe_unregister(handler_entry, on_interrupt, NULL);
	tracepoint_synchronize_unregister();
	/* One that was just being seen may have asked for it. */
	ivcpu_affinity_release();
}
