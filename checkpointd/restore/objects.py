# SPDX-License-Identifier: Apache-2.0
"""What the new process maps: files on disk, looked up again and compared, and shared memory objects, made again.

Everything is opened by us; the stub inherits the descriptors under the same numbers.  A shared object of the
flavour "anon" is memory that we map for a moment and open by /proc/self/map_files, so that it stays what it was
("/dev/zero (deleted)"); where that is forbidden it becomes a memfd.

Raises: RestoreConflict, OSError.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from checkpointd.errors import RestoreConflict
from checkpointd.linux import sysv
from checkpointd.linux._libc import address_of, syscall
from checkpointd.linux.process_vm import MemFile
from checkpointd.memory import PAGE_SIZE, PageNumbers, Runs, runs_of
from checkpointd.restore.plan import FdKey
from checkpointd.restore.reopen import Opener
from checkpointd.state.memory import AddressSpace, FileIdentity, SharedObject

_F_ADD_SEALS = 1033
_F_SEAL_SEAL = 1
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_NOEXEC_SEAL, _MFD_EXEC = 1, 2, 8, 0x10
_F_SEAL_EXEC = 0x20
_NR_FALLOCATE = 285
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_ZEROS = 1 << 20
_MEMFD_PREFIX = "/memfd:"


@dataclass
class Objects:
    """Descriptors of ours (and attached segments) that the new process is built from.

    Attributes:
        opener: opens paths for the process.
        fds: for mappings.
        object_fds: of each shared object, read and write, for whoever restores descriptors.
        shmids: of System V segments.
    """

    space: AddressSpace
    opener: Opener = field(default_factory=Opener)
    fds: dict[FdKey, int] = field(default_factory=dict)
    object_fds: dict[int, int] = field(default_factory=dict)
    shmids: dict[int, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _segments: dict[int, int] = field(default_factory=dict)  # object -> our address
    _new_segments: list[int] = field(default_factory=list)
    _made_files: list[str] = field(default_factory=list)
    _existed: set[int] = field(default_factory=set)

    def open_all(self, keys: Iterable[FdKey]) -> None:
        """Open and make everything.

        Raises:
            RestoreConflict: a file is gone or cannot be opened, an object cannot be made.
        """
        for one in self.space.objects:
            self._make(one)
        for key in keys:
            if key.is_object:
                fd = self.object_fds[key.number]
                if not key.writable and self._is_needed_read_only(key.number):
                    fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
                self.fds[key] = fd
            else:
                self.fds[key] = open_file(self.opener, self.space.files[key.number], writable=key.writable)

    def _is_needed_read_only(self, number: int) -> bool:
        return any(vma.object == number and vma.shared and "mw" not in vma.flags for vma in self.space.vmas)

    # ---- shared objects

    def _make(self, one: SharedObject) -> None:
        try:
            if one.flavour == "sysv":
                self._make_segment(one)
            elif one.flavour == "anon":
                self.object_fds[one.id] = self._make_anonymous(one)
            elif one.flavour == "tmpfs" and not one.deleted:
                self.object_fds[one.id] = self._make_tmpfs_file(one)
            else:
                self.object_fds[one.id] = _make_memfd(one)
        except OSError as error:
            raise RestoreConflict(
                f"shared memory {one.name or one.flavour} ({one.size_bytes} bytes) cannot be made: {error}",
                hint="check free memory, /proc/sysvipc/shm, and the rights on its path",
                object=one.id,
            ) from error

    def _make_anonymous(self, one: SharedObject) -> int:
        area = mmap.mmap(-1, one.size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        address = address_of(area)
        size = -(-one.size_bytes // PAGE_SIZE) * PAGE_SIZE
        try:
            return os.open(f"/proc/self/map_files/{address:x}-{address + size:x}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            self.warnings.append(
                "shared anonymous memory came back as a memfd (CAP_CHECKPOINT_RESTORE is missing)"
            )
            return _make_memfd(one)
        finally:
            area.close()

    def _make_tmpfs_file(self, one: SharedObject) -> int:
        try:
            fd = os.open(one.name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._existed.add(one.id)
        except FileNotFoundError:
            fd = os.open(one.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, one.mode & 0o7777)
            self._made_files.append(one.name)
            self.warnings.append(f"{one.name} was gone: made again from the image")
        if os.fstat(fd).st_size != one.size_bytes:
            os.ftruncate(fd, one.size_bytes)
        return fd

    def _make_segment(self, one: SharedObject) -> None:
        there = sysv.segments().get(one.inode)
        if there is not None and there[0] == one.key and there[2] == one.size_bytes:
            shmid = one.inode
            self._existed.add(one.id)
        else:
            shmid = sysv.create(one.key, one.size_bytes, one.mode, one.inode)
            self._new_segments.append(shmid)
            with contextlib.suppress(PermissionError):
                sysv.set_owner(shmid, one.uid, one.gid, one.mode)
            if shmid != one.inode:
                self.warnings.append(f"System V segment {one.inode} came back with another id, {shmid}")
        self.shmids[one.id] = shmid
        self._segments[one.id] = sysv.attach(shmid)

    # ---- content

    def write(
        self, number: int, pages: PageNumbers, data: np.ndarray[tuple[int], np.dtype[np.uint8]]
    ) -> None:
        """Write pages of one object.  `data` holds them one after the other."""
        address = self._segments.get(number)
        view = memoryview(data)  # type: ignore[arg-type]
        runs: Runs = runs_of(pages)
        at = 0
        mem = MemFile(os.getpid(), writable=True) if address is not None else None
        try:
            for first, nr in runs.tolist():
                part = view[at : at + nr * PAGE_SIZE]
                at += len(part)
                offset = first * PAGE_SIZE
                if mem is not None and address is not None:
                    mem.write(address + offset, part)
                else:
                    self._write_at(number, offset, part)
        finally:
            if mem is not None:
                mem.close()

    def _write_at(self, number: int, offset: int, part: memoryview) -> None:
        size = next(one.size_bytes for one in self.space.objects if one.id == number)
        part = part[: max(0, size - offset)]  # the last page may reach beyond the end
        while part:
            done = os.pwrite(self.object_fds[number], part, offset)
            part, offset = part[done:], offset + done

    def empty(self, number: int) -> None:
        """Drop what an object that existed already holds; its pages come from the image."""
        if number not in self._existed:
            return
        size = next(one.size_bytes for one in self.space.objects if one.id == number)
        if number in self.object_fds:
            # not by truncation: others who map it would get SIGBUS
            flags = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
            syscall(_NR_FALLOCATE, self.object_fds[number], flags, 0, size, name="fallocate")
            return
        with MemFile(os.getpid(), writable=True) as mem:
            for at in range(0, size, _ZEROS):
                mem.write(self._segments[number] + at, bytes(min(_ZEROS, size - at)))

    # ---- the end

    def seal(self) -> None:
        """Add seals and remove what was removed: when all is mapped and filled."""
        for one in self.space.objects:
            if one.flavour == "memfd" and one.seals & ~_F_SEAL_EXEC not in (0, _F_SEAL_SEAL):
                fcntl.fcntl(self.object_fds[one.id], _F_ADD_SEALS, one.seals)
            elif (
                one.flavour == "sysv"
                and one.mode & sysv.SHM_DEST
                and self.shmids[one.id] in self._new_segments
            ):
                sysv.remove(self.shmids[one.id])

    def close(self, *, failed: bool = False) -> None:
        """Close everything of ours; after a failure also remove what was made under a name."""
        for fd in {*self.fds.values(), *self.object_fds.values()}:
            os.close(fd)
        for address in self._segments.values():
            sysv.detach(address)
        if failed:
            for shmid in self._new_segments:
                with contextlib.suppress(OSError):
                    sysv.remove(shmid)
            for path in self._made_files:
                with contextlib.suppress(OSError):
                    os.unlink(path)
        self.fds, self.object_fds, self._segments = {}, {}, {}


def _make_memfd(one: SharedObject) -> int:
    flags = _MFD_CLOEXEC | (
        0 if one.seals & _F_SEAL_SEAL and one.seals == _F_SEAL_SEAL else _MFD_ALLOW_SEALING
    )
    name = one.name.removeprefix(_MEMFD_PREFIX) or "shared"
    extra = _MFD_NOEXEC_SEAL if one.seals & _F_SEAL_EXEC else _MFD_EXEC
    try:
        fd = os.memfd_create(name, flags | extra)
    except OSError:  # both came with Linux 6.3
        fd = os.memfd_create(name, flags)
    os.ftruncate(fd, one.size_bytes)
    return fd


def open_file(opener: Opener, identity: FileIdentity, *, writable: bool) -> int:
    """Open a mapped file again.

    Raises:
        RestoreConflict: it is gone, may not be opened, or is no file of the process.
    """
    path = identity.path
    what = f"{path}, which the process had mapped,"
    there = opener.stat(path)
    if there is None:
        raise RestoreConflict(
            f"{what} is gone",
            hint="put the same file back (install the same version of its package), then restore again",
            path=path,
        )
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK
    return opener.open(path, flags, kind=stat.S_IFREG, recorded=identity, what=what)
