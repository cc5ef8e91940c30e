// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/*
 * Which virtqueue a used ring belongs to, and how long that is true.
 *
 * Drivers make their queues in probe and free them in remove, in a probe that fails, and around suspend (main.c sees to
 * that one). From the bus's "is being bound" to "is bound" or "was not bound", and from "is being released" to "is
 * released", a device is moving. While one is, there is no consumer; nobody else frees a queue. ivcpu_queues_collect()
 * is called when none is moving and the next one that would is held back in the notifier.
 *
 * What is left is a queue reset by its own driver where the device offers VIRTIO_F_RING_RESET (ethtool -G, AF_XDP): the
 * queue stays, its ring is exchanged, and nobody is told. virtqueue::reset, looked at before each run, says so once the
 * device has stopped the queue and before the old ring is freed. A CPU held up between that look and the next for the
 * whole exchange reads an index in freed memory: at worst one callback too many, which the driver has switched off.
 */
#include "ivcpu.h"

#include <linux/module.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/virtio.h>
#include <linux/xarray.h>

static DEFINE_XARRAY(moving);		/* devices that are; by address, never followed */
static DEFINE_XARRAY(interrupts);	/* the served devices', by number */
static struct virtqueue **queues;
static unsigned int queue_count;

/* Matches no device. It is here because a registered driver knows its bus, which is not exported. */
static const struct virtio_device_id no_device[] = { { 0 } };

static int never_probed(struct virtio_device *unused)
{
	return -ENODEV;
}

static void never_removed(struct virtio_device *unused)
{
}

static struct virtio_driver bus_member = {
	.driver.name = KBUILD_MODNAME,
	.driver.owner = THIS_MODULE,
	.id_table = no_device,
	.probe = never_probed,
	.remove = never_removed,
};

/**
 * ivcpu_for_each_virtio() - calls a function for every virtio device
 * @each: returns 0 to go on
 *
 * Return: 0 or what stopped it.
 */
int ivcpu_for_each_virtio(int (*each)(struct device *dev, void *data))
{
	return bus_for_each_dev(bus_member.driver.bus, NULL, NULL, each);
}

/**
 * ivcpu_virtio_notify() - registers a notifier of the virtio bus
 * @notifier: may sleep
 *
 * Return: 0 or an error.
 */
int ivcpu_virtio_notify(struct notifier_block *notifier)
{
	return bus_register_notifier(bus_member.driver.bus, notifier);
}

/**
 * ivcpu_virtio_unnotify() - undoes ivcpu_virtio_notify()
 * @notifier: not running any more afterwards
 */
void ivcpu_virtio_unnotify(struct notifier_block *notifier)
{
	bus_unregister_notifier(bus_member.driver.bus, notifier);
}

static int on_bind(struct notifier_block *unused, unsigned long event, void *dev)
{
	switch (event) {
	case BUS_NOTIFY_BIND_DRIVER:
	case BUS_NOTIFY_UNBIND_DRIVER:
		/* The driver goes on when this returns; it must not unseen. */
		xa_store(&moving, (unsigned long)dev, xa_mk_value(0), GFP_KERNEL | __GFP_NOFAIL);
		break;
	case BUS_NOTIFY_BOUND_DRIVER:
	case BUS_NOTIFY_UNBOUND_DRIVER:
	case BUS_NOTIFY_DRIVER_NOT_BOUND:
		xa_erase(&moving, (unsigned long)dev);
		break;
	default:
		return NOTIFY_DONE;
	}
	ivcpu_settle();
	return NOTIFY_DONE;
}

static struct notifier_block bind_notifier = { .notifier_call = on_bind };

/* Waits for a probe or remove that began before the notifier was there. */
static int wait_for(struct device *dev, void *unused)
{
	device_lock(dev);
	device_unlock(dev);
	return 0;
}

/**
 * ivcpu_queues_init() - begins to watch virtio devices
 *
 * Return: 0 or an error.
 */
