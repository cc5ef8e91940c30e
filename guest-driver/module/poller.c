// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/*
 * The thread on the IVCPU: polls the FIFO and the chosen network interfaces in turn until it has found nothing for
 * poll_us, then gives both back to their interrupts and sleeps until one wakes it.
 */
#include "ivcpu.h"

#include <linux/cpumask.h>
#include <linux/err.h>
#include <linux/interrupt.h>
#include <linux/irqflags.h>
#include <linux/kthread.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/sched/task.h>
#include <linux/spinlock.h>
#include <linux/version.h>

/* RCU asks for more than this only after 100 ms. */
#define QUIESCENT_NS (32 * NSEC_PER_MSEC)

struct ivcpu_counts ivcpu_counts;
unsigned int ivcpu_poll_us = 50;

static DEFINE_RAW_SPINLOCK(call_lock);
static struct task_struct *thread;	/* NULL: nobody to call; changed under call_lock */

/* Sleeps unless there is something to do. A call from the first line on makes that short. */
static void sleep(void)
{
	set_current_state(TASK_IDLE);
	if (!kthread_should_stop() && ivcpu_fifo_prepare_sleep()) {
		ivcpu_napi_release();
		schedule();
		ivcpu_fifo_wake();
	}
	__set_current_state(TASK_RUNNING);
}

/* Lets others run, and RCU go on, also where no tick does it. */
static void breathe(u64 now)
{
	static u64 last;

	/*
	 * Bottom halves that took too long are ksoftirqd's now, which waits for this CPU: without giving it up, some
	 * 700 microseconds each time on 6.12.
	 */
	if (local_softirq_pending())
		yield();
	else
		cond_resched();
	if (now - last < QUIESCENT_NS)
		return;
	last = now;
	local_irq_disable();
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
	rcu_momentary_eqs();
#else
	rcu_momentary_dyntick_idle();
#endif
	local_irq_enable();
}

static int run(void *unused)
{
	u64 now, idle_since = local_clock();

	while (!kthread_should_stop()) {
		bool busy = ivcpu_fifo_serve();

		busy |= ivcpu_napi_serve();
		now = local_clock();
		if (busy)
			idle_since = now;
		else if (now - idle_since >= READ_ONCE(ivcpu_poll_us) * NSEC_PER_USEC || ivcpu_fifo_is_contended()) {
			sleep();
			idle_since = local_clock();
		}
		breathe(now);
		cpu_relax();
	}
	ivcpu_napi_release();
	ivcpu_fifo_leave();
	return 0;
}

/**
 * ivcpu_poller_start() - starts the thread
 * @region: the FIFO it polls beside the network interfaces; NULL: none
 * @cpu: the IVCPU, online
 *
 * Return: 0, or an error with the region's state "absent".
 */
int ivcpu_poller_start(struct ivcpu_region *region, unsigned int cpu)
{
	struct task_struct *task;
	int err;

	if (region) {
		err = ivcpu_fifo_attach(region, cpu);
		if (err)
			return err;
	}
	task = kthread_create_on_cpu(run, NULL, cpu, "ivcpu/%u");
	if (IS_ERR(task)) {
		ivcpu_fifo_leave();
		ivcpu_fifo_forget();
		return PTR_ERR(task);
	}
	get_task_struct(task);
	raw_spin_lock_irq(&call_lock);
	thread = task;
	raw_spin_unlock_irq(&call_lock);
	wake_up_process(task);
	return 0;
}

/**
 * ivcpu_poller_stop() - ends the thread; no virtqueue and no NAPI context is in use afterwards
 */
void ivcpu_poller_stop(void)
{
	struct task_struct *task = thread;

	raw_spin_lock_irq(&call_lock);
	thread = NULL;
	raw_spin_unlock_irq(&call_lock);
	kthread_stop(task);
	put_task_struct(task);
	ivcpu_fifo_forget();
}

/**
 * ivcpu_poller_call() - wakes the thread if there is one and it has something to do
 * @is_needed: asked then, with interrupts off; the answer is whether it has; NULL: it has
 */
void ivcpu_poller_call(bool (*is_needed)(void))
{
	unsigned long flags;

	raw_spin_lock_irqsave(&call_lock, flags);
	if (thread && (!is_needed || is_needed()))
		wake_up_process(thread);
	raw_spin_unlock_irqrestore(&call_lock, flags);
}
