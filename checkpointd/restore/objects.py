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
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from checkpointd.errors import RestoreConflict
from checkpointd.linux import hugetlb, sysv
from checkpointd.linux._libc import address_of, syscall
from checkpointd.linux.arch import Nr
from checkpointd.linux.process_vm import MemFile
from checkpointd.linux.statfs import TMPFS_MAGIC, file_system_magic
from checkpointd.memory import PAGE_SIZE, PageNumbers, Runs, runs_of
from checkpointd.restore.plan import MADV_POPULATE_WRITE, MAP_NORESERVE, FdKey
from checkpointd.restore.pools import POOL_HINT, huge_runs
from checkpointd.restore.reopen import Opener
from checkpointd.state.memory import AddressSpace, FileIdentity, SharedObject

_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_F_SEAL_SEAL = 1
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_NOEXEC_SEAL, _MFD_EXEC = 1, 2, 8, 0x10
_F_SEAL_EXEC = 0x20
_NR_FALLOCATE = 285
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_MADV_REMOVE = 9
_ZEROS = 1 << 20
_MEMFD_NAME_MAX = 249  # NAME_MAX less "memfd:"


@dataclass
class Objects:
    """Descriptors of ours (and attached segments) that the new process is built from.

    Attributes:
        opener: opens paths for the process.
        opened_for_writing: objects that a descriptor of the process could write.
        fds: for mappings.
        object_fds: of each shared object, read and write, for whoever restores descriptors.
        shmids: of System V segments.
    """

    space: AddressSpace
    opener: Opener = field(default_factory=Opener)
    opened_for_writing: frozenset[int] = frozenset()
    fds: dict[FdKey, int] = field(default_factory=dict)
    object_fds: dict[int, int] = field(default_factory=dict)
    shmids: dict[int, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _segments: dict[int, int] = field(default_factory=dict)  # object -> our address
    _views: dict[int, mmap.mmap] = field(default_factory=dict)  # of files of hugetlb pools: no write(2)
    _new_segments: list[int] = field(default_factory=list)
    _made_files: list[tuple[int, str]] = field(default_factory=list)
    _existed: set[int] = field(default_factory=set)
    _only_read: set[int] = field(
        default_factory=set
    )  # files that are there, and that the process cannot write

    def check(self, keys: Iterable[FdKey], *, allow_changes: bool) -> list[str]:
        """Open what is there already, and change nothing.

        Returns:
            What stands in the way, one sentence each.
        """
        conflicts: list[str] = []
        for one in self.space.objects:
            try:
                if one.flavour == "sysv":
                    conflicts += self._find_segment(one, allow_changes)
                elif one.flavour == "tmpfs" and not one.deleted:
                    conflicts += self._find_tmpfs_file(one, allow_changes)
            except RestoreConflict as conflict:
                conflicts.append(conflict.message)
        for key in keys:
            if not key.is_object:
                try:
                    file = self.space.files[key.number]
                    self.fds[key] = open_file(self.opener, file, writable=key.writable)
                except RestoreConflict as conflict:
                    conflicts.append(conflict.message)
        return conflicts

    def make(self, keys: Iterable[FdKey]) -> None:
        """Make what is not there, after `check`.  What is there is not changed before `empty`.

        Raises:
            RestoreConflict: an object cannot be made.
        """
        for one in self.space.objects:
            self._make(one)
        for key in keys:
            if key.is_object:
                fd = self.object_fds[key.number]
                if not key.writable and self._is_needed_read_only(key.number):
                    fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
                self.fds[key] = fd

    def _is_needed_read_only(self, number: int) -> bool:
        return any(vma.object == number and vma.shared and "mw" not in vma.flags for vma in self.space.vmas)

    # ---- shared objects

    def exists(self, number: int) -> bool:
        """Was it there already?  After `check`."""
        return number in self._existed

    def _make(self, one: SharedObject) -> None:
        try:
            if one.flavour == "sysv":
                self._make_segment(one)
            elif one.flavour == "anon":
                self.object_fds[one.id] = self._make_anonymous(one)
            elif one.flavour == "tmpfs" and not one.deleted:
                if one.id not in self.object_fds:
                    self.object_fds[one.id] = self._make_tmpfs_file(one)
            else:
                self.object_fds[one.id] = _make_memfd(one)
            if one.hugetlb and one.id in self.object_fds and one.size_bytes:
                fd, flags = self.object_fds[one.id], mmap.MAP_SHARED | MAP_NORESERVE
                self._views[one.id] = mmap.mmap(fd, one.size_bytes, flags=flags)
        except OSError as error:
            raise RestoreConflict(
                f"shared memory {one.name or one.flavour} ({one.size_bytes} bytes) cannot be made: {error}",
                hint="check free memory, /proc/sysvipc/shm, and the rights on its path",
                object=one.id,
            ) from error

    def _make_anonymous(self, one: SharedObject) -> int:
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
        if one.hugetlb:
            flags |= MAP_NORESERVE | hugetlb.MAP_HUGETLB | hugetlb.size_flag(one.pool_page_bytes)
        area = mmap.mmap(-1, one.size_bytes, flags=flags)
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

    def _find_tmpfs_file(self, one: SharedObject, allow_changes: bool) -> list[str]:
        what = f"shared memory {one.name}"
        there = self.opener.stat(one.name)
        if there is None:
            parent = os.path.dirname(one.name)
            try:
                os.close(self._look_at_tmpfs(parent))
            except OSError as error:
                return [f"the directory of {what} cannot be opened: {error.strerror}"]
            return []
        recorded = FileIdentity(one.name, one.dev, one.inode, one.size_bytes, one.mtime_ns or 0)
        if one.mtime_ns is not None:
            recorded = replace(recorded, uid=one.uid, gid=one.gid, mode=stat.S_IMODE(one.mode))
        if not self._is_writable(one.id):
            self._only_read.add(one.id)
        access = os.O_RDONLY if one.id in self._only_read else os.O_RDWR
        fd = self.opener.open(one.name, access, kind=stat.S_IFREG, recorded=recorded, what=what)
        self.object_fds[one.id] = fd
        self._existed.add(one.id)
        if file_system_magic(fd) != TMPFS_MAGIC:
            return [f"{what} is on no tmpfs any more"]
        if there.st_size != one.size_bytes:
            return self._changed(
                one.id, f"{what} has {there.st_size} bytes instead of {one.size_bytes}", allow_changes
            )
        if one.mtime_ns is not None and there.st_mtime_ns != one.mtime_ns:
            return self._changed(one.id, f"{what} was written since the dump", allow_changes)
        return []

    def _is_writable(self, number: int) -> bool:
        return number in self.opened_for_writing or any(
            vma.object == number and vma.shared and "mw" in vma.flags for vma in self.space.vmas
        )

    def _changed(self, number: int, sentence: str, allow_changes: bool) -> list[str]:
        if allow_changes:
            done = "left as it is" if number in self._only_read else "overwritten from the image"
            self.warnings.append(f"{sentence}; {done}, as asked")
            return []
        return [f"{sentence}; bring back what was there, or restore with --changed allow"]

    def _look_at_tmpfs(self, directory: str) -> int:
        """A descriptor (O_PATH) of a directory on a tmpfs."""
        fd = self.opener.look(directory)
        if file_system_magic(fd) == TMPFS_MAGIC:
            return fd
        os.close(fd)
        raise RestoreConflict(
            f"{directory}, where shared memory was, is on no tmpfs any more", path=directory
        )

    def _make_tmpfs_file(self, one: SharedObject) -> int:
        directory, name = self._look_at_tmpfs(os.path.dirname(one.name)), os.path.basename(one.name)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=directory)
        except OSError:
            os.close(directory)
            raise
        self._made_files.append((directory, name))
        self.warnings.append(f"{one.name} was gone: made again from the image")
        if one.mtime_ns is not None:
            with contextlib.suppress(PermissionError):
                os.fchown(fd, one.uid, one.gid)
            os.fchmod(fd, stat.S_IMODE(one.mode))
        os.ftruncate(fd, one.size_bytes)
        return fd

    def _find_segment(self, one: SharedObject, allow_changes: bool) -> list[str]:
        """A segment of the same id, key and size is taken for the same: the kernel keeps no time of writing."""
        all_segments = sysv.segments()
        there = all_segments.get(one.inode)
        what = f"System V segment {one.inode}"
        if there is not None and (there.key, there.size_bytes) == (one.key, one.size_bytes):
            self._existed.add(one.id)
            owner = (there.uid, there.gid, there.mode & 0o777)
            if owner == (one.uid, one.gid, one.mode & 0o777):
                return []
            return self._changed(
                one.id,
                f"{what} has another owner or other permissions than at the dump",
                allow_changes and not self.opener.is_guarding,
            )
        for shmid, other in all_segments.items():
            if one.key and other.key == one.key:
                return [
                    f"the key {one.key:#x} of {what} ({one.size_bytes} bytes) belongs to segment {shmid} "
                    f"({other.size_bytes} bytes) now; remove that with ipcrm"
                ]
        return []

    def _make_segment(self, one: SharedObject) -> None:
        if one.id in self._existed:
            shmid = one.inode
        else:
            flags = hugetlb.SHM_HUGETLB | hugetlb.size_flag(one.pool_page_bytes) if one.hugetlb else 0
            shmid = sysv.create(one.key, one.size_bytes, one.mode, one.inode, flags=flags)
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
        if number in self._only_read:
            return
        address = self._address(number)
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

    def _address(self, number: int) -> int | None:
        """Where we have the object mapped, if we have."""
        if number in self._views:
            return address_of(self._views[number])
        return self._segments.get(number)

    def take(self, number: int, pages: PageNumbers) -> None:
        """Take the pages from their pool that hold the object's `pages`; nothing for other objects.

        Raises:
            RestoreConflict: the pool became empty.
        """
        one = next(one for one in self.space.objects if one.id == number)
        address = self._address(number)
        if not one.hugetlb or address is None:
            return
        size = one.pool_page_bytes
        for first, nr in huge_runs(pages, size).tolist():
            try:
                syscall(Nr.MADVISE, address + first * size, nr * size, MADV_POPULATE_WRITE, name="madvise")
            except OSError as error:
                raise RestoreConflict(
                    f"the pool of huge pages of {size >> 10} KiB has become empty since it was looked at",
                    hint=POOL_HINT,
                    object=number,
                ) from error

    def close_views(self) -> None:
        """All is filled: a seal suffers no mapping that may be written to."""
        for view in self._views.values():
            view.close()
        self._views = {}

    def _write_at(self, number: int, offset: int, part: memoryview) -> None:
        size = next(one.size_bytes for one in self.space.objects if one.id == number)
        within = max(0, size - offset)
        part, beyond = part[:within], part[within:]  # the last page may reach beyond the end
        while part:
            done = os.pwrite(self.object_fds[number], part, offset)
            part, offset = part[done:], offset + done
        if any(beyond):
            self._write_behind(number, size, beyond)

    def _write_behind(self, number: int, size: int, beyond: memoryview) -> None:
        """What a mapping shows behind the end: only a mapping can write there."""
        last = size // PAGE_SIZE * PAGE_SIZE
        with (
            mmap.mmap(self.object_fds[number], size - last, offset=last) as view,
            MemFile(os.getpid(), writable=True) as mem,
        ):
            mem.write(address_of(view) + size - last, beyond)

    def empty(self, number: int) -> None:
        """Drop what an object that existed already holds; its pages come from the image."""
        if number not in self._existed or number in self._only_read:
            return
        size = next(one.size_bytes for one in self.space.objects if one.id == number)
        if number in self.object_fds:
            if os.fstat(self.object_fds[number]).st_size != size:
                os.ftruncate(self.object_fds[number], size)
            # not by truncation: others who map it would get SIGBUS
            flags = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
            # with what is behind its end
            length = -(-size // PAGE_SIZE) * PAGE_SIZE
            syscall(_NR_FALLOCATE, self.object_fds[number], flags, 0, length, name="fallocate")
            return
        if (page := next(one.pool_page_bytes for one in self.space.objects if one.id == number)) != 0:
            # its holes must not take pages
            length = -(-size // page) * page
            syscall(Nr.MADVISE, self._segments[number], length, _MADV_REMOVE, name="madvise")
            return
        with MemFile(os.getpid(), writable=True) as mem:
            end = -(-size // PAGE_SIZE) * PAGE_SIZE
            for at in range(0, end, _ZEROS):
                mem.write(self._segments[number] + at, bytes(min(_ZEROS, end - at)))

    # ---- the end

    def seal(self) -> None:
        """Add seals, give back times, and remove what was removed: when all is mapped and filled."""
        for one in self.space.objects:
            is_named = one.flavour == "tmpfs" and not one.deleted
            if (
                one.flavour in ("tmpfs", "memfd")
                and one.mtime_ns is not None
                and one.id not in self._only_read
            ):
                if not is_named:
                    self._give_away(one)
                # so that the next restore of the image finds a named one unchanged
                os.utime(self.object_fds[one.id], ns=(time.time_ns(), one.mtime_ns))
            if one.flavour == "memfd":
                # it may have been made with some, and F_SEAL_SEAL forbids to add even those
                fd = self.object_fds[one.id]
                if missing := one.seals & ~fcntl.fcntl(fd, _F_GET_SEALS):
                    fcntl.fcntl(fd, _F_ADD_SEALS, missing)
            elif (
                one.flavour == "sysv"
                and one.mode & sysv.SHM_DEST
                and self.shmids[one.id] in self._new_segments
            ):
                sysv.remove(self.shmids[one.id])

    def _give_away(self, one: SharedObject) -> None:
        """Owner and permissions of memory without a name: when nobody has to open it any more."""
        fd = self.object_fds[one.id]
        try:
            there = os.fstat(fd)
            if (there.st_uid, there.st_gid) != (one.uid, one.gid):
                os.fchown(fd, one.uid, one.gid)
            # after the owner, whose change clears set-user-ID
            if stat.S_IMODE(os.fstat(fd).st_mode) != stat.S_IMODE(one.mode):
                os.fchmod(fd, stat.S_IMODE(one.mode))
        except PermissionError:
            self.warnings.append(
                f"shared memory {one.name} cannot be given back to user {one.uid}, group {one.gid}, "
                f"with permissions {stat.S_IMODE(one.mode):o}"
            )

    def close(self, *, failed: bool = False) -> None:
        """Close everything of ours; after a failure also remove what was made under a name."""
        for fd in {*self.fds.values(), *self.object_fds.values()}:
            os.close(fd)
        self.close_views()
        for address in self._segments.values():
            sysv.detach(address)
        if failed:
            for shmid in self._new_segments:
                with contextlib.suppress(OSError):
                    sysv.remove(shmid)
            for directory, name in self._made_files:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=directory)
        for directory, _ in self._made_files:
            os.close(directory)
        self._made_files = []
        self.fds, self.object_fds, self._segments = {}, {}, {}


def _make_memfd(one: SharedObject) -> int:
    is_sealable = one.flavour == "memfd" and one.seals != _F_SEAL_SEAL
    flags = _MFD_CLOEXEC | (_MFD_ALLOW_SEALING if is_sealable else 0)
    if one.hugetlb:
        flags |= hugetlb.MFD_HUGETLB | hugetlb.size_flag(one.pool_page_bytes)
    # a path of what was unlinked may be longer than a name
    name = one.name if one.flavour == "memfd" else _shortened(one.name or "shared")
    # one that may be executed for ever was sealed later
    is_executable = one.mtime_ns is not None and one.mode & 0o111
    extra = _MFD_NOEXEC_SEAL if one.seals & _F_SEAL_EXEC and not is_executable else _MFD_EXEC
    try:
        fd = os.memfd_create(name, flags | extra)
    except OSError:  # both came with Linux 6.3
        fd = os.memfd_create(name, flags)
    os.ftruncate(fd, one.size_bytes)
    return fd


def _shortened(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_MEMFD_NAME_MAX])


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
