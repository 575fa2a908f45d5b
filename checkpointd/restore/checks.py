# SPDX-License-Identifier: Apache-2.0
"""Everything that stands in the way of a restore, found before anything is made: all reasons at once.

Raises: Unsupported (this machine cannot), NotPermitted (we may not), RestoreConflict (something changed).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpointd.errors import ImageDamaged, NotPermitted, RestoreConflict, Unsupported
from checkpointd.linux import capability as cap
from checkpointd.linux import prctl
from checkpointd.linux.arch import Nr, cpu_flags
from checkpointd.memory import VmaKind
from checkpointd.procfs import maps, process
from checkpointd.restore.credentials import missing_rights
from checkpointd.restore.plan import FdKey
from checkpointd.restore.spawn import holder_of, is_dying
from checkpointd.state.memory import AddressSpace, FileIdentity
from checkpointd.state.process import Host, ImageState, ProcessState
from checkpointd.state.threads import Credentials
from checkpointd.target.memory import own_vdso
from checkpointd.target.threads import read_credentials

_KERNEL_MADE = (VmaKind.VVAR, VmaKind.VDSO)


def our_credentials() -> Credentials:
    status = process.parse_status(Path("/proc/thread-self/status").read_bytes())
    return read_credentials(status, prctl.prctl(prctl.PR_GET_SECUREBITS))


def check_machine(state: ImageState) -> None:
    """CPU, kernel and kinds of state.

    Raises:
        Unsupported: with all reasons.
        ImageDamaged: a mapping that no kernel has.
    """
    found = _cpu_blockers(state.process) + _vdso_blockers(state.address_space)
    for vma in state.address_space.vmas:
        if vma.kind is VmaKind.HUGETLB and vma.pool_page_bytes.bit_count() != 1:
            raise ImageDamaged(f"the mapping at {vma.start:x} is of pages of {vma.pool_page_bytes} bytes")
        if vma.kind in (VmaKind.DEVICE, VmaKind.SECRETMEM):
            found.append(f"the image has a mapping of kind {vma.kind.value} at {vma.start:x}")
    for one in state.address_space.objects:
        if one.hugetlb != (one.pool_page_bytes.bit_count() == 1):
            raise ImageDamaged(f"shared object {one.id} is of pages of {one.pool_page_bytes} bytes")
    if found:
        raise Unsupported(
            f"this machine cannot restore the image: {found[0]}" + _and_more(found),
            hint="restore on a machine with the same kernel build and the same kind of CPU",
            blockers=found,
        )


def _cpu_blockers(state: ProcessState) -> list[str]:
    found = []
    missing = state.cpu.flags - cpu_flags()
    if missing:
        found.append(f"this CPU lacks {', '.join(sorted(missing))}")
    return found


def feature_blockers(state: ProcessState, local_xfeatures: int) -> list[str]:
    """Register components the image's CPU had and this one has not."""
    missing = state.cpu.xfeatures & ~local_xfeatures
    return [f"this CPU lacks register components {missing:#x}"] if missing else []


def _vdso_blockers(space: AddressSpace) -> list[str]:
    wanted = [(vma.path, vma.end - vma.start) for vma in space.vmas if vma.kind in _KERNEL_MADE]
    if not wanted:
        return []
    here = [(vma.path, vma.size_bytes) for vma in maps.read_maps(os.getpid()) if vma.kind in _KERNEL_MADE]
    if wanted != here:
        return [f"this kernel's vdso is laid out differently ({here} instead of {wanted})"]
    if space.vdso and space.vdso != own_vdso():
        return ["this kernel's vdso has other code than the one the program was running with"]
    return []


def check_rights(state: ProcessState, ours: Credentials, *, new_pid: bool) -> None:
    """May we make such a process?

    Raises:
        NotPermitted: with all reasons.
    """
    found: list[str] = []
    for thread in state.threads:
        for reason in missing_rights(thread.credentials, ours):
            if reason not in found:
                found.append(reason)
    can_choose = cap.has(ours.effective, cap.CAP_CHECKPOINT_RESTORE) or cap.has(
        ours.effective, cap.CAP_SYS_ADMIN
    )
    if not new_pid and not can_choose:
        found.append("choosing a process id needs CAP_CHECKPOINT_RESTORE (or restore with --new-pid)")
    if state.root != "/" and not cap.has(ours.effective, cap.CAP_SYS_CHROOT):
        found.append(f"its root directory was {state.root}: that needs CAP_SYS_CHROOT")
    if found:
        raise NotPermitted(
            f"the process cannot be restored by this user: {found[0]}" + _and_more(found),
            hint="run checkpointd as root",
            reasons=found,
        )


