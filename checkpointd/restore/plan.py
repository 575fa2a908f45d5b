# SPDX-License-Identifier: Apache-2.0
"""What a restore will do to the new address space, worked out before anything exists.  Pure: no I/O.

A `Step` is a system call with the words to use should it fail.  Steps are made for a process whose address space
is empty but for the *work area*, and whose descriptors of mapped files have the numbers given.

Protection: a private mapping that was writable once (VmFlags `ac`) is made writable first and given its own
protection after it was filled; so its content can be written fast, and the kernel accounts and merges it as it did
for the original.

Source: mmap(2), madvise(2), proc_pid_smaps(5) (VmFlags), Linux arch/x86/mm/mmap.c (mmap_base).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from checkpointd.errors import Unsupported
from checkpointd.linux import hugetlb
from checkpointd.linux.arch import ARCH_MAP_VDSO_64, Nr
from checkpointd.linux.prctl import PR_SET_VMA, PR_SET_VMA_ANON_NAME
from checkpointd.memory import NO_RUNS, PAGE_SIZE, TASK_SIZE, Runs, VmaKind
from checkpointd.state.memory import AddressSpace, SharedObject, VmaState
from checkpointd.target.remote import Call, Remote

PROT_WRITE = 2
MAP_SHARED, MAP_PRIVATE, MAP_DROPPABLE = 1, 2, 8
MAP_ANONYMOUS, MAP_GROWSDOWN, MAP_NORESERVE = 0x20, 0x100, 0x4000
MAP_FIXED_NOREPLACE = 0x10_0000
SHM_RDONLY, SHM_EXEC = 0o10000, 0o100000
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MLOCK_ONFAULT = 1
MADV_POPULATE_WRITE, MADV_COLLAPSE, MADV_GUARD_INSTALL = 23, 25, 102
HUGE_PAGE_SIZE = 2 << 20

_LOCK_ON_FAULT = frozenset({"lf", "??"})  # VM_LOCKONFAULT had no name of its own in smaps once
_STACK_GUARD_GAP = 256 * PAGE_SIZE
_PROT_EXEC = 4
# smaps flag to madvise(2) advice
_ADVICE = {
    "rr": 1, "sr": 2, "dc": 10, "mg": 12, "hg": 14, "nh": 15, "dd": 16, "wf": 18,
}  # fmt: skip
FLAGS_BEFORE_CONTENT = frozenset({*_ADVICE, "gd", "nr", "dp"})
"""smaps flags that a mapping gets before its content; all others come after it."""
_KERNEL_MADE = frozenset({VmaKind.VDSO, VmaKind.VVAR, VmaKind.VSYSCALL})
_HOLE_MARGIN = 1 << 30


class Step(NamedTuple):
    """One system call of the new process.

    Attributes:
        what: for the error: "mapping 7f00-8000 rw-p /x".
        may_fail: failure is a warning at most.
    """

    call: Call
    what: str
    may_fail: bool = False


class FdKey(NamedTuple):
    """What a mapping needs open: file or object `number`, for writing or not."""

    is_object: bool
    number: int
    writable: bool


def describe(vma: VmaState) -> str:
    prot = "".join(c if vma.prot & bit else "-" for c, bit in (("r", 1), ("w", 2), ("x", 4)))
    return f"{vma.start:x}-{vma.end:x} {prot}{'s' if vma.shared else 'p'} {vma.path}".rstrip()


def find_hole(space: AddressSpace, size_bytes: int, lowest: int) -> int:
    """Where the work area goes: the middle of the largest gap, far from whatever grows.

    Raises:
        Unsupported: the address space has no such gap.
    """
    best, best_at, at = 0, 0, max(lowest, PAGE_SIZE * 16)
    ranges = sorted((vma.start, vma.end) for vma in space.vmas if vma.start < TASK_SIZE)
    for start, end in (*ranges, (TASK_SIZE, TASK_SIZE)):
        if start - at > best:
            best, best_at = start - at, at
        at = max(at, end)
    if best < size_bytes:
        raise Unsupported(
            f"the address space has no gap of {size_bytes} bytes to work in",
            blockers=["its address space is full"],
        )
    room = min((best - size_bytes) // 2, _HOLE_MARGIN)
    return (best_at + room) // PAGE_SIZE * PAGE_SIZE


def stack_limit(space: AddressSpace, start_stack: int) -> int | None:
    """The RLIMIT_STACK under which an exec puts mmap_base where the original had it; None without a stack.

    New mappings are placed below mmap_base: one too high lets them fill the room the stack still wants.  The kernel
    takes base = TASK_SIZE - limit - guard gap, without randomisation.
    """
    stack = next((vma for vma in space.vmas if vma.start <= start_stack < vma.end), None)
    if stack is None:
        return None
    below = [vma.end for vma in space.vmas if vma.end <= stack.start and vma.kind not in _KERNEL_MADE]
    if not below:
        return None
    return max(0, TASK_SIZE - max(below) - _STACK_GUARD_GAP)


def fd_key(vma: VmaState) -> FdKey | None:
    """What must be open to make this mapping."""
    if vma.kind in _KERNEL_MADE:
        return None
    writable = vma.shared and "mw" in vma.flags
    if vma.object is not None:
        return FdKey(True, vma.object, writable or not vma.shared)
    if vma.file is not None:
        return FdKey(False, vma.file, writable)
    return None


def needs(space: AddressSpace) -> list[FdKey]:
    """All that must be open."""
    keys = {key for key in map(fd_key, space.vmas) if key is not None}
    sysv = {one.id for one in space.objects if one.flavour == "sysv"}
    return sorted(key for key in keys if not (key.is_object and key.number in sysv))


def is_raised(vma: VmaState) -> bool:
    """Is it made writable at first, to get its own protection after it was filled?"""
    if vma.shared or vma.prot & PROT_WRITE or vma.kind in _KERNEL_MADE:
        return False
    # what is of a hugetlb pool the kernel accounts otherwise, and through its protection nobody can write
    return "ac" in vma.flags or vma.kind is VmaKind.HUGETLB


def is_filled_writable(vma: VmaState) -> bool:
    """Can its pages be written by process_vm_writev while it is being filled?"""
    return bool(vma.prot & PROT_WRITE) or is_raised(vma)


def wipe_steps(work: tuple[int, int]) -> list[Step]:
    """Empty the address space but for the work area."""
    start, end = work
    return [
        Step(Call(Nr.MUNMAP, (0, start)), "emptying the address space"),
        Step(Call(Nr.MUNMAP, (end, TASK_SIZE - end)), "emptying the address space"),
    ]


def scratch_bytes(space: AddressSpace) -> int:
    """Room that `mapping_steps` wants to attach System V segments in, beside the work area."""
    sysv = {one.id: one for one in space.objects if one.flavour == "sysv"}
    ends = [vma.offset + vma.end - vma.start for vma in space.vmas if vma.object in sysv]
    sizes = [_whole_pages(one) for one in sysv.values()]
    alignment = max([0, *(one.pool_page_bytes for one in sysv.values())])
    return -(-max([0, *ends, *sizes]) // PAGE_SIZE) * PAGE_SIZE + alignment


def _whole_pages(one: SharedObject) -> int:
    """Bytes of the pages that the object is made of."""
    page = one.pool_page_bytes or PAGE_SIZE
    return -(-one.size_bytes // page) * page


def mapping_steps(
    space: AddressSpace, fds: Mapping[FdKey, int], shmids: Mapping[int, int], scratch: int = 0
) -> list[Step]:
    """Make every mapping, and give the advice that must come before the content.

    Args:
        fds: descriptor of the new process for each of `needs`.
        shmids: System V id of each object of that flavour.
        scratch: address of `scratch_bytes` that are free now and later.
    """
    steps: list[Step] = []
    for vma in space.vmas:
        if vma.kind in _KERNEL_MADE or (vma.object is not None and vma.object in shmids):
            continue
        key = fd_key(vma)
        flags = MAP_FIXED_NOREPLACE | (MAP_SHARED if vma.shared else MAP_PRIVATE)
        if "dp" in vma.flags:
            flags = MAP_FIXED_NOREPLACE | MAP_DROPPABLE
        if key is None:
            flags |= MAP_ANONYMOUS
            if vma.kind is VmaKind.HUGETLB:
                flags |= hugetlb.MAP_HUGETLB | hugetlb.size_flag(vma.pool_page_bytes)
        if "gd" in vma.flags:
            flags |= MAP_GROWSDOWN
        if "nr" in vma.flags:
            flags |= MAP_NORESERVE
        prot = vma.prot | (PROT_WRITE if is_raised(vma) else 0)
        fd, offset = (-1, 0) if key is None else (fds[key], vma.offset)
        what = f"mapping {describe(vma)}"
        steps.append(Step(Call(Nr.MMAP, (vma.start, vma.end - vma.start, prot, flags, fd, offset)), what))
        steps += _advice_steps(vma)
    for one in space.objects:
        if one.id in shmids:
            parts = [vma for vma in space.vmas if vma.object == one.id]
            steps += _sysv_steps(parts, one, shmids[one.id], scratch)
    return steps


def _advice_steps(vma: VmaState) -> list[Step]:
    return [
        Step(
            Call(Nr.MADVISE, (vma.start, vma.end - vma.start, advice)),
            f"advice {advice} for {describe(vma)}",
            may_fail=True,
        )
        for flag, advice in _ADVICE.items()
        if flag in vma.flags and not ("dp" in vma.flags and flag in ("dd", "wf"))
    ]


def huge_steps(space: AddressSpace) -> list[Step]:
    """Make huge pages, before they are filled, where there were some that the program's own advice does not bring.

    A touch makes the page table that MADV_COLLAPSE (Linux 6.1) wants to see; it then works whatever the system's
    setting and leaves no advice behind, as MADV_HUGEPAGE would.
    """
    steps: list[Step] = []
    for vma in space.vmas:
        if not is_filled_writable(vma):
            continue
        for start, end in vma.huge:
            steps += [
                Step(
                    Call(Nr.MADVISE, (at, PAGE_SIZE, MADV_POPULATE_WRITE)), f"touching {at:x}", may_fail=True
                )
                for at in range(start, end, HUGE_PAGE_SIZE)
            ]
            args = (start, end - start, MADV_COLLAPSE)
            steps.append(
                Step(Call(Nr.MADVISE, args), f"making huge pages of {start:x}-{end:x}", may_fail=True)
            )
    return steps


def pool_steps(space: AddressSpace, held: Mapping[int, Runs]) -> list[Step]:
    """Take from the pools of huge pages what the process held as its own, also what is all zeroes.

    Where a mapping reserves nothing (MAP_NORESERVE) this is the moment at which a pool may turn out to be empty: here
    an error, at the program's own touch a SIGBUS.

    Args:
        held: runs of huge pages (their numbers, by `pool_page_bytes`) of each mapping, by its start.
    """
    return [
        Step(
            Call(Nr.MADVISE, (first * vma.pool_page_bytes, nr * vma.pool_page_bytes, MADV_POPULATE_WRITE)),
            f"taking {nr} pages of {vma.pool_page_bytes >> 10} KiB from their pool for {describe(vma)}",
        )
        for vma in space.vmas
        for first, nr in held.get(vma.start, NO_RUNS).tolist()
    ]


def _sysv_steps(vmas: Sequence[VmaState], one: SharedObject, shmid: int, scratch: int) -> list[Step]:
    """Attach a segment as often as it was attached, and bring each piece to its place.

    A program may have unmapped or moved pieces, mapped something else where they were, and grown the last one beyond
    the segment (mremap(2)): so a segment is attached where nothing else is, grown there, taken to pieces, and what
    nobody wants is unmapped.
    """
    steps: list[Step] = []
    size = _whole_pages(one)
    scratch = -(-scratch // (one.pool_page_bytes or PAGE_SIZE)) * (one.pool_page_bytes or PAGE_SIZE)
    attached: dict[int, list[VmaState]] = {}
    for vma in vmas:
        attached.setdefault(vma.start - vma.offset, []).append(vma)
    for _, parts in sorted(attached.items()):
        read_only = not any("mw" in vma.flags for vma in parts)
        flags = (SHM_RDONLY if read_only else 0) | (SHM_EXEC if parts[0].prot & _PROT_EXEC else 0)
        whole = (1 if read_only else 3) | (parts[0].prot & _PROT_EXEC)
        what = f"attaching {describe(parts[0])}"
        steps.append(Step(Call(Nr.SHMAT, (shmid, scratch, flags)), what))
        end = max(size, *(vma.offset + vma.end - vma.start for vma in parts))
        if end > size:
            steps.append(Step(Call(Nr.MREMAP, (scratch, size, end, 0, 0)), f"growing {describe(parts[-1])}"))
        for vma in parts:
            length = vma.end - vma.start
            args = (scratch + vma.offset, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, vma.start)
            steps.append(Step(Call(Nr.MREMAP, args), f"moving {describe(vma)}"))
            if vma.prot != whole:
                args_protect = (vma.start, length, vma.prot)
                steps.append(Step(Call(Nr.MPROTECT, args_protect), f"protecting {describe(vma)}"))
            steps += _advice_steps(vma)
        steps.append(Step(Call(Nr.MUNMAP, (scratch, end)), what))
    return steps


def vdso_start(space: AddressSpace) -> int | None:
    """Where the kernel's own mappings begin; None for a program without."""
    found = [vma.start for vma in space.vmas if vma.kind in (VmaKind.VDSO, VmaKind.VVAR)]
    return min(found) if found else None