int ivcpu_queues_init(void)
{
	int err;

	err = register_virtio_driver(&bus_member);
	if (err)
		return err;
	err = ivcpu_virtio_notify(&bind_notifier);
	if (err) {
		unregister_virtio_driver(&bus_member);
		return err;
	}
	ivcpu_for_each_virtio(wait_for);
	return 0;
}

/**
 * ivcpu_queues_exit() - undoes ivcpu_queues_init()
 */
void ivcpu_queues_exit(void)
{
	ivcpu_virtio_unnotify(&bind_notifier);
	unregister_virtio_driver(&bus_member);
	xa_destroy(&moving);
}

/**
 * ivcpu_queues_are_stable() - whether no driver makes or frees queues
 *
 * Return: true if virtqueues may be pointed to.
 */
bool ivcpu_queues_are_stable(void)
{
	return xa_empty(&moving);
}

/* Counts a device's queues; notes them once there is room, and which interrupts are its. */
static int collect(struct device *dev, void *data)
{
	struct virtio_device *virtio = dev_to_virtio(dev);
	unsigned int *room = data;
	struct virtqueue *queue;
	struct pci_dev *pci;
	int vector, irq, err;

	/* Other transports may bring rings of their own, which have no address to ask for. */
	if (!dev->parent || !dev_is_pci(dev->parent) || list_empty(&virtio->vqs))
		return 0;
	spin_lock(&virtio->vqs_list_lock);
	virtio_device_for_each_vq(virtio, queue) {
		if (!queue->callback)
			continue;
		if (queue_count < *room)
			queues[queue_count] = queue;
		queue_count++;
	}
	spin_unlock(&virtio->vqs_list_lock);
	if (!*room)
		return 0;
	pci = to_pci_dev(dev->parent);
	for (vector = 0; (irq = pci_irq_vector(pci, vector)) > 0; vector++) {
		err = xa_err(xa_store(&interrupts, irq, xa_mk_value(0), GFP_KERNEL));
		if (err)
			return err;
	}
	return 0;
}

/**
 * ivcpu_queues_collect() - finds the virtqueues that can be served and the interrupts of their devices
 *
 * Called while ivcpu_queues_are_stable(), and with that kept so.
 *
 * Return: 0 or an error, with nothing collected.
 */
int ivcpu_queues_collect(void)
{
	unsigned int room = 0;
	int err;

	queue_count = 0;
	bus_for_each_dev(bus_member.driver.bus, NULL, &room, collect);
	room = queue_count;
	queue_count = 0;
	if (!room)
		return 0;
	queues = kcalloc(room, sizeof(*queues), GFP_KERNEL);
	if (!queues)
		return -ENOMEM;
	err = bus_for_each_dev(bus_member.driver.bus, NULL, &room, collect);
	queue_count = min(queue_count, room);
	if (err)
		ivcpu_queues_drop();
	return err;
}

/**
 * ivcpu_queues_drop() - forgets what ivcpu_queues_collect() found
 */
void ivcpu_queues_drop(void)
{
	xa_destroy(&interrupts);
	queue_count = 0;
	kfree(queues);
	queues = NULL;
}

/**
 * ivcpu_queue_of() - the virtqueue with this used ring
 * @used_ring: guest-physical address
 *
 * Return: the virtqueue, NULL if no device has it.
 */
struct virtqueue *ivcpu_queue_of(u64 used_ring)
{
	unsigned int i;

	for (i = 0; i < queue_count; i++)
		if (virtqueue_get_used_addr(queues[i]) == used_ring)
			return queues[i];
	return NULL;
}

/**
 * ivcpu_interrupt_is_served() - whether an interrupt is one of a device whose queues are served
 * @irq: its number; may be called in its handler
 *
 * Return: true if it is.
 */
bool ivcpu_interrupt_is_served(unsigned int irq)
{
	return xa_load(&interrupts, irq);
}
