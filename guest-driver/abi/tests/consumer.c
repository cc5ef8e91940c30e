/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The C consumer as a process of its own, fed by consumer.rs:
 *     consumer FIFO_FD BYTES CALL_FD SOURCES
 * Behind the region's BYTES lies a page: used counts (u32 a source) at 0, seen counts at 0x800, the number of
 * sleeps at 0xff8, "stop" at 0xffc. It sleeps after a random number of empty polls.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ivcpu_consumer.h"

static int fail(const char *what)
{
	fprintf(stderr, "C consumer: %s\n", what);
	return 1;
}

/* A header whose shape is hostile by the time of attaching: nothing is read behind the mapping, nothing written. */
static bool refuses_what_changed(size_t bytes)
{
	static const uint32_t shapes[][2] = { { IVCPU_MAX_RINGS, 4 }, { 2, 3 }, { 0, 4 }, { 2, 0 }, { ~0u, ~0u } };
	struct ivcpu_consumer consumer;
	bool refused = true;
	size_t i;

	for (i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
		uint32_t *header = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (header == MAP_FAILED)
			return false;
		header[IVCPU_RING_OFFSET_AT / 4] = IVCPU_HEADER_SIZE;
		header[IVCPU_RING_STRIDE_AT / 4] = IVCPU_RING_STRIDE;
		header[IVCPU_RINGS_AT / 4] = shapes[i][0];
		header[IVCPU_SOURCES_AT / 4] = shapes[i][1];
		refused &= !ivcpu_attach(&consumer, header, bytes, 1, 16) && !header[IVCPU_OWNER_AT / 4];
		munmap(header, bytes);
	}
	return refused;
}

int main(int argc, char **argv)
{
	struct ivcpu_completion completion;
	struct ivcpu_consumer consumer;
	uint32_t random = 1, sleeps = 0, empty = 0, limit = 0, sources;
	volatile uint32_t *used, *seen;
	volatile uint8_t *base;
	const char *problem;
	size_t bytes;
	int call;

	if (argc != 5)
		return fail("four arguments, please");
	bytes = strtoul(argv[2], NULL, 0);
	call = atoi(argv[3]);
	sources = atoi(argv[4]);
	base = mmap(NULL, bytes + 4096, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[1]), 0);
	if (base == MAP_FAILED)
		return fail("cannot map the region");
	problem = ivcpu_check(base, bytes);
	if (problem)
		return fail(problem);
	used = (volatile uint32_t *)(base + bytes);
	seen = used + 0x800 / 4;
	if (!refuses_what_changed(bytes))
		return fail("attached to a header that changed after the check");
	if (!ivcpu_attach(&consumer, base, bytes, getpid(), 16))
		return fail("cannot attach");

	for (;;) {
		uint32_t stop = __atomic_load_n(&used[0xffc / 4], __ATOMIC_ACQUIRE);

		if (ivcpu_poll(&consumer, &completion)) {
			uint32_t queue = completion.ring * sources + completion.source;

			if (completion.used_ring != (queue + 1ull) << 12)
				return fail("a completion names a wrong used ring");
			__atomic_store_n(&seen[queue], __atomic_load_n(&used[queue], __ATOMIC_RELAXED), __ATOMIC_RELEASE);
			empty = 0;
			continue;
		}
		if (stop)
			break;
		if (empty++ < limit)
			continue;
		random = random * 1664525u + 1013904223u;
		limit = (random >> 16) % 64;
		empty = 0;
		if (ivcpu_prepare_sleep(&consumer) == IVCPU_SLEEP_NOW) {
			uint64_t calls;

			if (read(call, &calls, sizeof(calls)) != sizeof(calls))
				return fail("cannot read the call");
			ivcpu_wake(&consumer);
			__atomic_store_n(&used[0xff8 / 4], ++sleeps, __ATOMIC_RELAXED);
		}
	}
	ivcpu_detach(&consumer);
	while (ivcpu_scan(&consumer, &completion))
		;
	return 0;
}
