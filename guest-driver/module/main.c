// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/*
 * ivcpu.ko: one CPU, the IVCPU, polls for what devices would interrupt for: virtio completions in a FIFO region that
 * the host fills, and the NAPI contexts of network interfaces.
 * How the parts work together: ivcpu.h. What they agree on with the host: docs/fifo-abi.md.
 *
 * Here: parameters, load and unload, and the decision whether there is a consumer.
 */
#include "ivcpu.h"

#include <linux/cpuhotplug.h>
#include <linux/cpumask.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/reboot.h>
#include <linux/suspend.h>

static int cpu = -1;
module_param(cpu, int, 0444);
MODULE_PARM_DESC(cpu, "CPU that polls, the IVCPU; -1 = the last one that is online at load (default)");

module_param_named(poll_us, ivcpu_poll_us, uint, 0644);
MODULE_PARM_DESC(poll_us, "microseconds to poll without finding anything before sleeping (default 50)");

module_param_cb(poll, &ivcpu_interface_names, NULL, 0644);
MODULE_PARM_DESC(poll, "network interfaces to poll, such as eth1,eth2 (default none)");

/* What the thread polls, together. */
enum { NOTHING = 0, FIFO = 1, INTERFACES = 2 };

static DEFINE_MUTEX(lock);
static struct ivcpu_region *used;	/* the region, NULL if there is none */
static unsigned int polled;		/* NOTHING: there is no thread */
static bool cpu_is_up;
static bool going_down;			/* suspend or reboot is under way */

static int start_polling(unsigned int what)
{
	int err = 0;

	if (what & FIFO)
		err = ivcpu_queues_collect();
	if (err)
		return err;
	ivcpu_affinity_keep(cpu);
	err = ivcpu_poller_start(what & FIFO ? used : NULL, cpu);
	if (err) {
		ivcpu_affinity_release();
		ivcpu_queues_drop();
	}
	return err;
}

static void stop_polling(void)
{
	ivcpu_poller_stop();
	ivcpu_affinity_release();
	ivcpu_queues_drop();
}

static unsigned int wanted(void)
{
	unsigned int what = NOTHING;

	if (!cpu_is_up || going_down)
		return NOTHING;
	if (used && !READ_ONCE(used->lost) && ivcpu_queues_are_stable())
		what |= FIFO;
	if (ivcpu_interfaces_are_wanted())
		what |= INTERFACES;
	return what;
}

/* Called with the lock. */
static void settle(void)
{
	unsigned int what = wanted();
	int err;

	if (polled == what)
		return;
	if (polled)
		stop_polling();
	polled = NOTHING;
	if (!what)
		return;
	err = start_polling(what);
	if (err)
		pr_err("cannot start to poll: error %d; completions come as interrupts\n", -err);
	if (err && what == (FIFO | INTERFACES)) {
		what = INTERFACES;
		err = start_polling(what);
	}
	if (!err)
		polled = what;
}

/**
 * ivcpu_settle() - starts or stops the thread, as circumstances now ask for
 *
 * When it returns and something speaks against a consumer of the region, there is none, and no virtqueue is pointed to.
 */
void ivcpu_settle(void)
{
	mutex_lock(&lock);
	settle();
	mutex_unlock(&lock);
}

/**
 * ivcpu_use_region() - polls a region that a carrier found
 * @region: mapped and checked
 *
 * Return: 0, or -EBUSY if there is one in use already.
 */
int ivcpu_use_region(struct ivcpu_region *region)
{
	int err = 0;

	mutex_lock(&lock);
	if (used)
		err = -EBUSY;
	else
		used = region;
	settle();
	mutex_unlock(&lock);
	return err;
}

/**
 * ivcpu_leave_region() - the region is about to vanish; nothing touches it afterwards
 * @region: one that ivcpu_use_region() accepted
 */
void ivcpu_leave_region(struct ivcpu_region *region)
{
	mutex_lock(&lock);
	if (used == region) {
		used = NULL;
		settle();
		pr_info("the FIFO at %pa is left; completions come as interrupts\n", &region->address);
	}
	mutex_unlock(&lock);
}

