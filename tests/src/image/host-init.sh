#!/bin/busybox sh
# First process of the emulated host: loads modules, makes the machine's root its own, starts the lab's agent.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do
    insmod $module || echo "lab: cannot load $module"
done < /load

# The machine's root is read-only; what a process needs to write is fresh memory.
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,ro,cache=loose machine /root9p
mount --bind /root9p /host
for folder in tmp run var/tmp; do
    [ -d /host/$folder ] && mount -t tmpfs tmpfs /host/$folder
done
while read -r folder; do
    mkdir -p "/host$folder" 2>/dev/null
    mount --bind "/root9p$folder" "/host$folder"
done < /visible
mount -t proc proc /host/proc
mount -t sysfs sysfs /host/sys
mount -t devtmpfs devtmpfs /host/dev
mkdir -p /dev/shm /dev/pts /dev/hugepages
mount -t tmpfs tmpfs /host/dev/shm
mount -t devpts -o ptmxmode=666 devpts /host/dev/pts
mount -t tracefs tracefs /host/sys/kernel/tracing
mount -t debugfs debugfs /host/sys/kernel/debug
mount -t cgroup2 cgroup2 /host/sys/fs/cgroup
mkdir -p /host/run/ivcpu-lab /host/run/netns
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none share /host/run/ivcpu-lab
ip link set lo up
hostname emulated-host

read -r agent < /agent
chroot /host "$agent" agent || echo "lab: the agent ended with status $?"
sync
poweroff -f
