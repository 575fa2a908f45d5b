# SPDX-License-Identifier: Apache-2.0
"""Mappings described before a freeze: taken over while they are true, of this very process."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointd.memory import NO_RUNS, PAGE_SIZE, Vma, VmaKind
from checkpointd.procfs import maps
from checkpointd.state.memory import AddressSpace
from checkpointd.target.memory import SpaceDraft, capture_address_space, prepare_address_space

PROGRAM = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    area = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path() -> Iterator[Path]:
    """A file of two pages, not on a tmpfs (that would be shared memory)."""
    made = Path(f"/var/tmp/space-draft-{os.getpid()}")
    made.write_bytes(bytes(2 * PAGE_SIZE))
    yield made
    made.unlink()


@pytest.fixture
def pid(path: Path) -> Iterator[int]:
    """A process that maps it."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as made:
        assert made.stdout is not None
        made.stdout.readline()
        yield made.pid


def _capture(pid: int, vmas: tuple[Vma, ...], draft: SpaceDraft | None) -> AddressSpace:
    return capture_address_space(pid, vmas, NO_RUNS, draft=draft).space


def test_what_was_described_before_is_taken_over(pid: int) -> None:
    vmas = tuple(maps.read_smaps(pid))
    draft = prepare_address_space(pid, vmas)
    assert draft is not None
    captured = _capture(pid, vmas, draft)
    assert captured.vmas is draft.states
    assert captured == _capture(pid, vmas, None)
    others = tuple(maps.read_smaps(pid))  # equal, but nobody has found that out
    assert _capture(pid, others, draft).vmas is not draft.states


@pytest.mark.parametrize("change", ["written", "longer"])
def test_a_file_that_changed_meanwhile_is_described_anew(pid: int, path: Path, change: str) -> None:
    vmas = tuple(maps.read_smaps(pid))
    draft = prepare_address_space(pid, vmas)
    if change == "longer":
        os.truncate(path, 5 * PAGE_SIZE)
    else:
        os.utime(path, ns=(1, 1))
    captured = _capture(pid, vmas, draft)
    assert captured == _capture(pid, vmas, None)
    (file,) = [one for one in captured.files if one.path == str(path)]
    if change == "longer":
        assert file.size_bytes == 5 * PAGE_SIZE
    else:
        assert file.mtime_ns == 1


def test_shared_memory_is_never_described_before() -> None:
    with mmap.mmap(-1, PAGE_SIZE):  # MAP_SHARED
        vmas = tuple(vma for vma in maps.read_smaps(os.getpid()) if vma.kind is VmaKind.SHMEM)
        assert vmas
        assert prepare_address_space(os.getpid(), vmas) is None
