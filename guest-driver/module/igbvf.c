// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/*
 * What igbvf (virtual functions of the 82576 and the I350) needs beside the polling of its one NAPI context.
 *
 * Receive: a device whose driver uses automatic masking sends one interrupt and no more until the driver asks for the
 * next. QEMU's emulated 82576 sends them on, so its interrupt is masked here when the context is claimed. Masking it in
 * the MSI-X table would not help a passed-through function: that does not reach the host's interrupt.
 *
 * Transmit: igbvf takes back what is sent in a hard interrupt of its own, which turns the interrupt on again. So that
 * interrupt is masked too, and its handler run from time to time instead, as the interrupt would: on the CPU it is bound
 * to, with interrupts off. In that moment the device may interrupt; what it latched before is cleared, and nothing can
 * be sent, so that it has hardly a reason. The driver frees its ring only after it got the context back, so the
 * handler is run only while that is owned.
 *
 * The registers take ones, for the bits to change: writing them disturbs nobody.
 */
#include "ivcpu.h"

#include <linux/device/driver.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/irq.h>
#include <linux/irqdesc.h>
#include <linux/netdevice.h>
#include <linux/pci.h>
#include <linux/sched/clock.h>
#include <linux/string.h>

/* In BAR 0: */
#define EIMS 0x1524	/* interrupt mask, set: may interrupt */
#define EIMC 0x1528	/* interrupt mask, clear: may not */
#define EICR 0x1580	/* causes; ones clear them */
#define REGISTERS_END 0x1584

/* igbvf's first and second vector. */
#define TRANSMIT BIT(0)
#define RECEIVE BIT(1)

/* How often the transmit ring is looked at while something is being sent, and otherwise. */
#define REAP_NS (200 * NSEC_PER_USEC)
#define REAP_IDLE_NS (10 * NSEC_PER_MSEC)

static const struct pci_device_id known[] = {
	{ PCI_VDEVICE(INTEL, 0x10ca) },	/* 82576 */
	{ PCI_VDEVICE(INTEL, 0x1520) },	/* I350 */
	{ }
};

/**
 * ivcpu_igbvf_find() - notes what is needed of an interface of igbvf
 * @vf: filled in; all zero if the interface is another driver's
 * @dev: the interface
 */
void ivcpu_igbvf_find(struct ivcpu_igbvf *vf, const struct net_device *dev)
{
	struct device *device = dev->dev.parent;

	*vf = (struct ivcpu_igbvf) { };
	if (!dev_is_pci(device) || !pci_match_id(known, to_pci_dev(device)) || strcmp(dev_driver_string(device), "igbvf"))
		return;
	vf->registers = ioremap(pci_resource_start(to_pci_dev(device), 0), REGISTERS_END);
	vf->irq = pci_irq_vector(to_pci_dev(device), 0);
}

/**
 * ivcpu_igbvf_forget() - undoes ivcpu_igbvf_find()
 * @vf: not in use any more
 */
void ivcpu_igbvf_forget(struct ivcpu_igbvf *vf)
{
	if (vf->registers)
		iounmap(vf->registers);
	vf->registers = NULL;
}

/**
 * ivcpu_igbvf_mask() - masks the receive interrupt, until the driver turns it on again
 * @vf: any interface's
 */
void ivcpu_igbvf_mask(const struct ivcpu_igbvf *vf)
{
	if (vf->registers)
		writel(RECEIVE, vf->registers + EIMC);
}

/**
 * ivcpu_igbvf_resume() - turns the transmit interrupt on; it comes at once if something was sent meanwhile
 * @vf: any interface's; the interface is up
 */
void ivcpu_igbvf_resume(const struct ivcpu_igbvf *vf)
{
	if (vf->registers)
		writel(TRANSMIT, vf->registers + EIMS);
}

static void run_handler(const struct ivcpu_igbvf *vf)
{
	struct irq_data *data = irq_get_irq_data(vf->irq);
	unsigned long flags;

	if (!data)
		return;
	local_irq_save(flags);
	if (cpumask_equal(irq_data_get_effective_affinity_mask(data), cpumask_of(smp_processor_id()))) {
		writel(TRANSMIT, vf->registers + EICR);
		handle_simple_irq(irq_data_to_desc(data));
		writel(TRANSMIT, vf->registers + EIMC);
		/* One that was still on its way to the CPU it was moved from came there meanwhile, and was put off. */
		if (irqd_irq_masked(data)) {
			disable_irq_nosync(vf->irq);
			enable_irq(vf->irq);
		}
		ivcpu_count(&ivcpu_counts.napi_reaps);
	} else {
		/* It is being moved here, or was just moved away: until it is back, it interrupts. */
		ivcpu_igbvf_resume(vf);
	}
	local_irq_restore(flags);
}

/**
 * ivcpu_igbvf_reap() - takes back what was sent, if it is time to
 * @vf: any interface's
 * @dev: the interface, whose context is owned; called under RCU
 */
void ivcpu_igbvf_reap(struct ivcpu_igbvf *vf, struct net_device *dev)
{
	struct netdev_queue *queue;
	u64 now;

	if (!vf->registers)
		return;
	queue = netdev_get_tx_queue(dev, 0);
	now = local_clock();
	/* The driver's note of when it sent last is a tick old at most. */
	if (now - vf->reaped < (time_before(READ_ONCE(queue->trans_start) + 2, jiffies) ? REAP_IDLE_NS : REAP_NS))
		return;
	local_bh_disable();
	if (__netif_tx_trylock(queue)) {
		vf->reaped = now;
		run_handler(vf);
		__netif_tx_unlock(queue);
	}
	local_bh_enable();
}

/**
 * ivcpu_igbvf_sends_by() - whether an interrupt is the transmit interrupt
 * @vf: any interface's
 * @irq: its number
 *
 * Return: true if it is.
 */
bool ivcpu_igbvf_sends_by(const struct ivcpu_igbvf *vf, unsigned int irq)
{
	return vf->registers && vf->irq == irq;
}
