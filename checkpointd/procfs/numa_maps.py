# SPDX-License-Identifier: Apache-2.0
"""/proc/PID/numa_maps: the memory policy of each mapping; and which nodes there are.

A mapping without a policy of its own shows that of the thread whose file is read; which of the two it is cannot be
told where they are equal.  `read` raises OSError (ENOENT also where the kernel has no NUMA).

Source: numa(7); Linux fs/proc/task_mmu.c (show_numa_map), mm/mempolicy.c (mpol_to_str).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from checkpointd.state.memory import MemoryPolicy

_MODES = {
    b"default": 0, b"prefer": 1, b"bind": 2, b"interleave": 3, b"local": 4, b"prefer (many)": 5,
    b"weighted interleave": 6,
}  # fmt: skip
_FLAGS = {b"static": 1 << 15, b"relative": 1 << 14, b"balancing": 1 << 13}
_ONLINE = Path("/sys/devices/system/node/online")
_LINE = re.compile(
    rb"^([0-9a-f]+) (prefer \(many\)|weighted interleave|[a-z]+)(?:=([a-z|]*))?(?::([\d,-]*))?(?: |$)",
    re.MULTILINE,
)


def read(pid: int) -> dict[int, MemoryPolicy | None]:
    """Policy by the start of the mapping.  Walks the page tables: about 10 ns a page, as smaps does."""
    with open(f"/proc/{pid}/numa_maps", "rb") as file:
        return dict(parse(file.read()))


def parse(text: bytes) -> Iterator[tuple[int, MemoryPolicy | None]]:
    """(start, policy) of each mapping; None for the default.  A word of a newer kernel is left out."""
    for start, word, flags, nodes in _LINE.findall(text):
        mode = _MODES.get(word)
        if mode is None:
            continue
        for flag in filter(None, flags.split(b"|")):
            mode |= _FLAGS.get(flag, 0)
        yield int(start, 16), MemoryPolicy(mode, tuple(_nodes(nodes))) if mode else None


def online_nodes() -> frozenset[int]:
    try:
        return frozenset(_nodes(_ONLINE.read_bytes().strip()))
    except FileNotFoundError:
        return frozenset({0})


def _nodes(text: bytes) -> Iterator[int]:
    for part in filter(None, text.split(b",")):
        first, _, last = part.partition(b"-")
        yield from range(int(first), int(last or first) + 1)
