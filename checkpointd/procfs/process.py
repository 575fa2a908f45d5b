# SPDX-License-Identifier: Apache-2.0
"""Small files of /proc/PID: stat, status, task, comm, cmdline.

Functions raise OSError (ENOENT or ESRCH when the process is gone).

Source: proc_pid_stat(5), proc_pid_status(5).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Tells a process from any other that ever had its pid.

    `start_time` is in clock ticks since boot (field 22 of stat), `boot_id` the random id of this boot.
    """

    pid: int
    start_time: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class Stat:
    """The fields of /proc/PID/stat we use, by their names in proc_pid_stat(5)."""

    comm: str
    state: str
    ppid: int
    pgrp: int
    session: int
    flags: int
    num_threads: int
    starttime: int
    fields: tuple[str, ...]  # all from field 3 (state) on, fields[n] is field n + 3

    @property
    def processor(self) -> int:
        """The CPU it ran on last."""
        return int(self.fields[39 - 3])


PF_KTHREAD = 0x0020_0000
PF_EXITING = 0x0000_0004
PF_IO_WORKER = 0x10
PF_USER_WORKER = 0x4000
PF_MCE_PROCESS = 0x80
PF_MEMALLOC_NOIO = 0x8_0000
PF_LOCAL_THROTTLE = 0x10_0000
PF_MCE_EARLY = 0x0800_0000


def machine_check_policy(flags: int) -> int:
    """PR_MCE_KILL_LATE, _EARLY or _DEFAULT by the flags of stat, as prctl(PR_MCE_KILL_GET) tells a thread of itself.

    Source: Linux kernel/sys.c; the same bits since v2.6.33.
    """
    if not flags & PF_MCE_PROCESS:
        return 2
    return 1 if flags & PF_MCE_EARLY else 0


def is_io_flusher(flags: int) -> bool:
    """Did the thread call prctl(PR_SET_IO_FLUSHER)?  (Asking needs CAP_SYS_RESOURCE.)  Source: Linux kernel/sys.c."""
    both = PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE
    return flags & both == both


def is_kernel_worker(stat: Stat) -> bool:
    """Is this task a thread of the kernel's that only borrows the address space (io_uring, vhost)?

    Source: Linux include/linux/sched.h, PF_IO_WORKER and PF_USER_WORKER.
    """
    return bool(stat.flags & (PF_IO_WORKER | PF_USER_WORKER)) and not stat.flags & PF_KTHREAD


def parse_stat(text: bytes) -> Stat:
    """The comm may hold spaces and parentheses: it ends at the last ')'."""
    open_at, close_at = text.index(b"("), text.rindex(b")")
    rest = text[close_at + 2 :].decode("ascii").split()
    return Stat(
        comm=text[open_at + 1 : close_at].decode("utf-8", "surrogateescape"),
        state=rest[0],
        ppid=int(rest[1]),
        pgrp=int(rest[2]),
        session=int(rest[3]),
        flags=int(rest[6]),
        num_threads=int(rest[17]),
        starttime=int(rest[19]),
        fields=tuple(rest),
    )


