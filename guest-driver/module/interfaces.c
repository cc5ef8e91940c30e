// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/*
 * Which network interfaces are polled: those whose names the parameter "poll" lists, from their registration on.
 */
#include "interfaces.h"

#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/rtnetlink.h>
#include <linux/slab.h>
#include <linux/string.h>

struct ivcpu_interface ivcpu_interfaces[IVCPU_MAX_INTERFACES];
unsigned int ivcpu_interface_changes;	/* how often one came or went */

static DEFINE_MUTEX(names_lock);	/* taken before RTNL */
static char names[IVCPU_MAX_INTERFACES][IFNAMSIZ];	/* changed while no notifier reads them */
static unsigned int name_count;
static bool watching;			/* the notifier is there */
static bool initialized;

static bool is_chosen(const struct net_device *dev)
{
	unsigned int i;

	/* A name means one interface only in one network namespace; those without a device below do not interrupt. */
	if (!net_eq(dev_net(dev), &init_net) || !dev->dev.parent)
		return false;
	for (i = 0; i < name_count; i++)
		if (!strcmp(dev->name, names[i]))
			return true;
	return false;
}

/* Begins or ends to poll an interface. Called under RTNL. */
static void set_polled(struct net_device *dev, bool is_polled)
{
	struct ivcpu_interface *interface, *at = NULL;

	ivcpu_for_each_interface(interface) {
		struct net_device *other = rtnl_dereference(interface->dev);

		if (other == dev) {
			at = interface;
			break;
		}
		if (!other && !at)
			at = interface;
	}
	if (!at) {
		if (is_polled)
			pr_err("%s is not polled: %d others are already\n", dev->name, IVCPU_MAX_INTERFACES);
		return;
	}
	if (is_polled == (rtnl_dereference(at->dev) == dev))
		return;
	if (is_polled)
		ivcpu_igbvf_find(&at->vf, dev);
	rcu_assign_pointer(at->dev, is_polled ? dev : NULL);
	smp_store_release(&ivcpu_interface_changes, ivcpu_interface_changes + 1);
	if (is_polled) {
		pr_info("%s (%s) is polled\n", dev->name, dev_name(dev->dev.parent));
	} else {
		synchronize_rcu();
		/* The thread found it no more when it gave it back. */
		if (netif_running(dev))
			ivcpu_igbvf_resume(&at->vf);
		ivcpu_igbvf_forget(&at->vf);
	}
	/* The thread gives its contexts back, or claims the new ones. */
	ivcpu_poller_call(NULL);
}

static int on_interface(struct notifier_block *unused, unsigned long event, void *info)
{
	struct net_device *dev = netdev_notifier_info_to_dev(info);

	switch (event) {
	case NETDEV_REGISTER:
	case NETDEV_CHANGENAME:
		set_polled(dev, is_chosen(dev));
		break;
	case NETDEV_UNREGISTER:
		set_polled(dev, false);
		break;
	}
	return NOTIFY_DONE;
}

static struct notifier_block interface_notifier = { .notifier_call = on_interface };

/* Registering calls the notifier for each interface that is there; unregistering likewise. */
static int watch(void)
{
	int err = register_netdevice_notifier(&interface_notifier);

	watching = !err;
	return err;
}

static void unwatch(void)
{
	if (watching)
		unregister_netdevice_notifier(&interface_notifier);
	watching = false;
}

/* Splits a list of names with commas between them. */
static int parse(char *list, char (*into)[IFNAMSIZ])
{
	int count = 0;
	char *name;

	list = strim(list);
	while (*list && (name = strsep(&list, ","))) {
		if (count == IVCPU_MAX_INTERFACES) {
			pr_err("poll: more than %d interfaces\n", IVCPU_MAX_INTERFACES);
			return -E2BIG;
		}
		if (!dev_valid_name(name)) {
			pr_err("poll: \"%s\" can be no interface's name; wanted: poll=eth1,eth2\n", name);
			return -EINVAL;
		}
		strscpy(into[count++], name, IFNAMSIZ);
		if (!list)
			break;
	}
	return count;
}

static int names_set(const char *value, const struct kernel_param *unused)
{
	char parsed[IVCPU_MAX_INTERFACES][IFNAMSIZ] = {};
	char *list = kstrdup(value, GFP_KERNEL);
	int count, err = 0;

	if (!list)
		return -ENOMEM;
	count = parse(list, parsed);
	kfree(list);
	if (count < 0)
		return count;
	mutex_lock(&names_lock);
	unwatch();
	memcpy(names, parsed, sizeof(names));
	name_count = count;
	if (initialized) {
		err = count ? watch() : 0;
		ivcpu_settle();
	}
	mutex_unlock(&names_lock);
	return err;
}

static int names_get(char *page, const struct kernel_param *unused)
{
	unsigned int i;
	int length = 0;

	mutex_lock(&names_lock);
	for (i = 0; i < name_count; i++)
		length += sysfs_emit_at(page, length, "%s%s", i ? "," : "", names[i]);
	mutex_unlock(&names_lock);
	return length + sysfs_emit_at(page, length, "\n");
}

/* The parameter with the interfaces' names. */
const struct kernel_param_ops ivcpu_interface_names = { .set = names_set, .get = names_get };

/**
 * ivcpu_interfaces_are_wanted() - whether there are interfaces to poll, or names to wait for
 *
 * Return: true if so.
 */
bool ivcpu_interfaces_are_wanted(void)
{
	return READ_ONCE(initialized) && READ_ONCE(name_count);
}

/**
 * ivcpu_interfaces_interrupt() - an interrupt is here; wakes the thread if it is one that schedules no NAPI context
 * @irq: its number
 */
void ivcpu_interfaces_interrupt(unsigned int irq)
{
	struct ivcpu_interface *interface;

	rcu_read_lock();
	ivcpu_for_each_interface(interface)
		if (rcu_access_pointer(interface->dev) && ivcpu_igbvf_sends_by(&interface->vf, irq))
			ivcpu_poller_call(NULL);
	rcu_read_unlock();
}

/**
 * ivcpu_interfaces_init() - begins to look for the interfaces
 *
 * Return: 0 or an error.
 */
int ivcpu_interfaces_init(void)
{
	int err;

	mutex_lock(&names_lock);
	err = name_count ? watch() : 0;
	initialized = !err;
	mutex_unlock(&names_lock);
	ivcpu_settle();
	return err;
}

/**
 * ivcpu_interfaces_exit() - none is polled any more
 */
void ivcpu_interfaces_exit(void)
{
	mutex_lock(&names_lock);
	initialized = false;
	unwatch();
	mutex_unlock(&names_lock);
	ivcpu_settle();
}