def vdso_steps(space: AddressSpace) -> list[Step]:
    start = vdso_start(space)
    if start is None:
        return []
    return [Step(Call(Nr.ARCH_PRCTL, (ARCH_MAP_VDSO_64, start)), "mapping the vdso")]


def finishing_steps(space: AddressSpace, remote: Remote) -> list[Step]:
    """After the content: protection, locks, guards, names, seals."""
    steps: list[Step] = []
    for vma in space.vmas:
        if is_raised(vma):
            args = (vma.start, vma.end - vma.start, vma.prot)
            steps.append(Step(Call(Nr.MPROTECT, args), f"protecting {describe(vma)}"))
    # a guard marks its whole mapping, and a locked mapping takes none: lock first what has none
    for vma in sorted(space.vmas, key=lambda one: bool(one.guards)):
        steps += [
            Step(Call(Nr.MADVISE, (start, end - start, MADV_GUARD_INSTALL)), f"guarding {start:x}-{end:x}")
            for start, end in vma.guards
        ]
        if "lo" in vma.flags:
            flags = MLOCK_ONFAULT if _LOCK_ON_FAULT & vma.flags else 0
            lock_args = (vma.start, vma.end - vma.start, flags)
            steps.append(Step(Call(Nr.MLOCK2, lock_args), f"locking {describe(vma)}", may_fail=not vma.prot))
    for vma in space.vmas:
        prefix = "[anon_shmem:" if vma.shared else "[anon:"
        if vma.path.startswith(prefix):
            name = remote.put(vma.path[len(prefix) : -1].encode("utf-8", "surrogateescape") + b"\0")
            name_args = (PR_SET_VMA, PR_SET_VMA_ANON_NAME, vma.start, vma.end - vma.start, name)
            steps.append(Step(Call(Nr.PRCTL, name_args), f"naming {describe(vma)}", may_fail=True))
    steps += [
        Step(Call(Nr.MSEAL, (vma.start, vma.end - vma.start, 0)), f"sealing {describe(vma)}")
        for vma in space.vmas
        if "sl" in vma.flags and vma.kind not in _KERNEL_MADE
    ]
    return steps


def layout_fits(space: AddressSpace, ranges: Iterable[tuple[int, int]]) -> list[str]:
    """Which mappings of the image are not covered by `ranges` (the maps of the restored process)."""
    merged: list[list[int]] = []
    for start, end in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1][1] = end
        else:
            merged.append([start, end])
    return [
        describe(vma)
        for vma in space.vmas
        if vma.start < TASK_SIZE and not any(start <= vma.start and vma.end <= end for start, end in merged)
    ]
