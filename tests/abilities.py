# SPDX-License-Identifier: Apache-2.0
"""What this machine lets tests do, found by trying, never by version numbers.

``have("uffd_wp")`` asks; ``require("uffd_wp", "redis")`` skips the running test and names what is missing.
Tests are marked with ``@pytest.mark.needs("uffd_wp", "redis")``.  With ``CHECKPOINTD_REQUIRE=uffd_wp,redis`` in
the environment a missing ability of that list fails the test instead, so that a machine which ought to have it
cannot skip by mistake.

The probes share no code with checkpointd, so that a mistake there does not switch off the tests that would find it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import mmap
import os
import shutil
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from xxhash import _xxhash

REQUIRE = "CHECKPOINTD_REQUIRE"
PAGE = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def have(name: str) -> bool:
    """Does this machine have the ability?  Probed once.

    Raises:
        KeyError: no such ability.
    """
    return _probe(name)


def require(*names: str) -> None:
    """Skip the running test unless all are there (fail where the environment demands them)."""
    missing = [name for name in names if not have(name)]
    if missing:
        lacking(*missing)


def lacking(*missing: str, why: str = "") -> NoReturn:
    """Skip the running test for want of these (fail where the environment demands them)."""
    text = f"missing: {', '.join(missing)}" + (f" ({why})" if why else "")
    demanded = sorted(set(missing) & demanded_abilities())
    if demanded:
        pytest.fail(f"{text}; {REQUIRE} demands {', '.join(demanded)}", pytrace=False)
    pytest.skip(text)


def demanded_abilities() -> set[str]:
    """The names in CHECKPOINTD_REQUIRE.

    Raises:
        KeyError: one of them is no ability: a typing error must not demand nothing.
    """
    names = {name.strip() for name in os.environ.get(REQUIRE, "").split(",") if name.strip()}
    for name in names - set(ABILITIES):
        raise KeyError(f"{REQUIRE} names {name!r}; there are: {', '.join(sorted(ABILITIES))}")
    return names


def header() -> list[str]:
    """Each ability, on or off, for the head of the test report."""
    return ["abilities: " + ", ".join(f"{'' if have(name) else 'NO '}{name}" for name in ABILITIES)]


@functools.cache
def _probe(name: str) -> bool:
    try:
        return bool(ABILITIES[name]())
    except OSError:
        return False


def _syscall(number: int, *args: int) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(arg) for arg in args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"system call {number}")
    return result


def _ptrace() -> bool:
    """PTRACE_SEIZE and DETACH of a child."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        _syscall(101, 0x4206, child, 0, 0)  # PTRACE_SEIZE
        _syscall(101, 0x4207, child, 0, 0)  # PTRACE_INTERRUPT
        os.waitpid(child, 0x40000000)  # __WALL
        _syscall(101, 17, child, 0, 0)  # PTRACE_DETACH
        return True
    finally:
        os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def _tcp_md5() -> bool:
    """A key for one peer, by TCP_MD5SIG."""
    peer = struct.pack("=HH4s120x", socket.AF_INET, 0, socket.inet_aton("127.0.0.1"))
    with socket.socket() as probe:
        probe.setsockopt(6, 14, peer + struct.pack("=BBHi80s", 0, 0, 3, 0, b"key"))
    return True


def _realtime() -> bool:
    """A child may take a real-time priority (CAP_SYS_NICE or RLIMIT_RTPRIO), and need not share one CPU with others."""
    if len(os.sched_getaffinity(0)) < 2:
        return False
    child = os.fork()
    if child == 0:
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def cgroup_base() -> Path:
    """Where a cgroup can be made: of version 2, or of the hierarchy of version 1 that counts processes.

    Raises:
        FileNotFoundError: nowhere.
    """
    for base in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/pids")):
        if (base / "cgroup.procs").exists():
            return base
    raise FileNotFoundError("no cgroups are mounted")


