/* SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause */
/*
 * The consumer of the region with the kernel's accessors. The other side is the host, which is there on a kernel built
 * for one CPU too: so the virt_ barriers, not the smp_ ones.
 */
#ifndef CONSUMER_H
#define CONSUMER_H

#include <linux/atomic.h>
#include <linux/bitops.h>

#ifndef __LITTLE_ENDIAN
#error "the words of the FIFO region are little-endian"
#endif

#define IVCPU_LOAD32(p) virt_load_acquire(p)
#define IVCPU_LOAD64(p) virt_load_acquire(p)
#define IVCPU_STORE32(p, v) virt_store_release(p, v)
#define IVCPU_SWAP32(p, v) xchg(p, v)
#define IVCPU_OR64(p, v) ((void)atomic64_fetch_or((s64)(v), (atomic64_t *)(p)))
#define IVCPU_AND64(p, v) ((void)atomic64_fetch_and((s64)(v), (atomic64_t *)(p)))
#define IVCPU_FENCE() virt_mb()
#define IVCPU_LOWEST_BIT(v) ((u32)__ffs64(v))

#include "ivcpu_consumer.h"

#endif /* CONSUMER_H */
