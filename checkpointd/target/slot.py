# SPDX-License-Identifier: Apache-2.0
"""The slot: a way into and out of a target that needs nobody's help.

A *slot* is 448 bytes (code and data, `blobs/slot.S`) written into padding at the end of an executable mapping.
Its code makes one system call, meets the tracer, undoes the call and puts the thread back to exactly where it was,
with the registers and the mask in its data.  The target only reads and executes it, so no mapping need be
writable, and a tracer that dies leaves a thread that finds its own way home.

Where it may lie: private r-x mappings only ([vdso], then the main program, then libraries), and only bytes that
belong to nobody: behind the end of the ELF segment (or image) in its last page, and zero.  A page written to
becomes a private copy; its live bytes do not change.

What a dead agent left: its slot stays behind in the padding.  The place is taken again only when no thread stands
in it, in a runner, or has an address inside it on its stack (a signal handler that was entered on the way home
returns there); else the new slot goes in front of it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from checkpointd.linux.process_vm import MemFile
from checkpointd.memory import PAGE_SIZE, Vma, VmaKind
from checkpointd.target.blobs import RUNNER, SLOT, SLOT_DATA, SLOT_ENTRY, SLOT_RESTORE, SLOT_UNDO
from checkpointd.target.registers import UserRegs

SLOT_SIZE = len(SLOT)
_MAGIC = SLOT[:8]
_DATA = struct.Struct("=20Q4IQ")
_SAVED = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("rsp", "rip", "eflags"),
)
_READ_EXEC = 5
_STACK_SCAN_BYTES = 1 << 20

_PT_LOAD, _PT_NOTE = 1, 4
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")


@dataclass(frozen=True, slots=True)
class SlotPlace:
    """Where a slot may be written, and in which mapping."""

    address: int
    where: str
    stale: bool = False
    """A dead agent's slot lies there, and nobody will ever come to it."""

    @property
    def entry(self) -> int:
        return self.address + SLOT_ENTRY

    @property
    def rendezvous_a(self) -> int:
        return self.address + SLOT_UNDO

    @property
    def undo(self) -> int:
        return self.address + SLOT_UNDO

    @property
    def rendezvous_b(self) -> int:
        return self.address + SLOT_RESTORE


def slot_bytes(home: UserRegs, mask: int, map_size: int, ids: tuple[int, int], signum: int) -> bytes:
    """A slot that leads to `home` with the blocked signals `mask`.

    Args:
        home: user-mode registers (see `registers.home_context`).
        map_size: bytes to unmap at the address the first call returned; 0 unmaps nothing.
        ids: pid and tid in the target's own pid namespace.
        signum: what a rendezvous sends; 0 sends nothing.
    """
    saved = (getattr(home, name) for name in _SAVED)
    data = _DATA.pack(*saved, mask, map_size, *ids, signum, 0, (1 << 64) - 1)
    return SLOT[:SLOT_DATA] + data


@dataclass(frozen=True, slots=True)
class _Elf:
    """What we need of an ELF image in memory: its load bias and program headers (type, flags, offset, vaddr, sizes)."""

    bias: int
    headers: tuple[tuple[int, int, int, int, int, int], ...]
    image_end: int  # address behind the last byte the file describes, section headers included


def _read_elf(mem: MemFile, base: int, room: int) -> _Elf | None:
    """The ELF image whose first page lies at `base`; None when it is none."""
    try:
        head = mem.read(base, min(room, PAGE_SIZE))
        fields = _EHDR.unpack_from(head)
        ident, phoff, shoff, phentsize, phnum, shentsize, shnum = (
            fields[n] for n in (0, 5, 6, 9, 10, 11, 12)
        )
        if ident[:5] != b"\x7fELF\x02" or phentsize != _PHDR.size or phoff + phnum * phentsize > room:
            return None
        table = mem.read(base + phoff, phnum * phentsize)
    except (OSError, struct.error):
        return None
    headers = []
    for n in range(phnum):
        p_type, flags, offset, vaddr, _, filesz, memsz, _ = _PHDR.unpack_from(table, n * phentsize)
        headers.append((p_type, flags, offset, vaddr, filesz, memsz))
    loads = [header for header in headers if header[0] == _PT_LOAD]
    if not loads:
        return None
    first = min(loads, key=lambda header: header[3])
    bias = base - (first[3] - first[2])  # the page at `base` is offset 0 of the file
    image_end = max([shoff + shnum * shentsize] + [header[2] + header[4] for header in headers])
    return _Elf(bias, tuple(headers), base + image_end)


def _elf_of(mem: MemFile, vma: Vma, vmas: Sequence[Vma]) -> _Elf | None:
    bases = [
        other
        for other in vmas
        if other.offset == 0
        and (other.dev, other.inode) == (vma.dev, vma.inode)
        and other.start <= vma.start
        and other.prot & 1
    ]
    if not bases:
        return None
    base = max(bases, key=lambda other: other.start)
    return _read_elf(mem, base.start, base.end - base.start)