def _cgroup() -> bool:
    """A cgroup can be made, and takes a process."""
    made = cgroup_base() / f"checkpointd-probe-{os.getpid()}"
    made.mkdir()
    child = os.fork()
    if child == 0:
        try:
            (made / "cgroup.procs").write_text(str(os.getpid()))
            Path(cgroup_base(), "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            os._exit(1)
        os._exit(0)
    try:
        return os.waitpid(child, 0)[1] == 0
    finally:
        made.rmdir()


def _memfd_secret() -> bool:
    os.close(_syscall(447, 0))
    return True


def _c_xxh3() -> bool:
    """A library with XXH3 in C that looks at the CPU (the package's own, Debian's), and memory to call it from."""
    if os.uname().machine != "x86_64":
        return False
    mmap.mmap(
        -1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_EXEC
    ).close()
    for library in (_xxhash.__file__, "libxxhash.so.0"):
        with contextlib.suppress(OSError):
            if hasattr(ctypes.CDLL(library), "XXH3_128bits_withSeed_dispatch"):
                return True
    return False


def _area() -> tuple[mmap.mmap, int]:
    area = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[0] = area[PAGE] = 1
    return area, ctypes.addressof(ctypes.c_char.from_buffer(area))


def _scan(pagemap: int, start: int, category: int) -> int:
    """Pages of [start, start + 2 pages) that PAGEMAP_SCAN says are of `category`."""
    regions = (ctypes.c_uint64 * 12)()
    argument = struct.pack(
        "12Q", 96, 0, start, start + 2 * PAGE, 0, ctypes.addressof(regions), 4, 0, 0, category, 0, category
    )
    found = fcntl.ioctl(pagemap, 0xC0606610, bytearray(argument))
    return sum((regions[3 * n + 1] - regions[3 * n]) // PAGE for n in range(found))


def _pagemap_scan() -> bool:
    _area_kept, at = _area()
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        return _scan(pagemap.fileno(), at, 1 << 3) == 2  # PRESENT


def _uffd_wp() -> bool:
    """Asynchronous write-protection end to end: registered, protected, written, seen."""
    area, at = _area()
    fd = _syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | 1)
    try:
        fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("3Q", 0xAA, 1 << 15 | 1 << 13, 0)))  # UFFDIO_API
        fcntl.ioctl(fd, 0xC020AA00, bytearray(struct.pack("4Q", at, 2 * PAGE, 2, 0)))  # REGISTER
        fcntl.ioctl(fd, 0xC018AA06, bytearray(struct.pack("3Q", at, 2 * PAGE, 1)))  # WRITEPROTECT
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            before = _scan(pagemap.fileno(), at, 1 << 1)  # WRITTEN
            area[PAGE] = 2
            return before == 0 and _scan(pagemap.fileno(), at, 1 << 1) == 1
    finally:
        os.close(fd)


def _holes_are_written() -> bool:
    """In memory registered for write protection an emptied page reads WRITTEN, and so does one never touched."""
    area, at = _area()
    fd = _syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | 1)
    try:
        fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("3Q", 0xAA, 1 << 15 | 1 << 13, 0)))  # UFFDIO_API
        fcntl.ioctl(fd, 0xC020AA00, bytearray(struct.pack("4Q", at, 4 * PAGE, 2, 0)))  # REGISTER
        fcntl.ioctl(fd, 0xC018AA06, bytearray(struct.pack("3Q", at, 2 * PAGE, 1)))  # WRITEPROTECT
        area.madvise(mmap.MADV_DONTNEED, PAGE, PAGE)
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            return [_scan(pagemap.fileno(), at + n * 2 * PAGE, 1 << 1) for n in range(2)] == [1, 2]  # WRITTEN
    finally:
        os.close(fd)