static void set(bool *circumstance, bool value)
{
	mutex_lock(&lock);
	*circumstance = value;
	settle();
	mutex_unlock(&lock);
}

static int cpu_went_up(unsigned int which)
{
	if (which == cpu)
		set(&cpu_is_up, true);
	return 0;
}

static int cpu_goes_down(unsigned int which)
{
	if (which == cpu)
		set(&cpu_is_up, false);
	return 0;
}

static int on_suspend(struct notifier_block *unused, unsigned long event, void *data)
{
	switch (event) {
	case PM_SUSPEND_PREPARE:
	case PM_HIBERNATION_PREPARE:
	case PM_RESTORE_PREPARE:
		set(&going_down, true);
		break;
	case PM_POST_SUSPEND:
	case PM_POST_HIBERNATION:
	case PM_POST_RESTORE:
		set(&going_down, false);
		break;
	}
	return NOTIFY_DONE;
}

static struct notifier_block suspend_notifier = { .notifier_call = on_suspend };

static int on_reboot(struct notifier_block *unused, unsigned long event, void *data)
{
	set(&going_down, true);
	return NOTIFY_DONE;
}

static struct notifier_block reboot_notifier = { .notifier_call = on_reboot };

static int hotplug_state;

static int __init ivcpu_init(void)
{
	int err;

	if (cpu == -1)
		cpu = cpumask_last(cpu_online_mask);
	if (cpu < 0 || cpu >= nr_cpu_ids || !cpu_possible(cpu)) {
		pr_err("cpu=%d: this guest has no such CPU\n", cpu);
		return -EINVAL;
	}
	err = ivcpu_counters_init();
	if (err)
		return err;
	err = ivcpu_queues_init();
	if (err)
		goto no_queues;
	err = ivcpu_interrupts_init();
	if (err)
		goto no_interrupts;
	hotplug_state = cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, "ivcpu:online", cpu_went_up, cpu_goes_down);
	if (hotplug_state < 0) {
		err = hotplug_state;
		goto no_hotplug;
	}
	err = register_pm_notifier(&suspend_notifier);
	if (err)
		goto no_suspend;
	err = register_reboot_notifier(&reboot_notifier);
	if (err)
		goto no_reboot;
	err = ivcpu_napi_init();
	if (err)
		goto no_napi;
	err = ivcpu_interfaces_init();
	if (err)
		goto no_interfaces;
	err = ivcpu_regions_init();
	if (err)
		goto no_regions;
	if (!cpu_is_up)
		pr_info("CPU %d is not online; nothing is polled until it is\n", cpu);
	else if (!used && !ivcpu_interfaces_are_wanted())
		pr_info("no FIFO region yet; completions come as interrupts\n");
	return 0;

no_regions:
	ivcpu_interfaces_exit();
no_interfaces:
	ivcpu_napi_exit();
no_napi:
	unregister_reboot_notifier(&reboot_notifier);
no_reboot:
	unregister_pm_notifier(&suspend_notifier);
no_suspend:
	cpuhp_remove_state_nocalls(hotplug_state);
no_hotplug:
	ivcpu_interrupts_exit();
no_interrupts:
	ivcpu_queues_exit();
no_queues:
	ivcpu_counters_exit();
	return err;
}

static void __exit ivcpu_exit(void)
{
	/* Both gone, there is no thread, whatever the others report until they are gone. */
	ivcpu_regions_exit();
	ivcpu_interfaces_exit();
	ivcpu_napi_exit();
	unregister_reboot_notifier(&reboot_notifier);
	unregister_pm_notifier(&suspend_notifier);
	cpuhp_remove_state_nocalls(hotplug_state);
	ivcpu_interrupts_exit();
	ivcpu_queues_exit();
	ivcpu_counters_exit();
}

module_init(ivcpu_init);
module_exit(ivcpu_exit);
MODULE_DESCRIPTION("one CPU polls a FIFO of virtio completions, and network interfaces, instead of interrupts");
MODULE_VERSION(IVCPU_VERSION_STRING);
MODULE_LICENSE("Dual BSD/GPL");