def slurp(path: str) -> bytes:
    """All of a small file; a third of the time that open(2) by io or pathlib takes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = part = os.read(fd, 1 << 16)
        while part:
            part = os.read(fd, 1 << 16)
            text += part
        return text
    finally:
        os.close(fd)


def nr_threads(pid: int) -> int:
    """How many threads the kernel counts, those included that have exited and were not reaped yet."""
    return int(slurp(f"/proc/{pid}/task/{pid}/stat").rpartition(b")")[2].split(None, 18)[17])


def nr_pinned_kb(pid: int) -> int:
    """Memory that devices may write to, as far as its users count it (VmPin)."""
    found = _PINNED.search(slurp(f"/proc/{pid}/status"))
    return int(found[1]) if found else 0


def umask(pid: int) -> int:
    """Raises OSError."""
    found = _UMASK.search(slurp(f"/proc/{pid}/status"))
    assert found, "there since Linux 4.7"
    return int(found[1], 8)


def read_stat(pid: int, tid: int | None = None) -> Stat:
    where = f"/proc/{pid}/stat" if tid is None else f"/proc/{pid}/task/{tid}/stat"
    return parse_stat(slurp(where))


def parse_status(text: bytes) -> dict[str, str]:
    """Name to value, as printed."""
    lines = (line.partition(b":") for line in text.splitlines())
    return {
        key.decode("ascii"): value.strip().decode("utf-8", "surrogateescape")
        for key, sep, value in lines
        if sep
    }


def read_status(pid: int, tid: int | None = None) -> dict[str, str]:
    where = f"/proc/{pid}/status" if tid is None else f"/proc/{pid}/task/{tid}/status"
    return parse_status(slurp(where))


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def cgroups(pid: int) -> tuple[str, ...]:
    """`controllers:path` of each hierarchy it is in below the root, sorted; of version 2 no controllers are named.

    As seen from our own cgroup namespace; none where the kernel has no cgroups.  Source: cgroups(7).
    """
    try:
        lines = slurp(f"/proc/{pid}/cgroup").decode(errors="backslashreplace").splitlines()
    except FileNotFoundError:
        if os.path.exists(f"/proc/{pid}"):
            return ()
        raise
    found = [line.partition(":")[2] for line in lines]
    return tuple(sorted(one for one in found if not one.endswith(":/")))


def time_offsets(pid: int) -> tuple[int, int]:
    """What the process's time namespace adds to CLOCK_MONOTONIC and CLOCK_BOOTTIME, ns; (0, 0) without any.

    Those of its future children, if it has made a namespace for them.  Source: time_namespaces(7).
    """
    try:
        return parse_time_offsets(slurp(f"/proc/{pid}/timens_offsets"))
    except FileNotFoundError:
        if os.path.exists(f"/proc/{pid}"):
            return 0, 0  # a kernel without time namespaces
        raise


def parse_time_offsets(text: bytes) -> tuple[int, int]:
    """Lines of `monotonic SECONDS NANOSECONDS` and `boottime SECONDS NANOSECONDS`."""
    found = {}
    for line in text.splitlines():
        name, seconds, nanoseconds = line.split()
        found[name] = int(seconds) * 1_000_000_000 + int(nanoseconds)
    return found.get(b"monotonic", 0), found.get(b"boottime", 0)


_PINNED = re.compile(rb"^VmPin:\s+(\d+) kB$", re.MULTILINE)
_UMASK = re.compile(rb"^Umask:\t([0-7]+)$", re.MULTILINE)
_AUTOGROUP = re.compile(rb"^(/autogroup-\d+) nice (-?\d+)$", re.MULTILINE)


def autogroup(pid: int) -> tuple[str, int | None]:
    """(name, nice) of the group in which the scheduler puts a session; ("", None) where there is none.

    Source: sched(7), "The autogroup feature".
    """
    try:
        text = Path(f"/proc/{pid}/autogroup").read_bytes()
    except (
        FileNotFoundError
    ):  # a kernel without CONFIG_SCHED_AUTOGROUP; who is gone is noticed by the next that asks
        return "", None
    match = _AUTOGROUP.search(text)
    return (match[1].decode("ascii"), int(match[2])) if match else ("", None)


def identity(pid: int) -> ProcessIdentity:
    return ProcessIdentity(pid, read_stat(pid).starttime, boot_id())


def thread_ids(pid: int) -> list[int]:
    return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))


def children(pid: int) -> list[int]:
    """Children of all its threads, zombies too, in our pid namespace; none where the kernel has no list."""
    found: list[int] = []
    for tid in thread_ids(pid):
        try:
            text = slurp(f"/proc/{pid}/task/{tid}/children")
        except OSError:
            continue
        found += [int(word) for word in text.split()]
    return sorted(found)


def nr_resident_pages(pid: int) -> int:
    """By /proc/PID/statm, which counts in batches: some 64 pages a thread may be missing."""
    return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])


def nr_pool_pages(pid: int) -> int:
    """Pages of 4 KiB that lie in mapped pages of hugetlb pools, which do not count as resident."""
    return int(read_status(pid).get("HugetlbPages", "0 kB").split()[0]) // 4


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_bytes().rstrip(b"\n").decode("utf-8", "surrogateescape")


def cmdline(pid: int) -> list[str]:
    raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [part.decode("utf-8", "surrogateescape") for part in raw.rstrip(b"\0").split(b"\0")] if raw else []