def _soft_dirty() -> bool:
    area, at = _area()
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("4")
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:

        def bit(page: int) -> int:
            return struct.unpack("Q", os.pread(pagemap.fileno(), 8, (at // PAGE + page) * 8))[0] >> 55 & 1

        area[0] = 3
        return bit(0) == 1 and bit(1) == 0


def _merge_barrier() -> bool:
    """A userfaultfd that can be registered for write protection."""
    area, at = _area()
    fd = _syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | 1)
    try:
        fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("3Q", 0xAA, 0, 0)))  # UFFDIO_API
        fcntl.ioctl(fd, 0xC020AA00, bytearray(struct.pack("4Q", at, 2 * PAGE, 2, 0)))  # REGISTER
        return len(area) > 0
    finally:
        os.close(fd)


def _precise() -> bool:
    return _syscall(157, 0x50534455, 0, 0, 0, 0) >= 0  # PR_GET_PRECISE_SOFTDIRTY


def _io_uring() -> bool:
    parameters = ctypes.create_string_buffer(120)  # kept: the kernel writes to it
    fd = _syscall(425, 4, ctypes.addressof(parameters))
    os.close(fd)
    return True


def _hugetlb() -> bool:
    """The pool of 2 MiB pages has some, or can be given some (tests/huge_pool.py does)."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    if int((pool / "free_hugepages").read_text()) - int((pool / "resv_hugepages").read_text()) >= 2:
        return True
    return os.access(pool / "nr_hugepages", os.W_OK)


def _transparent_huge() -> bool:
    """MADV_COLLAPSE makes a huge page."""
    area = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    at = ctypes.addressof(ctypes.c_char.from_buffer(area))
    start = at + (-at % (2 << 20))
    area[start - at] = 1
    return _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(2 << 20), 25) == 0


def _guard() -> bool:
    area, at = _area()
    if _libc.madvise(ctypes.c_void_p(at + 2 * PAGE), ctypes.c_size_t(PAGE), 102) != 0:
        return False
    return len(area) > 0


def _set_tid() -> bool:
    """May we choose pids (CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN)?"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            mask = int(line.split()[1], 16)
            return bool(mask >> 40 & 1 or mask >> 21 & 1)
    return False


def _keys() -> bool:
    """keyctl(KEYCTL_GET_KEYRING_ID) of our user's keyring; containers often forbid it."""
    return _syscall(250, 0, -4, 0) > 0


def _landlock() -> bool:
    """landlock_create_ruleset(LANDLOCK_CREATE_RULESET_VERSION)."""
    return _syscall(444, 0, 0, 1) > 0


def _program(*names: str) -> Callable[[], bool]:
    return lambda: all(
        shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") for name in names
    )


def _root() -> bool:
    return os.geteuid() == 0


ABILITIES: dict[str, Callable[[], bool]] = {
    "root": _root,
    "ptrace": _ptrace,
    "realtime": _realtime,
    "c_xxh3": _c_xxh3,
    "memfd_secret": _memfd_secret,
    "cgroup": _cgroup,
    "tcp_md5": _tcp_md5,
    "uffd_wp": _uffd_wp,
    "holes_are_written": _holes_are_written,
    "pagemap_scan": _pagemap_scan,
    "soft_dirty": _soft_dirty,
    "merge_barrier": _merge_barrier,
    "precise": _precise,
    "ksm": lambda: Path("/sys/kernel/mm/ksm/run").exists(),
    "set_tid": _set_tid,
    "keys": _keys,
    "landlock": _landlock,
    "io_uring": _io_uring,
    "hugetlb": _hugetlb,
    "guard": _guard,
    "transparent_huge": _transparent_huge,
    "gcc": _program("gcc"),
    "go": _program("go"),
    "redis": _program("redis-server"),
    "nginx": _program("nginx"),
    "memcached": _program("memcached"),
    "node": _program("node"),
    "java": _program("java", "javac"),
    "criu": _program("criu"),
    "chromium": _program("chromium"),
}