def check_ids(state: ProcessState, *, wait_s: float) -> None:
    """Are its process and thread ids free?  Dying processes are waited for.

    Raises:
        RestoreConflict: says who has them.
    """
    deadline = time.monotonic() + wait_s
    taken = [thread.tid for thread in state.threads if os.path.exists(f"/proc/{thread.tid}")]
    while taken and all(is_dying(tid) for tid in taken) and time.monotonic() < deadline:
        time.sleep(0.005)
        taken = [tid for tid in taken if os.path.exists(f"/proc/{tid}")]
    if not taken:
        return
    kinds = ["pid" if tid == state.pid else "thread id" for tid in taken]
    reasons = [f"{kind} {tid} is in use{holder_of(tid)}" for kind, tid in zip(kinds, taken, strict=True)]
    raise RestoreConflict(
        reasons[0] + _and_more(reasons),
        hint="end that process, or restore with --new-pid",
        pid=taken[0],
        conflicts=reasons,
    )


def file_conflicts(space: AddressSpace, fds: Mapping[FdKey, int]) -> list[str]:
    """Mapped files that are not what they were at the dump."""
    found = []
    private = {vma.file for vma in space.vmas if vma.file is not None and not vma.shared}
    for key, fd in fds.items():
        if key.is_object:
            continue
        identity = space.files[key.number]
        problem = _compare(identity, os.fstat(fd), is_private=key.number in private)
        if problem:
            found.append(f"{identity.path} changed since the dump ({problem})")
    return sorted(set(found))


def _compare(identity: FileIdentity, found: os.stat_result, *, is_private: bool) -> str:
    """What changed in a way that matters; "" for nothing."""
    if is_private:
        if found.st_size != identity.size_bytes:
            return f"it has {found.st_size} bytes instead of {identity.size_bytes}"
        if found.st_mtime_ns != identity.mtime_ns:
            then = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(identity.mtime_ns / 1e9))
            now = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.st_mtime_ns / 1e9))
            return f"it was written at {now}, then it was of {then}"
    elif found.st_size < identity.size_bytes:
        return f"it shrank to {found.st_size} bytes from {identity.size_bytes}"
    return ""


def wanted_time_offsets(host: Host, boot_id: str) -> tuple[int, int] | None:
    """Of the time namespace in which the clocks go on for the process; None when ours is right.

    In the same boot they are what they were.  In another boot, or on another host, the clocks go on from where they
    were at the dump, as if no time had passed: what it remembers of them (sleeps and timeouts that are points in
    time) stays true.
    """
    ours = process.time_offsets(os.getpid())
    if host.boot_id == boot_id:
        return None if host.time_offsets_ns == ours else host.time_offsets_ns
    return (
        ours[0] + host.monotonic_ns - time.monotonic_ns(),
        ours[1] + host.boottime_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME),
    )


def clock_warnings(state: ProcessState, boot_id: str) -> list[str]:
    """For a process that could not have its clocks back."""
    when = "in another boot" if state.host.boot_id != boot_id else "in another time namespace"
    found = [
        f"it was saved {when}, and a time namespace of its own cannot be made here (CONFIG_TIME_NS, CAP_SYS_ADMIN "
        "and CAP_SYS_TIME): the monotonic clock jumps for it"
    ]
    for thread in state.threads:
        if thread.sleep is not None and thread.sleep.nr == Nr.FUTEX and thread.sleep.remaining_ns is None:
            found.append(f"thread {thread.tid} waits until a time of that clock")
    return found


def cgroup_warnings(host: Host) -> list[str]:
    """A process is restored into the cgroups of whoever restores it."""
    ours = process.cgroups(os.getpid())
    elsewhere = [one for one in host.cgroups if one not in ours]
    if not elsewhere:
        return []
    here = [one for one in ours if one not in host.cgroups]
    return [
        f"it ran in cgroup {_names(elsewhere)} and runs in {_names(here) if here else 'the root'} now: "
        "what that allows holds for it"
    ]


def _names(cgroups: Sequence[str]) -> str:
    return ", ".join(one.removeprefix(":") for one in cgroups)


def _and_more(reasons: list[str]) -> str:
    return f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
