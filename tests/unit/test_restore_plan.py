# SPDX-License-Identifier: Apache-2.0
"""What a restore will do, worked out without doing it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from checkpointd.errors import Unsupported
from checkpointd.linux.arch import Nr
from checkpointd.memory import TASK_SIZE, VmaKind
from checkpointd.restore import blobs, plan
from checkpointd.restore.plan import FdKey
from checkpointd.state.memory import AddressSpace, FileIdentity, SharedObject, VmaState

MIB = 1 << 20
BLOBS = Path(blobs.__file__).parent


def vma(start: int, end: int, prot: int = 3, **more: object) -> VmaState:
    fields: dict[str, object] = {
        "shared": False,
        "offset": 0,
        "kind": VmaKind.ANON,
        "path": "",
        "flags": frozenset({"ac"}),
    }
    return VmaState(start=start, end=end, prot=prot, **{**fields, **more})  # type: ignore[arg-type]


def space(*vmas: VmaState, objects: tuple[SharedObject, ...] = ()) -> AddressSpace:
    return AddressSpace(vmas, (FileIdentity("/bin/x", (8, 1), 1, 1, 1),), objects)


def calls(steps: list[plan.Step]) -> list[tuple[int, tuple[int, ...]]]:
    return [(int(step.call.nr), tuple(int(arg) for arg in step.call.args)) for step in steps]  # type: ignore[arg-type]


def test_work_area_overlaps_no_mapping() -> None:
    vmas = [
        vma(0x400000, 0x500000),
        vma(0x5555_0000_0000, 0x5555_1000_0000),
        vma(0x7FFF_0000_0000, TASK_SIZE),
    ]
    at = plan.find_hole(space(*vmas), 4 * MIB, 0x10000)
    assert at % 4096 == 0
    assert all(at + 4 * MIB <= one.start or at >= one.end for one in vmas)


def test_work_area_needs_room() -> None:
    with pytest.raises(Unsupported, match="no gap"):
        plan.find_hole(space(vma(0x10000, TASK_SIZE - MIB)), 4 * MIB, 0x10000)


def test_stack_limit_puts_mmap_base_at_the_highest_mapping_below_the_stack() -> None:
    stack = vma(0x7FFF_0000_0000, 0x7FFF_0010_0000, path="[stack]")
    top = 0x7F55_4000_0000
    found = plan.stack_limit(space(vma(top - MIB, top), stack), stack.start + 0x1000)
    assert found == TASK_SIZE - top - MIB  # the kernel adds a guard gap of 1 MiB again


def test_no_stack_no_limit() -> None:
    assert plan.stack_limit(space(vma(0x400000, 0x500000)), 0) is None


def test_private_read_only_memory_that_was_writable_is_filled_first() -> None:
    was_writable = vma(0x1000000, 0x1002000, prot=1)
    never = vma(0x2000000, 0x2002000, prot=1, flags=frozenset({"mr"}))
    made = calls(plan.mapping_steps(space(was_writable, never), {}, {}))
    assert [args[2] for _, args in made] == [3, 1]
    finishing = list(plan.finishing_steps(space(was_writable, never), None))  # type: ignore[arg-type]
    assert calls(finishing) == [(int(Nr.MPROTECT), (0x1000000, 0x2000, 1))]


def test_reservations_are_not_made_writable() -> None:
    """64 GiB of PROT_NONE must not be charged against the overcommit limit."""
    reserve = vma(0x10_0000_0000, 0x20_0000_0000, prot=0, flags=frozenset({"nr"}))
    ((_, args),) = calls(plan.mapping_steps(space(reserve), {}, {}))
    assert args[2] == 0
    assert args[3] & plan.MAP_NORESERVE


def test_shared_file_is_opened_as_the_mapping_may_write() -> None:
    writable = vma(0x1000, 0x2000, shared=True, kind=VmaKind.FILE_SHARED, file=0, flags=frozenset({"mw"}))
    read_only = vma(0x3000, 0x4000, prot=1, shared=True, kind=VmaKind.FILE_SHARED, file=0, flags=frozenset())
    assert plan.needs(space(writable, read_only)) == [FdKey(False, 0, False), FdKey(False, 0, True)]


def test_kernel_mappings_are_left_to_the_kernel() -> None:
    vdso = vma(0x7FFF_F000_2000, 0x7FFF_F000_4000, prot=5, kind=VmaKind.VDSO, path="[vdso]")
    vvar = vma(0x7FFF_F000_0000, 0x7FFF_F000_2000, prot=1, kind=VmaKind.VVAR, path="[vvar]")
    assert plan.mapping_steps(space(vvar, vdso), {}, {}) == []
    ((nr, args),) = calls(plan.vdso_steps(space(vvar, vdso)))
    assert (nr, args[1]) == (Nr.ARCH_PRCTL, vvar.start)


def segment_part(start: int, end: int, offset: int) -> VmaState:
    return vma(start, end, shared=True, kind=VmaKind.SHMEM, object=3, offset=offset, flags=frozenset({"mw"}))


def test_system_v_segment_is_attached_once_for_each_base_and_taken_to_pieces() -> None:
    segment = SharedObject(3, "sysv", "/SYSV00000000", (0, 1), 7, 8 * 4096)
    wanted = space(
        segment_part(0x100000, 0x102000, 0), segment_part(0x104000, 0x106000, 0x4000), objects=(segment,)
    )
    assert plan.scratch_bytes(wanted) == 0x8000
    assert calls(plan.mapping_steps(wanted, {}, {3: 77}, 0x900000)) == [
        (int(Nr.SHMAT), (77, 0x900000, 0)),
        (int(Nr.MREMAP), (0x900000, 0x2000, 0x2000, 3, 0x100000)),
        (int(Nr.MREMAP), (0x904000, 0x2000, 0x2000, 3, 0x104000)),
        (int(Nr.MUNMAP), (0x900000, 0x8000)),
    ]


def test_system_v_segment_that_was_grown_is_grown_again() -> None:
    segment = SharedObject(3, "sysv", "/SYSV00000000", (0, 1), 7, 2 * 4096 - 7)
    wanted = space(segment_part(0x100000, 0x105000, 0), objects=(segment,))
    assert plan.scratch_bytes(wanted) == 0x5000
    assert calls(plan.mapping_steps(wanted, {}, {3: 77}, 0x900000)) == [
        (int(Nr.SHMAT), (77, 0x900000, 0)),
        (int(Nr.MREMAP), (0x900000, 0x2000, 0x5000, 0, 0)),
        (int(Nr.MREMAP), (0x900000, 0x5000, 0x5000, 3, 0x100000)),
        (int(Nr.MUNMAP), (0x900000, 0x5000)),
    ]


def test_what_the_kernel_mapped_elsewhere_is_noticed() -> None:
    wanted = space(vma(0x1000, 0x3000), vma(0x5000, 0x6000))
    assert plan.layout_fits(wanted, [(0x1000, 0x2000), (0x2000, 0x4000), (0x5000, 0x6000)]) == []
    assert len(plan.layout_fits(wanted, [(0x1000, 0x4000)])) == 1


@pytest.mark.skipif(not shutil.which("as") or not shutil.which("objcopy"), reason="needs binutils")
@pytest.mark.parametrize(
    "name,code", [("spawn", blobs.SPAWN), ("runner", blobs.RUNNER), ("stub", blobs.STUB_ELF)]
)
def test_machine_code_is_what_its_source_says(tmp_path: Path, name: str, code: bytes) -> None:
    subprocess.run(["as", "-o", tmp_path / "o", BLOBS / f"{name}.S"], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "o", tmp_path / "bin"], check=True)
    assert (tmp_path / "bin").read_bytes() == code


def test_places_in_the_machine_code() -> None:
    assert blobs.RUNNER[blobs.RUNNER_ONE : blobs.RUNNER_ONE + 3] == b"\x0f\x05\xcc"
    assert blobs.RUNNER[blobs.RUNNER_AMX : blobs.RUNNER_AMX + 5] == b"\xc4\xe2\x78\x49\x03"
    at = blobs.STUB_SYSCALL - 0x10000
    assert blobs.STUB_ELF[at : at + 2] == b"\x0f\x05"
