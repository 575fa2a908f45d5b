# SPDX-License-Identifier: Apache-2.0
"""State out: the address space of a frozen target, without page contents.

Shared memory is found once per object (`ObjectKey`), whether it is mapped or only held open; its content
is read through a descriptor of ours (`SharedSource.open`), never through the target.

Source: proc_pid_map_files(5), proc_pid_fd(5), /proc/sysvipc/shm in proc(5).
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from checkpointd.linux import pagemap_scan as ps
from checkpointd.linux.statfs import pool_page_bytes
from checkpointd.linux.sysv import Segment, segments
from checkpointd.memory import NO_RUNS, PAGE_SHIFT, PAGE_SIZE, Runs, Vma, VmaKind, merge_runs
from checkpointd.procfs import maps
from checkpointd.state.memory import AddressSpace, FileIdentity, SharedObject, VmaState
from checkpointd.target.extents import all_data_extents
from checkpointd.target.policies import NO_POLICIES, Policies
from checkpointd.target.pool_objects import held_pages
from checkpointd.target.shared_objects import ObjectKey, pool_device, shared_memory_device

F_GET_SEALS = 1034
_SYSV_PATH = re.compile(r"/SYSV[0-9a-f]{8}$")
_NO_SEGMENT = Segment(key=0, mode=0o600, size_bytes=0, uid=0, gid=0)
_SHIFT = np.uint64(PAGE_SHIFT)
_MEMFD_LINK = re.compile(r"^/memfd:(.*?)(?: \(deleted\))?$")


@dataclass(frozen=True, slots=True)
class SharedSource:
    """Where the content of a shared object can be read while the target is frozen."""

    object: SharedObject
    path: str  # under /proc/PID: opens the object itself
    last_page_at: int = 0
    """Where the target maps its last page, if the object ends within that; its file cannot be read behind the end."""


@dataclass(frozen=True, slots=True)
class CapturedSpace:
    """The address space, and what the dump needs besides."""

    space: AddressSpace
    sources: tuple[SharedSource, ...]
    object_ids: dict[ObjectKey, int]
    read_whole: tuple[Vma, ...]
    """Private mappings of deleted files: every page is saved and they come back as anonymous memory."""


def huge_runs(pid: int, vmas: Sequence[Vma]) -> Runs:
    """Which memory lies in transparent huge pages though the program did not ask for it.

    Best effort, for use before a freeze: it only steers how restore allocates.  NO_RUNS where the kernel does not tell.
    """
    wanted = [vma for vma in vmas if vma.kind is VmaKind.ANON and vma.huge_bytes and "hg" not in vma.flags]
    if not wanted:
        return NO_RUNS
    found = [NO_RUNS]
    try:
        pagemap = ps.open_pagemap(pid)
        try:
            for vma in wanted:
                regions = ps.scan(pagemap, vma.start, vma.end, mask=ps.PAGE_IS_HUGE)
                firsts = regions[:, 0] >> _SHIFT
                found.append(np.stack((firsts, (regions[:, 1] >> _SHIFT) - firsts), axis=1))
        finally:
            os.close(pagemap)
    except OSError:
        return NO_RUNS
    return merge_runs(np.concatenate(found))


@dataclass(frozen=True, slots=True)
class SpaceDraft:
    """Mappings described before the freeze, none of them of shared memory (whose size may change in between).

    Attributes:
        files: of what they are mappings; each is looked at again in the freeze.
        whole: see `CapturedSpace.read_whole`.
    """

    vmas: Sequence[Vma]
    states: tuple[VmaState, ...]
    files: tuple[FileIdentity, ...]
    whole: tuple[Vma, ...]

    def holds(self, pid: int, vmas: Sequence[Vma]) -> bool:
        """Is it of these mappings, and are their files as they were?"""
        if vmas is not self.vmas:
            return False
        first: dict[int, Vma] = {}
        mapped = (vma for vma in vmas if vma.kind is not VmaKind.VSYSCALL)
        for state, vma in zip(self.states, mapped, strict=True):
            if state.file is not None:
                first.setdefault(state.file, vma)
        return all(_identity(pid, vma) == self.files[n] for n, vma in first.items())


def prepare_address_space(
    pid: int, vmas: Sequence[Vma], huge: Runs = NO_RUNS, policies: Policies = NO_POLICIES
) -> SpaceDraft | None:
    """Describe the mappings of a running target; None where that cannot be kept.

    Describing takes 5 to 10 us a mapping, for which the target would stand still.

    Args:
        vmas, huge, policies: as for `capture_address_space`; its `vmas` must be the very same, known to be unchanged.
    """
    objects = _Objects(pid)
    try:
        states, files, whole = _describe(pid, vmas, objects, NO_RUNS, huge, policies)
    except OSError:
        return None
    return None if objects.sources else SpaceDraft(vmas, states, files, whole)


def capture_address_space(
    pid: int,
    vmas: Sequence[Vma],
    guards: Runs,
    huge: Runs = NO_RUNS,
    policies: Policies = NO_POLICIES,
    draft: SpaceDraft | None = None,
) -> CapturedSpace:
    """The frozen target's mappings.

    Args:
        huge: of `huge_runs`.
        policies: of `prepare_policies`.
        draft: of `prepare_address_space`.

    Raises:
        OSError: a mapping's file cannot be looked at (needs CAP_CHECKPOINT_RESTORE for deleted ones).
    """
    objects = _Objects(pid)
    if draft is not None and len(guards) == 0 and draft.holds(pid, vmas):
        states, files, whole = draft.states, draft.files, draft.whole
    else:
        states, files, whole = _describe(pid, vmas, objects, guards, huge, policies)
    objects.add_open_memfds()
    sources = tuple(_with_last_page(source, states) for source in objects.sources)
    space = AddressSpace(states, files, tuple(source.object for source in sources), own_vdso())
    return CapturedSpace(space, sources, objects.ids, whole)


def _describe(
    pid: int, vmas: Sequence[Vma], objects: _Objects, guards: Runs, huge: Runs, policies: Policies
) -> tuple[tuple[VmaState, ...], tuple[FileIdentity, ...], tuple[Vma, ...]]:
    """The mappings, the files they are of, and those to be read whole; shared memory goes into `objects`."""
    files: list[FileIdentity] = []
    file_index: dict[tuple[str, int], int] = {}
    states: list[VmaState] = []
    whole: list[Vma] = []
    for vma in vmas:
        if vma.kind is VmaKind.VSYSCALL:
            continue
        kind, file, obj = vma.kind, None, None
        if kind is VmaKind.SHMEM or (kind is VmaKind.HUGETLB and not _is_private_anonymous(vma)):
            obj = objects.of_vma(vma)
        elif kind is VmaKind.FILE_SHARED and on_tmpfs(pid, vma):
            kind, obj = VmaKind.SHMEM, objects.of_vma(vma)
        elif kind is VmaKind.FILE_PRIVATE and vma.path.startswith("/memfd:"):
            obj = objects.of_vma(vma)
        elif kind is VmaKind.FILE_PRIVATE and vma.deleted:
            kind = VmaKind.ANON
            whole.append(vma)
        elif kind in (VmaKind.FILE_PRIVATE, VmaKind.FILE_SHARED):
            key = (vma.path, vma.inode)
            if key not in file_index:
                file_index[key] = len(files)
                files.append(_identity(pid, vma))
            file = file_index[key]
        states.append(
            VmaState(
                start=vma.start,
                end=vma.end,
                prot=vma.prot,
                shared=vma.shared,
                offset=vma.offset,
                kind=kind,
                path=vma.path,
                flags=vma.flags,
                file=file,
                object=obj,
                guards=_cut(vma, guards),
                huge=_cut(vma, huge),
                pool_page_bytes=vma.pool_page_bytes,
                policy=policies.at(vma.start),
            )
        )
    return tuple(states), tuple(files), tuple(whole)


def _with_last_page(source: SharedSource, vmas: Sequence[VmaState]) -> SharedSource:
    one = source.object
    if one.hugetlb or one.size_bytes % PAGE_SIZE == 0:
        return source
    last = one.size_bytes // PAGE_SIZE * PAGE_SIZE
    for vma in vmas:
        if vma.object == one.id and vma.shared and vma.offset <= last < vma.offset + vma.end - vma.start:
            return replace(source, last_page_at=vma.start + last - vma.offset)
    return source


def _is_private_anonymous(vma: Vma) -> bool:
    """Of mappings of a hugetlb pool: made with MAP_PRIVATE and MAP_ANONYMOUS?  The kernel gives each a file."""
    return not vma.shared and vma.path.startswith("/anon_hugepage")


def held_by(pid: int, sources: Sequence[SharedSource], vmas: Sequence[Vma]) -> list[Runs]:
    """Page runs of each shared object that hold data.

    Args:
        vmas: all mappings of the target.

    Raises:
        OSError: one cannot be opened (any more).
    """
    plain = [source for source in sources if not source.object.hugetlb]
    extents = iter(all_data_extents([(source.path, source.object.size_bytes) for source in plain]))
    return [
        _held_of_pool(pid, source, vmas) if source.object.hugetlb else next(extents) for source in sources
    ]


def _held_of_pool(pid: int, source: SharedSource, vmas: Sequence[Vma]) -> Runs:
    one = source.object
    key = ObjectKey(one.dev, one.inode, one.flavour == "sysv")
    mapped = [vma for vma in vmas if vma.kind is VmaKind.HUGETLB and key_of(vma) == key]
    fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return held_pages(pid, fd, one.pool_page_bytes, mapped)
    finally:
        os.close(fd)


@functools.cache
def own_vdso() -> bytes:
    """The vdso's bytes as this kernel maps them (kept: they never change).

    Ours, not the target's: the target's copy may hold traces of an injection that died.
    """
    for vma in maps.read_maps(os.getpid()):
        if vma.kind is VmaKind.VDSO:
            with open("/proc/self/mem", "rb", buffering=0) as memory:
                return os.pread(memory.fileno(), vma.size_bytes, vma.start)
    return b""


def _cut(vma: Vma, runs: Runs) -> tuple[tuple[int, int], ...]:
    """What of the runs is in the mapping, as addresses."""
    if len(runs) == 0:
        return ()
    starts = (runs[:, 0] << _SHIFT).tolist()
    ends = ((runs[:, 0] + runs[:, 1]) << _SHIFT).tolist()
    return tuple(
        (max(start, vma.start), min(end, vma.end))
        for start, end in zip(starts, ends, strict=True)
        if start < vma.end and end > vma.start
    )


def _identity(pid: int, vma: Vma) -> FileIdentity:
    try:
        found = os.stat(vma.path)  # /proc shows paths from our root, whatever the target's is
        if found.st_ino != vma.inode:
            found = os.stat(_map_files(pid, vma))
    except FileNotFoundError:
        found = os.stat(_map_files(pid, vma))
    return FileIdentity.of(vma.path, found)


def _map_files(pid: int, vma: Vma) -> str:
    return f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}"


def on_tmpfs(pid: int, vma: Vma) -> bool:
    """Is a file that is mapped on some tmpfs?"""
    if vma.dev[0] != 0:  # every tmpfs has an anonymous device, major 0
        return False
    fs_types = _tmpfs_devices(pid)
    return vma.dev in fs_types


def _tmpfs_devices(pid: int) -> frozenset[tuple[int, int]]:
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        found = set()
        for line in file:
            left, _, right = line.partition(" - ")
            if right.split(" ", 1)[0] in ("tmpfs", "devtmpfs"):
                major, _, minor = left.split()[2].partition(":")
                found.add((int(major), int(minor)))
    return frozenset(found)


def key_of(vma: Vma) -> ObjectKey:
    """Which object of shared memory a mapping is of, if it is of one."""
    # a file of that name may lie in anybody's tmpfs; the segments are all on devices which nobody can mount
    is_sysv = _SYSV_PATH.match(vma.path) is not None and os.makedev(*vma.dev) == (
        pool_device(vma.pool_page_bytes) if vma.kind is VmaKind.HUGETLB else shared_memory_device()
    )
    return ObjectKey(vma.dev, vma.inode, is_sysv)


class _Objects:
    """Collects shared objects, one per `ObjectKey`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._sysv: dict[int, Segment] | None = None
        self.ids: dict[ObjectKey, int] = {}
        self.sources: list[SharedSource] = []

    def of_vma(self, vma: Vma) -> int:
        key = key_of(vma)
        if key in self.ids:
            return self.ids[key]
        flavour, name = "tmpfs", vma.path
        if vma.path.startswith("/memfd:"):
            flavour, name = "memfd", vma.path.removeprefix("/memfd:")
        elif key.is_sysv:
            flavour = "sysv"
        elif vma.path.startswith(("/dev/zero", "/anon_hugepage", "[anon_shmem")) or not vma.path:
            flavour, name = "anon", ""
        return self._add(
            key,
            flavour,
            name,
            _map_files(self._pid, vma),
            deleted=vma.deleted,
        )

    def add_open_memfds(self) -> None:
        """Memfds that are held by a descriptor and mapped nowhere."""
        base = f"/proc/{self._pid}/fd"
        for name in os.listdir(base):
            path = f"{base}/{name}"
            match = _MEMFD_LINK.match(os.readlink(path))
            if not match:
                continue
            found = os.stat(path)
            key = ObjectKey((os.major(found.st_dev), os.minor(found.st_dev)), found.st_ino)
            if key not in self.ids:
                self._add(key, "memfd", match[1], path, deleted=True)

    def _add(self, key: ObjectKey, flavour: str, name: str, path: str, *, deleted: bool) -> int:
        number = len(self.ids) + 1
        self.ids[key] = number
        seals = 0
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            pool_bytes = pool_page_bytes(fd)
            if flavour == "memfd":
                seals = fcntl.fcntl(fd, F_GET_SEALS)
        finally:
            os.close(fd)
        sysv = self._sysv_segment(key.inode) if flavour == "sysv" else _NO_SEGMENT
        # a segment of huge pages may be smaller than the pages it is made of
        size_bytes = sysv.size_bytes or found.st_size
        has_inode = flavour in ("tmpfs", "memfd")  # which a program can give away, and set the time of
        self.sources.append(
            SharedSource(
                SharedObject(
                    id=number,
                    flavour=flavour,
                    name=name,
                    dev=key.dev,
                    inode=key.inode,
                    size_bytes=size_bytes,
                    seals=seals,
                    key=sysv.key,
                    mode=stat.S_IMODE(found.st_mode) if has_inode else sysv.mode,
                    uid=found.st_uid if has_inode else sysv.uid,
                    gid=found.st_gid if has_inode else sysv.gid,
                    deleted=deleted,
                    hugetlb=pool_bytes != 0,
                    pool_page_bytes=pool_bytes,
                    mtime_ns=found.st_mtime_ns if has_inode else None,
                ),
                path,
            )
        )
        return number

    def _sysv_segment(self, shmid: int) -> Segment:
        """The inode of a segment is its shmid."""
        if self._sysv is None:
            self._sysv = segments()
        return self._sysv.get(shmid, _NO_SEGMENT)
