# Makes the Debian image: one file system with packages of one archive, and beside it the kernel and the initramfs that are
# in it. Runs as root in mount and PID namespaces of its own: whatever it mounts or starts is gone when it ends.
#
# ROOT      the tree, made here                 ARCHIVE   the package archive, a folder
# SUITE     the archive's suite                 PACKAGES  names, with commas, beside what every system has
# SERVICE   folder of the interrupt service     LABEL     the file system's name
# SIZE      the file system's size              OUT       folder for the result
set -eu

# Before the packages: the initramfs is given the checker of the root file system that fstab names.
mkdir -p "$ROOT/etc"
echo "LABEL=$LABEL / ext4 errors=remount-ro 0 1" > "$ROOT/etc/fstab"

# What the archive holds has been verified where it was downloaded.
"$DEBOOTSTRAP" --variant=minbase --no-check-gpg --merged-usr --arch=amd64 --include="$PACKAGES" \
    "$SUITE" "$ROOT" "file://$ARCHIVE"

# debootstrap leaves the packages, and names of the machine it ran on.
rm -f "$ROOT"/var/cache/apt/archives/*.deb "$ROOT"/var/lib/apt/lists/*_*
echo 'debian' > "$ROOT/etc/hostname"
printf '127.0.0.1 localhost debian\n::1 localhost\n' > "$ROOT/etc/hosts"
echo '# nameserver ADDRESS' > "$ROOT/etc/resolv.conf"
echo '# deb http://MIRROR/debian bookworm main' > "$ROOT/etc/apt/sources.list"
# Each VM's own, made at its first boot.
: > "$ROOT/etc/machine-id"

cat > "$ROOT/etc/systemd/network/80-any.network" << 'NETWORK'
[Match]
Type=ether

[Network]
DHCP=ipv4
LinkLocalAddressing=no
IPv6AcceptRA=no
NETWORK

# An emulated VM on a busy machine takes longer than a minute and a half to find its serial line.
mkdir -p "$ROOT/etc/systemd/system.conf.d"
printf '[Manager]\nDefaultDeviceTimeoutSec=10min\n' > "$ROOT/etc/systemd/system.conf.d/devices.conf"

# The guest's part of an IVCPU. Without the word `ivcpu.cpu=` on the kernel command line it does nothing.
install -m 755 "$SERVICE/ivcpu-irq" "$ROOT/usr/sbin/"
install -m 644 "$SERVICE/ivcpu-irq.service" "$ROOT/etc/systemd/system/"
install -m 644 "$SERVICE/90-ivcpu-irq.rules" "$ROOT/etc/udev/rules.d/"

inside() { chroot "$ROOT" /usr/bin/env -i PATH=/usr/sbin:/usr/bin "$@"; }
# root logs in on the serial line without a password. Nothing listens to the network.
inside passwd --quiet --delete root
inside systemctl --quiet enable ivcpu-irq.service systemd-networkd.service
inside systemctl --quiet disable systemd-networkd-wait-online.service
# Work in the background that an emulated VM's first boot, late by definition for all of them, would do at once; and
# e2scrub_reap, which removes snapshots of LVM volumes, of which there are none. All else is as Debian has it.
inside systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service

cp "$ROOT"/boot/vmlinuz-* "$OUT/vmlinuz"
cp "$ROOT"/boot/initrd.img-* "$OUT/initrd.img"
inside dpkg-query --show > "$OUT/packages"
"$MKE2FS" -q -t ext4 -L "$LABEL" -d "$ROOT" "$OUT/disk.img" "$SIZE"
