# SPDX-License-Identifier: Apache-2.0
"""System V shared memory: shmget(2), shmat(2), shmctl(2), and making a segment with a wanted id; semaphores.

Raises OSError only: EEXIST (the key is in use), EINVAL (no such segment, or a size that does not fit), EPERM.

Source: shmget(2), proc_sys_kernel(5) (shm_next_id, Linux 3.9, CONFIG_CHECKPOINT_RESTORE).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

from checkpointd.linux._libc import syscall
from checkpointd.linux.arch import Nr

IPC_CREAT, IPC_EXCL = 0o1000, 0o2000
IPC_RMID, IPC_SET, IPC_STAT = 0, 1, 2
SHM_DEST = 0o1000
_GETPID = 11
_NEXT_ID = Path("/proc/sys/kernel/shm_next_id")
_SHMID_DS_BYTES = 112


def create(key: int, size_bytes: int, mode: int, wanted_id: int, *, flags: int = 0) -> int:
    """A new segment; its id, which is `wanted_id` where the kernel and our rights allow.

    Args:
        flags: SHM_HUGETLB and the size of pages.
    """
    try:
        _NEXT_ID.write_text(str(wanted_id), encoding="ascii")
    except OSError:
        pass
    return syscall(Nr.SHMGET, key, size_bytes, IPC_CREAT | IPC_EXCL | (mode & 0o777) | flags, name="shmget")


def attach(shmid: int) -> int:
    """Attach to our own address space; the address."""
    return syscall(Nr.SHMAT, shmid, 0, 0, name="shmat")


def detach(address: int) -> None:
    syscall(Nr.SHMDT, address, name="shmdt")


def remove(shmid: int) -> None:
    """Mark for destruction at the last detach."""
    syscall(Nr.SHMCTL, shmid, IPC_RMID, 0, name="shmctl(IPC_RMID)")


def set_owner(shmid: int, uid: int, gid: int, mode: int) -> None:
    """IPC_SET: struct ipc64_perm {key, uid, gid, cuid, cgid, mode, ...} leads struct shmid64_ds."""
    buffer = bytearray(_SHMID_DS_BYTES)
    struct.pack_into("=iIIIII", buffer, 0, 0, uid, gid, 0, 0, mode & 0o777)
    syscall(Nr.SHMCTL, shmid, IPC_SET, buffer, name="shmctl(IPC_SET)")


class Segment(NamedTuple):
    """A line of /proc/sysvipc/shm; `mode` with SHM_DEST, `nr_attached` counts mappings of all processes."""

    key: int
    mode: int
    size_bytes: int
    uid: int
    gid: int
    nr_attached: int = 0


def segments() -> dict[int, Segment]:
    """All segments of our namespace, by id.  Source: proc_sysvipc(5)."""
    found = {}
    for line in Path("/proc/sysvipc/shm").read_text(encoding="ascii").splitlines()[1:]:
        field = line.split()
        found[int(field[1])] = Segment(
            key=int(field[0]),
            mode=int(field[2], 8),
            size_bytes=int(field[3]),
            uid=int(field[7]),
            gid=int(field[8]),
            nr_attached=int(field[6]),
        )
    return found


def operated_semaphores() -> dict[int, int]:
    """Number of semaphores of each set of our namespace with which semop(2) was ever called, by its id.

    Source: proc_sysvipc(5).
    """
    try:
        lines = Path("/proc/sysvipc/sem").read_text(encoding="ascii").splitlines()[1:]
    except FileNotFoundError:  # a kernel without CONFIG_SYSVIPC
        return {}
    return {int(field[1]): int(field[3]) for field in map(str.split, lines) if field[8] != "0"}


def last_operator(semid: int, number: int) -> int:
    """The process that operated the semaphore last, or set its value; 0 for nobody that we see."""
    return syscall(Nr.SEMCTL, semid, number, _GETPID, name="semctl(GETPID)")
