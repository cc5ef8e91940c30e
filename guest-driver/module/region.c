// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/*
 * Finds the FIFO region: BAR 2 of an ivshmem-plain function, or the range of a virtio-pmem device. The latter usually
 * has its own driver (virtio_pmem, nd_pmem), which is left alone; what is mapped here is mapped beside it.
 */
#include "ivcpu.h"
#include "consumer.h"

#include <linux/io.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <uapi/linux/virtio_pmem.h>
#ifdef CONFIG_X86
#include <asm/pgtable.h>
#endif

#define IVSHMEM_BAR 2
#define REGION_MAX (IVCPU_HEADER_SIZE + IVCPU_MAX_RINGS * (size_t)IVCPU_RING_STRIDE)

/*
 * Whether the kernel really mapped it write-back: polling uncached memory is slow, and the ABI excludes it. On x86
 * memremap() fails where MTRRs forbid write-back; a page attribute that differs all the same is refused here.
 */
static bool is_write_back(void *base)
{
#ifdef CONFIG_X86
	unsigned int level;
	pte_t *pte = lookup_address((unsigned long)base, &level);

	return pte && !(pte_flags(*pte) & (_PAGE_PWT | _PAGE_PCD));
#else
	return true;
#endif
}

/* Maps, checks and uses the region at address. Says in the log what is wrong. */
static struct ivcpu_region *region_at(phys_addr_t address, u64 length, const char *carrier, const char *name)
{
	struct ivcpu_region *region = kzalloc(sizeof(*region), GFP_KERNEL);
	const char *wrong;
	int err = -EINVAL;

	if (!region)
		return ERR_PTR(-ENOMEM);
	snprintf(region->carrier, sizeof(region->carrier), "%s %s", carrier, name);
	region->address = address;
	region->length = min_t(u64, length, REGION_MAX);
	if (region->length < IVCPU_HEADER_SIZE) {
		wrong = "smaller than a header";
		goto failed;
	}
	region->base = memremap(address, region->length, MEMREMAP_WB);
	if (!region->base || !is_write_back(region->base)) {
		wrong = "it cannot be mapped write-back; its carrier must lie where the MTRRs allow that";
		goto failed;
	}
	wrong = ivcpu_check(region->base, region->length);
	if (wrong)
		goto failed;
	err = ivcpu_use_region(region);
	if (err) {
		wrong = "another region is in use";
		goto failed;
	}
	return region;

failed:
	pr_warn("%s is not polled: %s\n", region->carrier, wrong);
	if (region->base)
		memunmap(region->base);
	kfree(region);
	return ERR_PTR(err);
}

static void forget(struct ivcpu_region *region)
{
	ivcpu_leave_region(region);
	memunmap(region->base);
	kfree(region);
}

static int ivshmem_probe(struct pci_dev *pci, const struct pci_device_id *unused)
{
	struct ivcpu_region *region;
	int err;

	err = pci_enable_device_mem(pci);
	if (err)
		return err;
	err = pci_request_region(pci, IVSHMEM_BAR, KBUILD_MODNAME);
	if (err)
		goto disable;
	region = region_at(pci_resource_start(pci, IVSHMEM_BAR), pci_resource_len(pci, IVSHMEM_BAR),
			   "ivshmem", pci_name(pci));
	if (IS_ERR(region)) {
		err = -ENODEV;
		goto release;
	}
	pci_set_drvdata(pci, region);
	return 0;

release:
	pci_release_region(pci, IVSHMEM_BAR);
disable:
	pci_disable_device(pci);
	return err;
}

static void ivshmem_remove(struct pci_dev *pci)
{
	forget(pci_get_drvdata(pci));
	pci_release_region(pci, IVSHMEM_BAR);
	pci_disable_device(pci);
}

static const struct pci_device_id ivshmem_ids[] = {
	{ PCI_DEVICE(PCI_VENDOR_ID_REDHAT_QUMRANET, 0x1110) },
	{ }
};
MODULE_DEVICE_TABLE(pci, ivshmem_ids);

static struct pci_driver ivshmem_driver = {
	.name = KBUILD_MODNAME,
	.id_table = ivshmem_ids,
	.probe = ivshmem_probe,
	.remove = ivshmem_remove,
};

static DEFINE_MUTEX(pmem_lock);
static struct device *pmem;		/* whose range is the region; NULL if none's is */
static struct ivcpu_region *pmem_region;

static int look_at_pmem(struct device *dev, void *unused)
{
	struct virtio_device *virtio = dev_to_virtio(dev);
	struct ivcpu_region *region;
	u64 start, size;

	if (virtio->id.device != VIRTIO_ID_PMEM)
		return 0;
	mutex_lock(&pmem_lock);
	if (dev != pmem) {
		virtio_cread_le(virtio, struct virtio_pmem_config, start, &start);
		virtio_cread_le(virtio, struct virtio_pmem_config, size, &size);
		region = region_at(start, size, "virtio-pmem", dev_name(dev));
		if (!IS_ERR(region)) {
			pmem_region = region;
			pmem = dev;
		}
	}
	mutex_unlock(&pmem_lock);
	return 0;
}

static void forget_pmem(struct device *dev)
{
	mutex_lock(&pmem_lock);
	if (pmem && dev == pmem) {
		forget(pmem_region);
		pmem = NULL;
	}
	mutex_unlock(&pmem_lock);
}

static int on_virtio_device(struct notifier_block *unused, unsigned long event, void *dev)
{
	switch (event) {
	case BUS_NOTIFY_ADD_DEVICE:
		look_at_pmem(dev, NULL);
		break;
	case BUS_NOTIFY_DEL_DEVICE:
		forget_pmem(dev);
		break;
	}
	return NOTIFY_DONE;
}

static struct notifier_block pmem_notifier = { .notifier_call = on_virtio_device };

/**
 * ivcpu_regions_init() - looks for regions, now and whenever a device appears
 *
 * Return: 0 or an error; that there is no region is none.
 */
int ivcpu_regions_init(void)
{
	int err;

	err = pci_register_driver(&ivshmem_driver);
	if (err)
		return err;
	err = ivcpu_virtio_notify(&pmem_notifier);
	if (err) {
		pci_unregister_driver(&ivshmem_driver);
		return err;
	}
	ivcpu_for_each_virtio(look_at_pmem);
	return 0;
}

/**
 * ivcpu_regions_exit() - leaves the region and looks for none any more
 */
void ivcpu_regions_exit(void)
{
	ivcpu_virtio_unnotify(&pmem_notifier);
	forget_pmem(pmem);
	pci_unregister_driver(&ivshmem_driver);
}
