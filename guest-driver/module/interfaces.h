/* SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause */
/* The network interfaces that are polled, and what is kept of each. */
#ifndef INTERFACES_H
#define INTERFACES_H

#include "ivcpu.h"

#include <linux/netdevice.h>
#include <linux/rcupdate.h>

#define IVCPU_MAX_INTERFACES 8

/**
 * struct ivcpu_interface - one of them; a place for one if dev is NULL
 * @dev: changed under RTNL, read under RCU
 * @vf: what of it is outside NAPI; valid while dev is seen under RCU
 * @sent: what ivcpu_napi_serve() last found to have been sent
 */
struct ivcpu_interface {
	struct net_device __rcu *dev;
	struct ivcpu_igbvf vf;
	unsigned long sent;
};

extern struct ivcpu_interface ivcpu_interfaces[IVCPU_MAX_INTERFACES];
extern unsigned int ivcpu_interface_changes;

#define ivcpu_for_each_interface(interface) \
	for (interface = ivcpu_interfaces; interface < ivcpu_interfaces + IVCPU_MAX_INTERFACES; interface++)

#endif /* INTERFACES_H */
