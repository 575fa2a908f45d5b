# SPDX-License-Identifier: Apache-2.0
"""/proc/PID/maps and smaps as `Vma` values.

Parsers take bytes, so that recorded files test them.  `read_*` raise OSError (ENOENT, ESRCH: the process is
gone; EACCES: not ours to read); an empty file means a process without an address space (a kernel thread or a
zombie).

Source: proc_pid_maps(5), proc_pid_smaps(5); Linux fs/proc/task_mmu.c.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from checkpointd.memory import Vma, VmaKind
from checkpointd.procfs.process import slurp

_LINE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) (r|-)(w|-)(x|-)(p|s) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)[ ]*(.*)$",
    re.MULTILINE,
)
_POPULATED = re.compile(rb"\n(?:(?:Rss|Swap|Shared_Hugetlb|Private_Hugetlb): +[1-9]|VmFlags:.* ht)")
_ESCAPE = re.compile(rb"\\([0-7]{3})")
_POOL = re.compile(rb"^(?:Shared|Private)_Hugetlb: +([1-9]\d*) kB$", re.MULTILINE)
_PAGE_SIZE = re.compile(rb"^KernelPageSize:\s+(\d+) kB$", re.MULTILINE)
_KEY = re.compile(rb"^ProtectionKey:\s+([1-9]\d*)$", re.MULTILINE)
_DELETED = b" (deleted)"

# vm_flags of smaps that mark memory without struct pages behind it
_DEVICE_FLAGS = frozenset({"io", "pf"})
_HUGETLB_FLAG = "ht"


def read_maps(pid: int) -> list[Vma]:
    """All VMAs by /proc/PID/maps: `flags` stay empty, hugetlb and device mappings cannot be told."""
    with open(f"/proc/{pid}/maps", "rb") as file:
        return list(parse_maps(file.read()))


def read_smaps(pid: int) -> list[Vma]:
    """All VMAs with their VmFlags.  Walks the page tables: about 10 ns a page."""
    with open(f"/proc/{pid}/smaps", "rb") as file:
        return list(parse_smaps(file.read()))


@dataclass(frozen=True, slots=True)
class MapsDraft:
    """VMAs with their flags, read while the process ran, and the maps text they belong to."""

    text: bytes
    vmas: tuple[Vma, ...]


def prepare_vmas(pid: int) -> MapsDraft:
    """Read smaps (slow: it walks page tables) before a freeze; empty when the mappings will not hold still."""
    text = _read(pid, "maps")
    vmas = tuple(read_smaps(pid))
    return MapsDraft(text, vmas) if text == _read(pid, "maps") else MapsDraft(b"", ())


def settled_vmas(pid: int, draft: MapsDraft | None) -> tuple[Vma, ...]:
    """The VMAs of a process that stands still; the draft's when no mapping changed since.

    What maps does not show is advice (madvise flags): a whole VMA advised differently between the draft and the
    freeze keeps its old flags.  They steer restore's advice only; who relies on them for content reads smaps.
    """
    if draft is not None and draft.text and draft.text == _read(pid, "maps"):
        return draft.vmas
    return tuple(read_smaps(pid))


def _read(pid: int, name: str) -> bytes:
    return slurp(f"/proc/{pid}/{name}")


def parse_maps(text: bytes) -> Iterator[Vma]:
    """The VMAs of a maps file."""
    for match in _LINE.finditer(text):
        yield _vma(match, frozenset())


def parse_smaps(text: bytes) -> Iterator[Vma]:
    """The VMAs of an smaps file."""
    matches = list(_LINE.finditer(text))
    has_keys = _KEY.search(text) is not None
    for n, match in enumerate(matches):
        end = matches[n + 1].start() if n + 1 < len(matches) else len(text)
        at = text.find(b"\nVmFlags:", match.end(), end)
        line = text[at + 9 : text.find(b"\n", at + 1)] if at >= 0 else b""
        huge = text.find(b"\nAnonHugePages:", match.end(), end)
        huge_kib = int(text[huge + 15 : text.find(b"kB", huge)]) if huge >= 0 else 0
        key = _KEY.search(text, match.end(), end) if has_keys else None
        flags = frozenset(line.decode("ascii").split())
        size = _PAGE_SIZE.search(text, match.end(), end) if _HUGETLB_FLAG in flags else None
        yield _vma(match, flags, huge_kib << 10, int(key[1]) if key else 0, int(size[1]) << 10 if size else 0)


def read_populated(pid: int) -> list[tuple[int, int]]:
    """[start, end) of the VMAs that may hold pages, sorted.  Walks the page tables."""
    with open(f"/proc/{pid}/smaps", "rb") as file:
        return list(parse_populated(file.read()))


def parse_populated(text: bytes) -> Iterator[tuple[int, int]]:
    """The VMAs of an smaps file with anything in memory or in swap; hugetlb counts apart and is always given."""
    matches = list(_LINE.finditer(text))
    for n, match in enumerate(matches):
        end = matches[n + 1].start() if n + 1 < len(matches) else len(text)
        if _POPULATED.search(text, match.end(), end):
            yield int(match[1], 16), int(match[2], 16)


def read_pool_bytes(pid: int) -> dict[int, int]:
    """What is in memory, or is being moved there, of each mapping of a hugetlb pool, by its start."""
    with open(f"/proc/{pid}/smaps", "rb") as file:
        return parse_pool_bytes(file.read())


def parse_pool_bytes(text: bytes) -> dict[int, int]:
    """See `read_pool_bytes`, of an smaps file; mappings that hold none may be missing."""
    found: dict[int, int] = {}
    starts = [(match.start(), int(match[1], 16)) for match in _LINE.finditer(text)]
    for match in _POOL.finditer(text):
        address = starts[bisect.bisect(starts, (match.start(),)) - 1][1]
        found[address] = found.get(address, 0) + (int(match[1]) << 10)
    return found


def _vma(
    match: re.Match[bytes],
    flags: frozenset[str],
    huge_bytes: int = 0,
    protection_key: int = 0,
    pool_page_bytes: int = 0,
) -> Vma:
    start, end, r, w, x, sharing, offset, major, minor, inode, raw_path = match.groups()
    deleted = raw_path.endswith(_DELETED)
    if deleted:
        raw_path = raw_path[: -len(_DELETED)]
    # the kernel writes only newlines (and in some versions tabs, spaces, backslashes) as octal
    path = _ESCAPE.sub(lambda m: bytes((int(m[1], 8),)), raw_path).decode("utf-8", "surrogateescape")
    shared = sharing == b"s"
    dev = (int(major, 16), int(minor, 16))
    return Vma(
        start=int(start, 16),
        end=int(end, 16),
        prot=(r == b"r") | (w == b"w") << 1 | (x == b"x") << 2,
        shared=shared,
        offset=int(offset, 16),
        dev=dev,
        inode=int(inode),
        path=path,
        deleted=deleted,
        kind=_kind(path, shared, dev, deleted, flags),
        flags=flags,
        huge_bytes=huge_bytes,
        protection_key=protection_key,
        pool_page_bytes=pool_page_bytes,
    )


def _kind(path: str, shared: bool, dev: tuple[int, int], deleted: bool, flags: frozenset[str]) -> VmaKind:
    if path.startswith("["):
        if path == "[vdso]":
            return VmaKind.VDSO
        if path.startswith("[vvar"):
            return VmaKind.VVAR
        if path in ("[vsyscall]", "[uprobes]"):
            return VmaKind.VSYSCALL
        # [anon_shmem:NAME] is shared anonymous memory with a name (PR_SET_VMA_ANON_NAME)
        return VmaKind.SHMEM if shared else VmaKind.ANON
    if path.startswith("/secretmem"):
        return VmaKind.SECRETMEM
    if _HUGETLB_FLAG in flags or path.startswith("/anon_hugepage") or path.startswith("/memfd:hugepage"):
        return VmaKind.HUGETLB
    if _DEVICE_FLAGS & flags or path.startswith("anon_inode:"):
        return VmaKind.DEVICE
    if not path:
        return VmaKind.SHMEM if shared else VmaKind.ANON
    if shared and deleted and path.startswith(("/memfd:", "/SYSV", "/dev/zero")):
        return VmaKind.SHMEM
    if path == "/dev/zero" and not shared:
        return VmaKind.ANON
    return VmaKind.FILE_SHARED if shared else VmaKind.FILE_PRIVATE
