# SPDX-License-Identifier: Apache-2.0
"""Other processes that map the target's shared memory: relatives and strangers alike, they are not saved with it.

Memory without a name comes back as a copy of the target's own.  A segment or a file on a tmpfs is found again by
whoever restores it, and put back to what it was at the dump, for all who map it.  Neither can be helped by a dump of
one process, so it is told.

Looked for before the freeze, in the maps of every process that we may read, for a while only: a machine may have
thousands.  The kernel counts who maps a segment, also those that we may not look into.  A process that merely holds a
descriptor of such memory is not found.

Source: proc_pid_maps(5), shmctl(2) (shm_nattch), Linux ipc/shm.c (shm_open: each VMA counts).
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from checkpointd.linux.sysv import segments
from checkpointd.memory import Vma, VmaKind
from checkpointd.procfs import maps
from checkpointd.procfs.process import comm
from checkpointd.target.memory import key_of, on_tmpfs
from checkpointd.target.shared_objects import ObjectKey

_LIMIT_S = 0.25
_TOLD_ONE_BY_ONE = 3
_PROT_WRITE = 2
_SHARED_KINDS = (VmaKind.SHMEM, VmaKind.HUGETLB, VmaKind.FILE_SHARED)


_LineKey = tuple[tuple[int, int], int, bool]
"""What a line of maps tells of an object; the size of huge pages is in smaps only."""


@dataclass(frozen=True, slots=True)
class _Shared:
    """An object of shared memory as the target maps it."""

    key: ObjectKey
    line_key: _LineKey
    name: str
    writable: bool
    found_again: bool

    @property
    def needle(self) -> bytes:
        major, minor = self.key.dev
        return b" %02x:%02x %d " % (major, minor, self.key.inode)


def sharing_warnings(pid: int, vmas: Sequence[Vma], *, limit_s: float = _LIMIT_S) -> list[str]:
    """What will not be the same memory any more, one sentence each."""
    objects = _shared_objects(pid, vmas)
    if not objects:
        return []
    sharers, is_complete = _find(pid, objects, time.monotonic() + limit_s)
    for key in _attached_by_others(objects, vmas):
        sharers.setdefault(key, [])
    lost = {key: who for key, who in sharers.items() if not objects[key].found_again}
    kept = {key: who for key, who in sharers.items() if objects[key].found_again}
    warnings = []
    if lost:
        warnings.append(f"{_words(objects, lost)}: it will come back with a copy of its own")
    if kept:
        warnings.append(
            f"{_words(objects, kept)}: a restore will put it back to what it is now for them, too"
        )
    if not is_complete:
        warnings.append(
            "whether it shares memory with more processes is not known: there are too many to look at"
        )
    return warnings


def _shared_objects(pid: int, vmas: Iterable[Vma]) -> dict[ObjectKey, _Shared]:
    found: dict[ObjectKey, _Shared] = {}
    on_disk: set[tuple[int, int]] = set()
    for vma in vmas:
        if not vma.shared or vma.kind not in _SHARED_KINDS or vma.dev in on_disk:
            continue
        if vma.kind is VmaKind.FILE_SHARED and not on_tmpfs(pid, vma):
            on_disk.add(vma.dev)
            continue
        key = key_of(vma)
        is_named = vma.kind is VmaKind.FILE_SHARED and not vma.deleted
        if is_named and not (vma.prot & _PROT_WRITE or "mw" in vma.flags):
            continue  # what it can only read is only read in a restore, too
        known = found.get(key)
        found[key] = _Shared(
            key,
            _line_key(vma),
            name=vma.path.lstrip("/") or "anonymous",
            writable=bool(vma.prot & _PROT_WRITE) or (known is not None and known.writable),
            found_again=key.is_sysv or is_named,
        )
    return found


def _line_key(vma: Vma) -> _LineKey:
    return vma.dev, vma.inode, vma.path.startswith("/SYSV")


def _processes(near: int) -> list[int]:
    """All but us, those first that were born about when it was: relatives are among them."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return sorted((pid for pid in pids if pid not in (near, os.getpid())), key=lambda pid: abs(pid - near))


def _find(
    pid: int, objects: Mapping[ObjectKey, _Shared], deadline: float
) -> tuple[dict[ObjectKey, list[int]], bool]:
    """Who maps which object; False if there was no time for all processes."""
    needles = re.compile(b"|".join(re.escape(one.needle) for one in objects.values()))
    by_line = {one.line_key: one for one in objects.values()}
    found: dict[ObjectKey, list[int]] = {}
    for other in _processes(pid):
        if time.monotonic() > deadline:
            return found, False
        try:
            with open(f"/proc/{other}/maps", "rb", buffering=0) as file:
                text = file.readall()
        except OSError:
            continue  # it ended, or is not ours to look into
        if needles.search(text) is None:
            continue
        for vma in maps.parse_maps(text):
            one = by_line.get(_line_key(vma)) if vma.shared else None
            if one is None or not (one.writable or vma.prot & _PROT_WRITE):
                continue
            sharers = found.setdefault(one.key, [])
            if other not in sharers:
                sharers.append(other)
    return found, True


def _attached_by_others(objects: Mapping[ObjectKey, _Shared], vmas: Iterable[Vma]) -> list[ObjectKey]:
    """Segments that have more attachments than these."""
    keys = [key for key in objects if key.is_sysv]
    if not keys:
        return []
    own = Counter(key_of(vma) for vma in vmas if vma.shared)
    there = segments()
    return [key for key in keys if key.inode in there and there[key.inode].nr_attached > own[key]]


def _words(objects: Mapping[ObjectKey, _Shared], sharers: Mapping[ObjectKey, Sequence[int]]) -> str:
    pids = list(dict.fromkeys(pid for found in sharers.values() for pid in found))
    who = ", ".join(_describe(pid) for pid in pids[:_TOLD_ONE_BY_ONE]) or "another process"
    more = f" and {len(pids) - _TOLD_ONE_BY_ONE} more" if len(pids) > _TOLD_ONE_BY_ONE else ""
    names = list(dict.fromkeys(objects[key].name for key in sharers))
    what = ", ".join(names[:_TOLD_ONE_BY_ONE]) + (", ..." if len(names) > _TOLD_ONE_BY_ONE else "")
    return f"it shares memory ({what}) with {who}{more}, which a dump of it does not save"


def _describe(pid: int) -> str:
    try:
        return f"process {pid} ({comm(pid)})"
    except OSError:
        return f"process {pid}"
