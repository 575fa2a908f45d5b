# SPDX-License-Identifier: Apache-2.0
"""The address space of an image: VMAs and shared memory objects, without page contents."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from checkpointd.memory import VmaKind


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A file on disk that an image refers to instead of holding it.

    `path` is as seen from checkpointd's root, whatever the process's is.

    Restore refuses when `size`, `mtime_ns` or the build id differ (private mappings of code and data), so
    that old pages never meet a new library.  Owner and permissions (None in images of before they were kept) tell
    whether a file that took its place may be opened for the process.
    """

    path: str
    dev: tuple[int, int]
    inode: int
    size_bytes: int
    mtime_ns: int
    build_id: str = ""  # hex, ELF files only
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None

    @classmethod
    def of(cls, path: str, found: os.stat_result) -> FileIdentity:
        """What stat(2) said of the file at `path`."""
        return cls(
            path,
            (os.major(found.st_dev), os.minor(found.st_dev)),
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
            uid=found.st_uid,
            gid=found.st_gid,
            mode=stat.S_IMODE(found.st_mode),
        )


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """set_mempolicy(2), mbind(2): `mode` is MPOL_* with its MPOL_F_* flags."""

    mode: int
    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VmaState:
    """One mapping to be made again at restore.

    Attributes:
        flags: smaps VmFlags.
        file: index into `AddressSpace.files` for mappings of files on disk, else None.
        object: id (>= 1) in `AddressSpace.objects` for shared memory, else None.
        guards: guard regions (MADV_GUARD_INSTALL, Linux 6.13) as (start, end) addresses.
        huge: what lay in transparent huge pages without the program's advice (MADV_HUGEPAGE), as (start, end).
        pool_page_bytes: size of the pages of the hugetlb pool it is of (kind `HUGETLB`); 0 for all other memory.
        policy: of mbind(2); None where that of the thread holds.
    """

    start: int
    end: int
    prot: int
    shared: bool
    offset: int
    kind: VmaKind
    path: str
    flags: frozenset[str]
    file: int | None = None
    object: int | None = None
    guards: tuple[tuple[int, int], ...] = ()
    huge: tuple[tuple[int, int], ...] = ()
    pool_page_bytes: int = 0
    policy: MemoryPolicy | None = None


@dataclass(frozen=True, slots=True)
class SharedObject:
    """Shared memory that lives apart from the address space, saved once however often it is mapped.

    Attributes:
        id: >= 1; the object number of its pages in the image's index.
        flavour: "anon" (MAP_SHARED|MAP_ANONYMOUS), "memfd", "sysv", "tmpfs" (a file on a tmpfs, by path).
        dev, inode: identity at dump time; file descriptors of the same inode refer to the same object.
        size_bytes: of the whole object.
        seals: F_SEAL_* of a memfd.
        key: of a System V segment.
        mode, uid, gid: of a segment, and of a memfd or a file on a tmpfs where `mtime_ns` is known.
        hugetlb: made of pages of a hugetlb pool.
        mtime_ns: of a memfd or a file on a tmpfs; None in images of before it was kept.
        pool_page_bytes: size of these pages; 0 for all other memory.
    """

    id: int
    flavour: str
    name: str
    dev: tuple[int, int]
    inode: int
    size_bytes: int
    seals: int = 0
    key: int = 0
    mode: int = 0o600
    uid: int = 0
    gid: int = 0
    deleted: bool = False
    hugetlb: bool = False
    mtime_ns: int | None = None
    pool_page_bytes: int = 0


@dataclass(frozen=True, slots=True)
class AddressSpace:
    """All of it.  VMAs are sorted by address; the vdso's bytes are kept to compare at restore."""

    vmas: tuple[VmaState, ...]
    files: tuple[FileIdentity, ...]
    objects: tuple[SharedObject, ...]
    vdso: bytes = b""
