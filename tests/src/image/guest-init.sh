#!/bin/busybox sh
# First process of a guest: loads the drivers and hands the serial line, or the console that the kernel was told to use, to the lab's
# guest agent.
/bin/busybox --install -s /bin
export PATH=/usr/bin:/usr/sbin:/bin HOME=/ TMPDIR=/tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
while read -r module; do
    insmod $module || echo "lab: cannot load $module"
done < /load
# From here on only an emergency may write to the serial line.
dmesg -n 1
ip link set lo up

terminal=/dev/ttyS0
grep -q console=hvc0 /proc/cmdline && terminal=/dev/hvc0
/bin/ivcpu-lab guest < $terminal > $terminal 2> /tmp/agent.log || cat /tmp/agent.log
poweroff -f
