# SPDX-License-Identifier: Apache-2.0
"""What a process keeps besides its memory and files, from the store and back, and in the dump after the restore."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpointd.dump.dump import Dumper, DumpOptions
from checkpointd.image.store import Store
from checkpointd.restore.restorer import RestoreOptions, restore_process
from checkpointd.restore.stub import Stub
from checkpointd.state import codec
from checkpointd.state.memory import MemoryPolicy
from checkpointd.state.process import ImageState
from tests.programs.restore_harness import kill_and_reap

PROGRAM = """
import ctypes, mmap, os, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
area = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
at = ctypes.addressof(ctypes.c_char.from_buffer(area))
area[4096] = 7
libc.syscall(237, ctypes.c_long(at), 16 * 4096, 3, struct.pack("=Q", 1), 64, 0)  # mbind, MPOL_INTERLEAVE
assert libc.prctl(33, 1, 1, 0, 0) == 0  # PR_MCE_KILL_EARLY
assert libc.mlockall(2 | 4) == 0
with open(sys.argv[1] + ".new", "w") as file:
    print(at, file=file)
os.rename(sys.argv[1] + ".new", sys.argv[1])
while True:
    time.sleep(0.01)
    area[8192] = (area[8192] + 1) % 256
"""


def attributes(store: Store, image_id: str, at: int) -> list[object]:
    state = codec.decode(ImageState, json.loads(store.load(image_id).state))
    leader = state.process.threads[0]
    policies = [(vma.start - at, vma.end - at, vma.policy) for vma in state.address_space.vmas if vma.policy]
    return [policies, leader.mce_kill, state.process.lock_future, leader.memory_policy]


@pytest.mark.needs("root", "ptrace", "set_tid")
@pytest.mark.parametrize("backend", ["auto", "content"])
def test_attributes_are_in_the_images_before_and_after_a_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    # on a machine of a single node nobody looks at memory policies
    monkeypatch.setattr("checkpointd.procfs.numa_maps.online_nodes", lambda: frozenset({0, 1}))
    told = tmp_path / "told"
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, told],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    while not told.exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    at = int(told.read_text())
    has_policies = Path("/proc/self/numa_maps").exists()
    wanted = [[(0, 16 * 4096, MemoryPolicy(3, (0,)))] if has_policies else [], 1, 2 | 4, None]
    store = Store.open(tmp_path / "store", create=True)
    options = DumpOptions(store=str(tmp_path / "store"), backend=backend)
    dumper = Dumper(child.pid)
    try:
        first = dumper.dump(options).image_id
        assert attributes(store, first, at) == wanted
        dumper.close()
        kill_and_reap(child)
        image = store.load(first)

        def arm(stub: Stub) -> None:
            nonlocal dumper
            dumper = Dumper(stub.pid)
            dumper.arm_restored(stub, first, backend)

        state = codec.decode(ImageState, json.loads(image.state))
        restored = restore_process(
            image, state, options=RestoreOptions(wait_for_ids_s=20, before_release=arm)
        )
        assert not [one for one in restored.warnings if "policy" in one or "lock" in one], restored.warnings
        second = dumper.dump(DumpOptions(store=options.store, backend=backend, incremental=True))
        assert second.incremental
        assert attributes(store, second.image_id, at) == wanted
    finally:
        dumper.close()
        kill_and_reap(child)
        kill_and_reap(child.pid)