def _padding_start(mem: MemFile, vma: Vma, vmas: Sequence[Vma]) -> int:
    """First address of the mapping's tail that belongs to nobody; its end when there is none (that we know of)."""
    if vma.kind is VmaKind.VDSO:
        elf = _read_elf(mem, vma.start, vma.end - vma.start)
        return max(elf.image_end, vma.start) if elf is not None else vma.end
    elf = _elf_of(mem, vma, vmas)
    if elf is None:
        return vma.end
    for p_type, flags, _, vaddr, filesz, memsz in elf.headers:
        if p_type != _PT_LOAD or not flags & 1:
            continue
        segment_end = elf.bias + vaddr + max(filesz, memsz)
        if vma.end - PAGE_SIZE < segment_end <= vma.end:
            return segment_end
    return vma.end


def _hosts(vmas: Sequence[Vma], exe: tuple[tuple[int, int], int] | None) -> Iterator[Vma]:
    """Private r-x mappings of ELF images, best first."""

    def rank(vma: Vma) -> int:
        if vma.kind is VmaKind.VDSO:
            return 0
        return 1 if (vma.dev, vma.inode) == exe else 2

    fit = (
        vma
        for vma in vmas
        if vma.prot == _READ_EXEC
        and not vma.shared
        and (vma.kind is VmaKind.VDSO or (vma.kind is VmaKind.FILE_PRIVATE and vma.inode))
    )
    return iter(sorted(fit, key=rank))


def exe_identity(pid: int) -> tuple[tuple[int, int], int] | None:
    """((major, minor), inode) of the main program, as in maps; None when it cannot be told."""
    try:
        info = os.stat(f"/proc/{pid}/exe")
    except OSError:
        return None
    return (os.major(info.st_dev), os.minor(info.st_dev)), info.st_ino


def is_go_program(mem: MemFile, vmas: Sequence[Vma], exe: tuple[tuple[int, int], int] | None) -> bool:
    """Does the main program carry Go's build id note?"""
    for vma in vmas:
        if (vma.dev, vma.inode) != exe or vma.offset:
            continue
        elf = _read_elf(mem, vma.start, vma.end - vma.start)
        for p_type, _, offset, _, filesz, _ in elf.headers if elf is not None else ():
            if p_type == _PT_NOTE and offset + 16 <= vma.end - vma.start and filesz >= 16:
                try:
                    note = mem.read(vma.start + offset, 16)
                except OSError:
                    continue
                if note[8:16] == struct.pack("<I", 4) + b"Go\0\0":
                    return True
    return False


class LeftBehind:
    """Code of ours in the target that a thread may stand in: slots and runners of dead agents."""

    def __init__(self, mem: MemFile) -> None:
        self._mem = mem
        self._pages: dict[int, bytes] = {}

    def holds(self, rip: int) -> bool:
        """Is `rip` inside one?"""
        page_at = rip & ~(PAGE_SIZE - 1)
        if page_at not in self._pages:
            try:
                self._pages[page_at] = self._mem.read(page_at, PAGE_SIZE)
            except OSError:
                self._pages[page_at] = b""
        page = self._pages[page_at]
        if page.startswith(RUNNER):
            return True
        at = page.find(SLOT[:SLOT_DATA])
        while at >= 0:
            if page_at + at <= rip < page_at + at + SLOT_SIZE:
                return True
            at = page.find(SLOT[:SLOT_DATA], at + SLOT_SIZE)
        return False


def _points_into(
    mem: MemFile, vmas: Sequence[Vma], threads: Iterable[UserRegs], start: int, end: int
) -> bool:
    """Does any live stack hold an address of [start, end)?  Over-careful: any such word counts."""
    for regs in threads:
        stack = next((vma for vma in vmas if vma.start <= regs.rsp < vma.end), None)
        if stack is None:
            continue
        at = regs.rsp & ~7
        try:
            words = np.frombuffer(mem.read(at, min(stack.end - at, _STACK_SCAN_BYTES)), dtype=np.uint64)
        except OSError:
            return True
        if bool(((words >= start) & (words < end)).any()):
            return True
    return False


def find_places(
    mem: MemFile,
    vmas: Sequence[Vma],
    threads: Sequence[UserRegs],
    exe: tuple[tuple[int, int], int] | None,
    nr_wanted: int,
) -> list[SlotPlace]:
    """Places for slots, best first; empty when the target has no padding to spare.

    Args:
        threads: registers of every thread of the (frozen) target.
        nr_wanted: look at no further mapping once there are so many.
    """
    places: list[SlotPlace] = []
    somebody_runs_ours: bool | None = None
    for vma in _hosts(vmas, exe):
        if len(places) >= nr_wanted:
            break
        floor = max(_padding_start(mem, vma, vmas), vma.end - PAGE_SIZE)
        if vma.end - floor < SLOT_SIZE:
            continue
        try:
            tail = mem.read(floor, vma.end - floor)
        except OSError:
            continue
        for at in range(vma.end - SLOT_SIZE, floor - 1, -SLOT_SIZE):
            content = tail[at - floor : at - floor + SLOT_SIZE]
            if content.startswith(_MAGIC):
                # several of a thread's ways home may lead through a runner to any slot: then none is touched
                if somebody_runs_ours is None:
                    left_behind = LeftBehind(mem)
                    somebody_runs_ours = any(left_behind.holds(regs.rip) for regs in threads)
                if somebody_runs_ours or _points_into(mem, vmas, threads, at, at + SLOT_SIZE):
                    continue
            elif any(content):
                continue
            places.append(SlotPlace(at, vma.path or "anonymous", content.startswith(_MAGIC)))
    return places
