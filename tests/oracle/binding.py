# SPDX-License-Identifier: Apache-2.0
"""The one module of the oracle that knows how checkpointd is called."""

from __future__ import annotations

import json
import shutil
import tempfile

import numpy as np

from checkpointd import tracepoint
from checkpointd.agent.protocol import RestoreArgs
from checkpointd.agent.restoring import restore
from checkpointd.dump.dump import Dumper, DumpOptions
from checkpointd.errors import Unsupported
from checkpointd.image.store import Store
from checkpointd.memory import VmaKind
from checkpointd.state import codec
from checkpointd.state.memory import AddressSpace
from checkpointd.stats import DumpStats
from tests.oracle.engine import U64, Generation, Pages, Refused


class _Image:
    """A generation of checkpointd, read through the store as restore reads it."""

    def __init__(self, store_path: str, stats: DumpStats) -> None:
        self.image_id = stats.image_id
        self._image = Store.open(store_path).load(stats.image_id)
        self.backend = stats.backend
        self.stats = stats.to_dict()
        space: AddressSpace = codec.decode(AddressSpace, json.loads(self._image.state)["address_space"])
        self.mappings = [
            (v.start, v.end, _prot(v.prot, v.shared), v.offset)
            for v in space.vmas
            if v.kind not in (VmaKind.VDSO, VmaKind.VVAR, VmaKind.VSYSCALL)
        ]
        self.objects = {
            (o.dev, o.inode, o.flavour == "sysv"): (o.id, (o.size_bytes + 4095) // 4096)
            for o in space.objects
        }
        self.guards = np.array(
            [page for v in space.vmas for a, b in v.guards for page in range(a >> 12, b >> 12)],
            dtype=np.uint64,
        )

    def pages(self, obj: int) -> U64:
        return self._image.pages(obj)

    def read(self, obj: int, pages: U64) -> Pages:
        return self._image.read(obj, pages)


def _prot(bits: int, shared: bool) -> str:
    return "".join(c if bits & b else "-" for c, b in (("r", 1), ("w", 2), ("x", 4))) + (
        "s" if shared else "p"
    )


class CheckpointdEngine:
    """checkpointd's own dump loop, in this process and on this thread.

    Args:
        backend: a tracker's name, or "auto".
        read_mode: "stopped", "fork" or "auto".
        delta: store changed pages of incremental dumps as differences.

    Attributes:
        nr_deltas: how many pages were stored so, in all dumps.
    """

    def __init__(self, backend: str = "auto", read_mode: str = "auto", *, delta: bool = False) -> None:
        self.name = f"{backend}/{read_mode}"
        self.nr_deltas = 0
        self._delta = delta
        compress = "zstd:1" if delta else "none"
        self._options = {"backend": backend, "read_mode": read_mode, "compress": compress}
        self._store = tempfile.mkdtemp(prefix="oracle-store-", dir="/dev/shm")
        Store.open(self._store, create=True)
        self._dumper: Dumper | None = None

    def dump(self, pid: int, *, incremental: bool) -> Generation:
        return _Image(self._store, self._dump(pid, incremental))

    def fail(self, pid: int) -> bool:
        tracepoint.register("dump.commit", _raise)
        try:
            self._dump(pid, True)
        except tracepoint.TracepointError:
            return True
        finally:
            tracepoint.clear()
        return False

    def restore(self, generation: Generation) -> int:
        """Bring a generation back (its process is dead) and go on from it; the pid."""
        assert isinstance(generation, _Image)
        if self._dumper is not None:
            self._dumper.close()
        args = RestoreArgs(store=self._store, image=generation.image_id, changed="allow")
        stats, self._dumper = restore(args, lambda *_: None)
        # children of the target map its shared memory
        warnings = [one for one in stats.warnings if not one.startswith("it shares memory")]
        if warnings:
            raise RuntimeError(f"restore: {warnings}")
        return stats.pid

    def close(self) -> None:
        if self._dumper is not None:
            self._dumper.close()
        shutil.rmtree(self._store, ignore_errors=True)

    def _dump(self, pid: int, incremental: bool) -> DumpStats:
        try:
            if self._dumper is None:
                self._dumper = Dumper(pid)
            delta = self._delta and incremental
            stats = self._dumper.dump(
                DumpOptions(store=self._store, incremental=incremental, delta=delta, **self._options)  # type: ignore[arg-type]
            )
            self.nr_deltas += stats.pages_delta
            return stats
        except Unsupported as error:
            raise Refused(f"{error}: {error.details}") from error


def _raise(name: str) -> None:
    raise tracepoint.TracepointError(name)
