# SPDX-License-Identifier: Apache-2.0
"""The process in which ``probe`` tries things out. Run by path, prints JSON, imports only ``switch``.

Every attempt works on an area of its own: a PROT_NONE reservation, in the middle of which mappings are made
with MAP_FIXED. So nothing else of this process, such as the heap, can become their neighbour.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = 4096
PROT_NONE, PROT_READ, PROT_RW = 0, 1, 3
MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 0x02, 0x10, 0x20, 0x4000
SYS_MMAP, SYS_MPROTECT, SYS_MREMAP, SYS_MADVISE, SYS_USERFAULTFD = 9, 10, 25, 28, 323
MREMAP_MAYMOVE_FIXED, MADV_NOHUGEPAGE = 3, 15
TABLE = 1 << 21
PM_SOFT_DIRTY = 1 << 55
# struct uffdio_api { u64 api, features, ioctls; }; struct uffdio_register { u64 start, len, mode, ioctls; }
UFFD_API, UFFDIO_API, UFFDIO_REGISTER = 0xAA, 0xC018AA3F, 0xC020AA00
UFFDIO_REGISTER_MODE_WP, UFFD_USER_MODE_ONLY = 2, 1

Finding = dict[str, object]


def _load_switch() -> Any:
    # by path: we run without site-packages, so that nothing of the user's environment takes part
    spec = importlib.util.spec_from_file_location("switch", Path(__file__).with_name("switch.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


switch = _load_switch()


def _map(vaddr: int, nr_pages: int) -> None:
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
    switch.raw_syscall(SYS_MMAP, vaddr, nr_pages * PAGE, PROT_RW, flags, (1 << 64) - 1, 0)


def _area() -> int:
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    start: int = switch.raw_syscall(SYS_MMAP, 0, 64 * PAGE, PROT_NONE, flags, (1 << 64) - 1, 0)
    return start + 16 * PAGE


def _protect(vaddr: int, nr_pages: int, prot: int) -> None:
    switch.raw_syscall(SYS_MPROTECT, vaddr, nr_pages * PAGE, prot)


def _write(vaddr: int, nr_pages: int = 1) -> None:
    for index in range(nr_pages):
        switch.poke(vaddr + index * PAGE, 77)


def _clear() -> None:
    with open("/proc/self/clear_refs", "wb", buffering=0) as file:
        file.write(b"4")


def _dirty(vaddr: int, nr_pages: int) -> str:
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        words = struct.unpack(f"{nr_pages}Q", os.pread(file.fileno(), 8 * nr_pages, vaddr // PAGE * 8))
    return "".join("D" if word & PM_SOFT_DIRTY else "." for word in words)


def soft_dirty() -> Finding:
    area = _area()
    _map(area, 4)
    _write(area, 4)
    seen = [_dirty(area, 4)]
    _clear()
    seen.append(_dirty(area, 4))
    _write(area + PAGE)
    seen.append(_dirty(area, 4))
    _clear()
    seen.append(_dirty(area, 4))
    works = seen == ["DDDD", "....", ".D..", "...."]
    if works:
        return {"works": True, "why": "a written page reads dirty, a cleared one clean"}
    why = (
        "this kernel has no soft-dirty tracking"
        if "D" not in "".join(seen)
        else "soft-dirty bits are unreliable"
    )
    return {"works": False, "why": f"{why} (seen {' '.join(seen)})"}


def _neighbour_stays_clean(prepare: Callable[[int, int], None]) -> str:
    """Map 4 pages next to 4 clean ones, the second of which was written; return what the 8 read then."""
    area = _area()
    _map(area, 4)
    _write(area, 4)
    _clear()
    prepare(area, 4 * PAGE)
    _write(area + PAGE)
    _map(area + 4 * PAGE, 4)
    return _dirty(area, 8)


def switch_works() -> Finding:
    try:
        before = switch.query()
        if before is None:
            return {"works": False, "why": "this kernel has no precise soft-dirty tracking"}
        switch.turn_on()
    except OSError as error:
        return {"works": False, "why": f"the switch for precise tracking fails: {error.strerror}"}
    seen = _neighbour_stays_clean(lambda start, size: None)
    switch.turn_off()
    if seen == ".D..DDDD":
        return {"works": True, "why": "the kernel keeps clean and new mappings apart"}
    return {"works": False, "why": f"the switch is there and has no effect (seen {seen})"}


def barrier_works() -> Finding:
    names = {
        errno.ENOSYS: "this kernel has no userfaultfd",
        errno.EPERM: "no permission for userfaultfd",
        errno.EINVAL: "userfaultfd cannot write-protect anonymous memory here",
    }
    try:
        try:
            fd = switch.raw_syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | UFFD_USER_MODE_ONLY)
        except OSError as error:
            # before 5.11 the flag is unknown
            if error.errno != errno.EINVAL:
                raise
            fd = switch.raw_syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("3Q", UFFD_API, 0, 0)))

        def register(start: int, size: int) -> None:
            request = bytearray(struct.pack("4Q", start, size, UFFDIO_REGISTER_MODE_WP, 0))
            fcntl.ioctl(fd, UFFDIO_REGISTER, request)

        seen = _neighbour_stays_clean(register)
        os.close(fd)
    except OSError as error:
        return {"works": False, "why": names.get(error.errno or 0, f"userfaultfd fails: {error.strerror}")}
    if seen == ".D..DDDD":
        return {"works": True, "why": "a userfaultfd keeps clean and new mappings apart"}
    return {"works": False, "why": f"a userfaultfd is no merge barrier here (seen {seen})"}


def keeps_writes() -> Finding:
    """The sequence which makes stock kernels lose writes: two merges, the second with a clean neighbour."""
    first = _area()
    area = first + 4 * PAGE
    _map(first, 8)
    _write(first, 8)
    _protect(first, 4, PROT_READ)
    _clear()
    _map(area + 4 * PAGE, 4)
    _protect(area, 8, PROT_NONE)
    _protect(area, 8, PROT_RW)
    _write(area, 4)
    _protect(first, 4, PROT_RW)
    seen = _dirty(area, 4)
    if seen == "DDDD":
        return {"works": True, "why": "merging mappings loses no write"}
    return {"works": False, "why": f"merging mappings makes written pages read clean (seen {seen})"}


def marks_moves() -> Finding:
    """Move a whole page table of clean pages, with precise tracking on where there is any."""
    precise = switch.query() is not None
    if precise:
        switch.turn_on()
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    reserved: int = switch.raw_syscall(SYS_MMAP, 0, 5 * TABLE, PROT_NONE, flags, (1 << 64) - 1, 0)
    source = -(-reserved // TABLE) * TABLE
    target = source + 2 * TABLE
    _map(source, TABLE // PAGE)
    switch.raw_syscall(SYS_MADVISE, source, TABLE, MADV_NOHUGEPAGE)
    _write(source, 4)
    _clear()
    switch.raw_syscall(SYS_MREMAP, source, TABLE, TABLE, MREMAP_MAYMOVE_FIXED, target)
    seen = _dirty(target, 4)
    if precise:
        switch.turn_off()
    if seen == "DDDD":
        return {"works": True, "why": "pages that mremap moves read dirty"}
    return {"works": False, "why": f"mremap moves page tables, and their pages read clean (seen {seen})"}


def main() -> None:
    no = {"works": False, "why": "this kernel has no soft-dirty tracking"}
    if switch.query():
        # inherited, or the system's default: it would make everything else look better than it is
        switch.turn_off()
    report = {"soft_dirty": soft_dirty(), "switch": no, "barrier": no, "keeps_writes": no, "marks_moves": no}
    if report["soft_dirty"]["works"]:
        # the switch decides for good what a child process starts with, so it comes last
        report |= {"keeps_writes": keeps_writes(), "barrier": barrier_works(), "switch": switch_works()}
        report["marks_moves"] = marks_moves()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
