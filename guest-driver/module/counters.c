// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/* /sys/kernel/ivcpu: what the consumer is doing and did, one value a file. */
#include "ivcpu.h"

#include <linux/kobject.h>
#include <linux/sysfs.h>

static struct kobject *directory;

static ssize_t state_show(struct kobject *unused, struct kobj_attribute *attribute, char *page)
{
	return sysfs_emit(page, "%s\n", ivcpu_fifo_state());
}

static struct kobj_attribute state = __ATTR_RO(state);

#define COUNTER(name)										\
static ssize_t name##_show(struct kobject *unused, struct kobj_attribute *attribute, char *page)	\
{												\
	return sysfs_emit(page, "%llu\n", READ_ONCE(ivcpu_counts.name));			\
}												\
static struct kobj_attribute name = __ATTR_RO(name)

COUNTER(entries);
COUNTER(delivered);
COUNTER(wakeups);
COUNTER(rescans);
COUNTER(sleeps);
COUNTER(fallbacks);
COUNTER(ignored);
COUNTER(napi_polls);
COUNTER(napi_packets);
COUNTER(napi_sleeps);
COUNTER(napi_contexts);
COUNTER(napi_reaps);

static struct attribute *attributes[] = {
	&state.attr,
	&entries.attr,
	&delivered.attr,
	&wakeups.attr,
	&rescans.attr,
	&sleeps.attr,
	&fallbacks.attr,
	&ignored.attr,
	&napi_polls.attr,
	&napi_packets.attr,
	&napi_sleeps.attr,
	&napi_contexts.attr,
	&napi_reaps.attr,
	NULL
};

static const struct attribute_group group = { .attrs = attributes };

/**
 * ivcpu_counters_init() - shows the counters
 *
 * Return: 0 or an error.
 */
int ivcpu_counters_init(void)
{
	int err;

	directory = kobject_create_and_add("ivcpu", kernel_kobj);
	if (!directory)
		return -ENOMEM;
	err = sysfs_create_group(directory, &group);
	if (err)
		kobject_put(directory);
	return err;
}

/**
 * ivcpu_counters_exit() - hides them
 */
void ivcpu_counters_exit(void)
{
	kobject_put(directory);
}
