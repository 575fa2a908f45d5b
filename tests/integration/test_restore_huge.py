# SPDX-License-Identifier: Apache-2.0
"""Memory that lay in huge pages lies in huge pages again, however it had come to that."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpointd.procfs import maps
from checkpointd.restore import plan
from demo.command import Checkpoint
from tests.programs.restore_harness import Captured, capture, restore
from tests.programs.rounds import RoundsTarget

pytestmark = pytest.mark.needs("root", "ptrace", "set_tid", "transparent_huge")

MIB = 1 << 20
SIZE = 16 * MIB
# advised: MADV_HUGEPAGE before the first touch; collapsed: without advice, by MADV_COLLAPSE; mixed: every second
# huge page of it, so that those between must not become huge
PROGRAM = """
import ctypes, hashlib, mmap, sys, time
how, out = sys.argv[1:3]
size, huge = 16 << 20, 2 << 20
m = mmap.mmap(-1, size + 2 * huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
at = ctypes.addressof(ctypes.c_char.from_buffer(m))
first = -at % huge
block = hashlib.sha256(how.encode()).digest() * 32768
if how == "advised":
    m.madvise(14, 0, len(m))
for n in range(first, first + size, huge):
    m[n] = 1
libc = ctypes.CDLL(None, use_errno=True)
for n in range(first, first + size, huge * (2 if how == "mixed" else 1)):
    if how != "advised" and libc.madvise(ctypes.c_void_p(at + n), ctypes.c_size_t(huge), 25):
        raise OSError(ctypes.get_errno(), "MADV_COLLAPSE")
for n in range(first, first + size, len(block)):
    m[n : n + len(block)] = block
want = hashlib.sha256(m[first : first + size]).hexdigest()
number = 0
while True:
    number += 1
    ok = hashlib.sha256(m[first : first + size]).hexdigest() == want
    with open(out, "w") as file:
        file.write(f"{number} {int(ok)} {at + first}")
    time.sleep(0.02)
"""


class Target(RoundsTarget):
    """Its third number is where the memory in question lies."""

    def __init__(self, how: str, directory: Path) -> None:
        super().__init__(PROGRAM, directory, how)
        self.where = self.wait_rounds(1)[2]

    def memory(self) -> maps.Vma:
        """The mapping in question."""
        at = self.where
        return next(vma for vma in maps.read_smaps(self.pid) if vma.start <= at < vma.end)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Target]]:
    started: list[Target] = []

    def run(how: str) -> Target:
        started.append(Target(how, tmp_path))
        return started[-1]

    yield run
    for target in started:
        target.kill()


def _thp_always() -> bool:
    return "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()


@pytest.mark.parametrize("how,least", [("advised", SIZE), ("collapsed", SIZE), ("mixed", SIZE // 2)])
def test_huge_memory_comes_back_huge(start: Callable[[str], Target], how: str, least: int) -> None:
    target = start(how)
    before = target.memory()
    assert before.huge_bytes >= least
    assert how != "mixed" or before.huge_bytes == least or _thp_always()
    captured: Captured = capture(target.pid, kill=True)
    target.kill()
    warnings = restore(captured).warnings
    after = target.memory()
    assert not any("huge" in warning for warning in warnings)
    assert after.huge_bytes == before.huge_bytes
    assert after.flags == before.flags
    target.wait_rounds(2)


def test_huge_memory_comes_back_huge_through_the_command(
    start: Callable[[str], Target], tmp_path: Path
) -> None:
    command = Checkpoint(tmp_path)
    try:
        target = start("collapsed")
        before = target.memory()
        command.dump(target.pid)
        last = command.dump(target.pid, "--incremental")["image_id"]
        target.kill()
        assert command.restore(last)["pid"] == target.pid
        assert target.memory().huge_bytes == before.huge_bytes >= SIZE
        target.wait_rounds(2)
    finally:
        command.close()


@pytest.mark.skipif(_thp_always(), reason="this system makes huge pages by itself")
def test_only_what_was_huge_is_made_huge(start: Callable[[str], Target]) -> None:
    target = start("mixed")
    captured = capture(target.pid, kill=True)
    target.kill()
    space = captured.state.address_space
    restore(captured)
    huge = [one for vma in space.vmas for one in vma.huge]
    assert sum(end - start for start, end in huge) == SIZE // 2
    assert len([s for s in plan.huge_steps(space) if s.call.args[2] == plan.MADV_COLLAPSE]) == len(huge)
    target.wait_rounds(1)


def test_restore_goes_on_where_no_huge_page_can_be_had(
    start: Callable[[str], Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = start("collapsed")
    captured = capture(target.pid, kill=True)
    target.kill()
    monkeypatch.setattr(plan, "MADV_COLLAPSE", 9999)  # as a kernel without it answers: EINVAL
    warnings = restore(captured).warnings
    assert any("came back in small ones" in warning for warning in warnings)
    assert _thp_always() or target.memory().huge_bytes == 0
    target.wait_rounds(2)
    assert os.path.exists(f"/proc/{target.pid}")
