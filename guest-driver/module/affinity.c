// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/*
 * Keeps every device interrupt that can be moved on the IVCPU while there is a consumer.
 *
 * Drivers move them away: virtio-net spreads its queues' over all CPUs whenever their number changes or a CPU comes
 * or goes. An interrupt that is handled elsewhere is the sign of it, and all are moved back then; nothing looks
 * regularly. Those bound to one CPU (the timer) or managed by the kernel (NVMe, virtio-blk with a vector a queue) stay.
 */
#include "ivcpu.h"

#include <linux/cpumask.h>
#include <linux/interrupt.h>
#include <linux/irq.h>
#include <linux/irqnr.h>
#include <linux/rcupdate.h>
#include <linux/version.h>
#include <linux/workqueue.h>

#define NOWHERE (-1)

static int kept_on = NOWHERE;

static unsigned int interrupt_count(void)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
	return irq_get_nr_irqs();
#else
	return nr_irqs;
#endif
}

static bool is_movable(unsigned int irq, struct irq_data *data)
{
	return data && irq_has_action(irq) && irqd_can_balance(data) && !irqd_affinity_is_managed(data);
}

static void move_all(struct work_struct *unused)
{
	int cpu = READ_ONCE(kept_on);
	unsigned int irq;

	if (cpu == NOWHERE)
		return;
	for (irq = 0; irq < interrupt_count(); irq++) {
		struct irq_data *data;

		rcu_read_lock();	/* descriptors vanish with their devices */
		data = irq_get_irq_data(irq);
		if (is_movable(irq, data) && !cpumask_equal(irq_data_get_affinity_mask(data), cpumask_of(cpu)))
			irq_set_affinity(irq, cpumask_of(cpu));
		rcu_read_unlock();
	}
}

static DECLARE_DELAYED_WORK(moving_back, move_all);

/**
 * ivcpu_affinity_keep() - moves all interrupts to a CPU and keeps them there
 * @cpu: the IVCPU, online
 */
void ivcpu_affinity_keep(unsigned int cpu)
{
	WRITE_ONCE(kept_on, cpu);
	queue_delayed_work_on(cpu, system_wq, &moving_back, 0);
}

/**
 * ivcpu_affinity_release() - moves none any more; they stay where they are
 */
void ivcpu_affinity_release(void)
{
	WRITE_ONCE(kept_on, NOWHERE);
	cancel_delayed_work_sync(&moving_back);
}

/**
 * ivcpu_affinity_handled() - an interrupt is being handled on this CPU
 * @irq: its number
 */
void ivcpu_affinity_handled(unsigned int irq)
{
	int cpu = READ_ONCE(kept_on);

	if (cpu != NOWHERE && cpu != smp_processor_id() && is_movable(irq, irq_get_irq_data(irq)))
		/* A tick later: whoever moves one moves several. */
		queue_delayed_work_on(cpu, system_wq, &moving_back, 1);
}
