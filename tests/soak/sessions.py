# SPDX-License-Identifier: Apache-2.0
"""What the victims of the kill campaign do to a target: everything freeze and injection offer.

Each session, when nobody kills it, leaves the target exactly as it was.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from checkpointd.errors import Unsupported
from checkpointd.linux.process_vm import read_mem
from checkpointd.target import fork
from checkpointd.target.freeze import freeze
from checkpointd.target.remote import Call, Result

NR_GETPID, NR_GETTID, NR_CLOSE, NR_MMAP, NR_MUNMAP, NR_EVENTFD2, NR_SIGALTSTACK = 39, 186, 3, 9, 11, 290, 131


def plain(pid: int) -> None:
    """Freeze and thaw, three times."""
    for _ in range(3):
        with freeze(pid):
            pass


def inject(pid: int) -> None:
    """Open a descriptor and a mapping in the target, use them, take them away; outgrow the scratch; ask a thread."""
    with freeze(pid) as frozen:
        with frozen.inject() as remote:
            take = [Call(NR_EVENTFD2, (0, 0)), Call(NR_MMAP, (0, 8192, 3, 0x22, -1, 0))]
            undo = [Call(NR_CLOSE, (Result(0),)), Call(NR_MUNMAP, (Result(1), 8192))]
            fd, area = remote.batch(take, undo=undo)
            assert fd >= 0 and area > 0
            give_back = [Call(NR_CLOSE, (fd,)), Call(NR_MUNMAP, (area, 8192))]
            address = remote.put(bytes(range(256)) * 80)
            results = remote.batch([Call(NR_GETPID)] * 150, undo=give_back)
            assert len(set(results)) == 1
            assert remote.read(address, 256) == bytes(range(256))
            assert remote.batch(give_back) == [0, 0]
            others = [tid for tid in frozen.threads if tid != pid][:2]
            for tid in others:
                stack = remote.alloc(24)
                calls = [Call(NR_GETTID), Call(NR_SIGALTSTACK, (0, stack))]
                try:
                    assert remote.batch(calls, tid=tid)[1] == 0
                except Unsupported as error:
                    # one place only, and the leader has it: a small static program whose vdso is full
                    assert "unused room" in error.message


def twice(pid: int) -> None:
    """Two injections in one freeze, and another freeze right behind."""
    for _ in range(2):
        with freeze(pid) as frozen:
            for _ in range(2):
                with frozen.inject() as remote:
                    remote.call(NR_GETPID)


def copy(pid: int) -> None:
    """A forked copy: made, read while the target runs, ended, reaped; zombies of dead agents too."""
    with freeze(pid) as frozen:
        rsp = frozen.leader.regs.rsp & ~0xFFF
        with frozen.inject() as remote:
            fork.reap_strays(remote, surely=False)
            child = frozen.child_fork(remote)
    with child:
        read_mem(child.pid, rsp, 4096)
    with freeze(pid) as frozen:
        assert frozen.reap_copy(child)


def fail(pid: int) -> None:
    """An exception in the middle: the undo table runs."""
    try:
        with freeze(pid) as frozen, frozen.inject() as remote:
            remote.batch([Call(NR_EVENTFD2, (0, 0))], undo=[Call(NR_CLOSE, (Result(0),))])
            raise KeyError("on purpose")
    except KeyError:
        pass


def clean(pid: int) -> int:
    """Reap what dead agents left; how many zombies."""
    with freeze(pid) as frozen, frozen.inject() as remote:
        return fork.reap_strays(remote, surely=False)


def dump(pid: int) -> None:
    """Track, a full dump, an incremental one, untrack: the whole agent's work, in a store of its own."""
    from checkpointd.dump.dump import DumpOptions, dumper
    from checkpointd.image.store import Store

    with tempfile.TemporaryDirectory(dir=os.environ.get("SOAK_STORES")) as folder:
        store = str(Path(folder) / "store")
        with dumper(pid) as one:
            Store.open(store, create=True)
            one.track()
            one.dump(DumpOptions(store=store, read_mode="stopped"))
            one.dump(DumpOptions(store=store, incremental=True, read_mode="fork"))
            one.untrack()


ALL = {"plain": plain, "inject": inject, "twice": twice, "copy": copy, "fail": fail, "dump": dump}
