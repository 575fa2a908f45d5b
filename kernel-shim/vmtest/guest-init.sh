#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# First process of a guest: the host's root (9p, read-only) below a tmpfs, then one command, then power off.
# The kernel command line hands over VMTEST_DIR, a directory of the host with the files `command` and, if a
# directory is shared, `share`.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH

die() {
    echo "vmtest: guest: $*" >/dev/console
    echo o >/proc/sysrq-trigger
    sleep 10
    exit 1
}

mount -t tmpfs -o mode=0755 tmpfs /run || exit 1
mkdir -p /run/over/upper /run/over/work /run/root /run/vmtest
mount -t overlay -o lowerdir=/,upperdir=/run/over/upper,workdir=/run/over/work overlay /run/root || exit 1
root=/run/root
mount -t proc proc $root/proc || exit 1
mount -t proc proc /proc || exit 1
mount -t sysfs sysfs $root/sys || die "no sysfs"
mount -t devtmpfs devtmpfs $root/dev || die "no devtmpfs"
mount -t tmpfs -o mode=0755 tmpfs $root/run
mkdir -p $root/dev/pts $root/dev/shm $root/dev/mqueue $root/run/lock
mount -t devpts -o ptmxmode=0666,mode=0620 devpts $root/dev/pts
mount -t tmpfs tmpfs $root/dev/shm
mount -t mqueue mqueue $root/dev/mqueue
mount -t debugfs debugfs $root/sys/kernel/debug 2>/dev/null
mount -t cgroup2 cgroup2 $root/sys/fs/cgroup 2>/dev/null
ln -sf /proc/self/fd $root/dev/fd
ln -sf /proc/self/fd/0 $root/dev/stdin
ln -sf /proc/self/fd/1 $root/dev/stdout
ln -sf /proc/self/fd/2 $root/dev/stderr
[ -e $root/dev/ptmx ] || ln -sf pts/ptmx $root/dev/ptmx

# a real tmpfs, since overlayfs shows two device numbers for one mapped file; what of the work lies there stays
# visible
mkdir -p /run/old-tmp
mount --bind $root/tmp /run/old-tmp
mount -t tmpfs -o mode=1777 tmpfs $root/tmp
for kept in $(echo "$VMTEST_KEEP" | tr : ' '); do
    mkdir -p "$root/tmp/$kept"
    mount --bind "/run/old-tmp/$kept" "$root/tmp/$kept" || die "cannot keep /tmp/$kept"
done
mkdir -p $root/run/vmtest
cp "$VMTEST_DIR/command" $root/run/vmtest/command || die "no command in $VMTEST_DIR"
if [ -f "$VMTEST_DIR/share" ]; then
    share=$(cat "$VMTEST_DIR/share")
    mkdir -p "$root$share"
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none share "$root$share" || die "cannot mount share"
fi
ip link set lo up
hostname "${VMTEST_HOSTNAME:-guest}" 2>/dev/null

# the named ports of the virtio serial device; devtmpfs has made their nodes
for port in /sys/class/virtio-ports/vport* $root/sys/class/virtio-ports/vport*; do
    [ -f "$port/name" ] || continue
    case $(cat "$port/name") in
    vmtest.stdout) stdout=$root/dev/${port##*/} ;;
    vmtest.stderr) stderr=$root/dev/${port##*/} ;;
    vmtest.status) status=$root/dev/${port##*/} ;;
    esac
done
[ -n "$status" ] || die "no virtio serial ports"
exec 7>"$status" || die "cannot open $status"

chroot $root /usr/bin/setsid /bin/sh /run/vmtest/command </dev/null >"$stdout" 2>"$stderr"
echo "exit $?" >&7
exec 7>&-
echo o >/proc/sysrq-trigger
# the power goes off any moment; if process 1 ended before, the kernel would panic
while :; do sleep 10; done
