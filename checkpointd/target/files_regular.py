# SPDX-License-Identifier: Apache-2.0
"""State out: files with a place in a file system, devices and memfds.  Raises CannotSaveError."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from checkpointd.linux import fcntl as fdcalls
from checkpointd.state.files import Device, Directory, Memfd, RegularFile, SharedMemory
from checkpointd.state.memory import FileIdentity
from checkpointd.target.files_session import (
    SMALL_CONTENT_BYTES,
    CannotSaveError,
    ExtraContent,
    OpenFd,
    Session,
)
from checkpointd.target.shared_objects import ObjectKey, shared_memory_device

_DELETED = " (deleted)"
_HARMLESS_DEVICES = {(1, 3): "null", (1, 5): "zero", (1, 7): "full", (1, 8): "random", (1, 9): "urandom"}
_TERMINAL_MAJORS = {4, *range(136, 144), 204}  # Documentation/admin-guide/devices.txt
_CONTROLLING_TERMINAL, _PTY_MASTER = (5, 0), (5, 2)
PSEUDO_FILE_SYSTEMS = {
    "proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs", "bpf", "binfmt_misc",
    "efivarfs", "pstore", "selinuxfs",
}  # fmt: skip
_UNSAVED_FILE_SYSTEMS = {"mqueue": "a POSIX message queue", "nsfs": "a namespace"}


def regular(
    session: Session, one: OpenFd, index: int, first_by_inode: dict[tuple[int, int], int]
) -> RegularFile | SharedMemory | Memfd:
    """A regular file, a deleted one, or shared memory.

    Args:
        index: of the description, for content that is kept apart.
        first_by_inode: filled with the description that holds the content of each deleted file.
    """
    object_id = session.objects.get(ObjectKey(one.device, one.stat.st_ino))
    if object_id is not None:
        return SharedMemory(
            flags=one.flags, object=object_id, offset=one.info.position, seals=_seals(session, one)
        )
    if one.link.startswith("/secretmem"):
        raise CannotSaveError(
            f"fd {one.fd} is memfd_secret memory, which nobody but its owner can read; close it before the dump"
        )
    fs_type = session.file_system(one.info.mount_id)
    if fs_type in _UNSAVED_FILE_SYSTEMS:
        what = _UNSAVED_FILE_SYSTEMS[fs_type]
        raise CannotSaveError(f"fd {one.fd} ({one.link}) is {what}, which cannot be saved; close it first")
    key = (one.stat.st_dev, one.stat.st_ino)
    if one.link.startswith(("/memfd:", "/anon_hugepage")) or one.stat.st_dev == shared_memory_device():
        if session.final and one.stat.st_dev != shared_memory_device():
            raise CannotSaveError(f"fd {one.fd} ({one.link}) is memory of huge pages that is mapped nowhere")
        content, same_as = _content(session, one, index, key, first_by_inode)
        name = one.link.removesuffix(_DELETED).removeprefix("/memfd:")
        return Memfd(
            flags=one.flags,
            name=name,
            offset=one.info.position,
            size_bytes=one.stat.st_size,
            seals=_seals(session, one),
            content=content,
            same_as=same_as,
            mode=stat.S_IMODE(one.stat.st_mode),
        )
    path, deleted = placed_path(session, one, fs_type)
    content, same_as = None, None
    if deleted:
        content, same_as = _content(session, one, index, key, first_by_inode)
    return RegularFile(
        flags=one.flags,
        file=FileIdentity.of(path, one.stat),
        offset=one.info.position,
        deleted=deleted,
        content=content,
        same_as=same_as,
        mode=stat.S_IMODE(one.stat.st_mode),
        uid=one.stat.st_uid,
        gid=one.stat.st_gid,
        pseudo=fs_type in PSEUDO_FILE_SYSTEMS,
    )


def placed_path(session: Session, one: OpenFd, fs_type: str) -> tuple[str, bool]:
    """The path that leads to the file, and whether the file has no name any more."""
    if not one.link.startswith("/"):
        raise CannotSaveError(f"fd {one.fd} is {one.link}, which cannot be saved; close it before the dump")
    there = session.stat(one.link)
    if fs_type in PSEUDO_FILE_SYSTEMS:
        if there is None:
            raise CannotSaveError(
                f"fd {one.fd} is {one.link.removesuffix(_DELETED)}, which is gone (its process or thread has ended, or "
                "its device or group was removed); close it before the dump"
            )
        return one.link, False
    if there and (there.st_dev, there.st_ino) == (one.stat.st_dev, one.stat.st_ino):
        return one.link, False
    if one.stat.st_nlink == 0:
        return one.link.removesuffix(_DELETED), True
    if one.link.endswith(_DELETED):
        path = one.link.removesuffix(_DELETED)
        raise CannotSaveError(
            f"fd {one.fd} is a file whose name {path} is gone while it has other names; "
            f"link it to {path} again before the dump"
        )
    raise CannotSaveError(
        f"fd {one.fd} is {one.link}, but that path leads elsewhere now (mounted over or replaced); "
        "the file cannot be found again"
    )


def directory(session: Session, one: OpenFd) -> Directory:
    if one.stat.st_nlink == 0:
        path = one.link.removesuffix(_DELETED)
        raise CannotSaveError(f"fd {one.fd} is the deleted directory {path}; make the program close it first")
    path, _ = placed_path(session, one, session.file_system(one.info.mount_id))
    return Directory(
        flags=one.flags, path=path, offset=one.info.position, file=FileIdentity.of(path, one.stat)
    )


def device(session: Session, one: OpenFd) -> Device:
    """A character device that holds no state of its own, or a terminal."""
    number = (os.major(one.stat.st_rdev), os.minor(one.stat.st_rdev))
    if stat.S_ISCHR(one.stat.st_mode):
        if number in _HARMLESS_DEVICES:
            path = one.link.removesuffix(_DELETED)
            if not path.startswith("/"):
                path = f"/dev/{_HARMLESS_DEVICES[number]}"
            return Device(flags=one.flags, path=path, device=number)
        if number == _CONTROLLING_TERMINAL:
            return _controlling_terminal(session, one)
        if number == _PTY_MASTER or one.link.startswith("/dev/ptmx"):
            raise CannotSaveError(
                f"fd {one.fd} is the master of a pseudo-terminal; programs on its other side would lose it, "
                "so it cannot be saved"
            )
        if number[0] in _TERMINAL_MAJORS:
            return Device(
                flags=one.flags,
                path=one.link.removesuffix(_DELETED),
                device=number,
                terminal=True,
                uid=one.stat.st_uid,
                ctime_ns=one.stat.st_ctime_ns,
            )
    raise CannotSaveError(
        f"fd {one.fd} is the device {one.link} ({number[0]}:{number[1]}), whose state is in the driver and "
        "cannot be saved; close it before the dump"
    )


def _controlling_terminal(session: Session, one: OpenFd) -> Device:
    # /dev/tty means something else to everybody: name the terminal itself
    fields = Path(f"/proc/{session.pid}/stat").read_bytes().rpartition(b")")[2].split()
    tty_nr = int(fields[4])
    major, minor = tty_nr >> 8 & 0xFFF, (tty_nr & 0xFF) | (tty_nr >> 12 & 0xFFF00)
    path = f"/dev/pts/{minor + (major - 136) * 256}" if 136 <= major < 144 else f"/dev/tty{minor}"
    there = session.stat(path)
    return Device(
        flags=one.flags,
        path=path,
        device=(major, minor),
        terminal=True,
        uid=there.st_uid if there else one.stat.st_uid,
        ctime_ns=there.st_ctime_ns if there else 0,
    )


def _seals(session: Session, one: OpenFd) -> int:
    if not one.link.startswith("/memfd:"):
        return 0
    with session.borrow(one.fd) as fd:
        return fcntl.fcntl(fd, fdcalls.F_GET_SEALS)


def _content(
    session: Session,
    one: OpenFd,
    index: int,
    key: tuple[int, int],
    first_by_inode: dict[tuple[int, int], int],
) -> tuple[bytes | None, int | None]:
    """Content of a file without a name: (small content, or None; index of the description that has it)."""
    if (first := first_by_inode.setdefault(key, index)) != index:
        return None, first
    if not session.final:
        return None, None
    fd = session.reopen(one.fd)
    if one.stat.st_size > SMALL_CONTENT_BYTES:
        session.extra.append(ExtraContent(index, one.stat.st_size, fd))
        return None, None
    try:
        return _read_all(fd, one.stat.st_size), None
    finally:
        os.close(fd)


def _read_all(fd: int, size_bytes: int) -> bytes:
    pieces, done = [], 0
    while done < size_bytes and (piece := os.pread(fd, size_bytes - done, done)):
        pieces.append(piece)
        done += len(piece)
    return b"".join(pieces)
