# SPDX-License-Identifier: Apache-2.0
"""NUMA memory policies: node masks as get_mempolicy(2), set_mempolicy(2) and mbind(2) take them.

Source: set_mempolicy(2), mbind(2), Linux mm/mempolicy.c (get_nodes, kernel_get_mempolicy).
"""

from __future__ import annotations

from collections.abc import Iterable

from checkpointd.linux._libc import syscall
from checkpointd.linux.arch import Nr
from checkpointd.state.memory import MemoryPolicy

NR_MASK_BITS = (
    1024  # the most nodes a kernel has (CONFIG_NODES_SHIFT=10); it refuses a mask for fewer than it has
)
MASK_BYTES = NR_MASK_BITS // 8


def pack_nodes(nodes: Iterable[int]) -> bytes:
    """A mask of `MASK_BYTES`, to be given with `NR_MASK_BITS` + 1: the kernel takes one off where it reads a mask."""
    return sum(1 << node for node in nodes).to_bytes(MASK_BYTES, "little")


def unpack_nodes(mask: bytes) -> tuple[int, ...]:
    bits = int.from_bytes(mask, "little")
    return tuple(node for node in range(bits.bit_length()) if bits >> node & 1)


def unpack_policy(mode: int, mask: bytes) -> MemoryPolicy | None:
    """What get_mempolicy(2) answered; None for the default."""
    return MemoryPolicy(mode, unpack_nodes(mask)) if mode else None


def own_policy() -> MemoryPolicy | None:
    """Of our thread; None for the default, and where the kernel has no policies."""
    mode, mask = bytearray(4), bytearray(MASK_BYTES)
    try:
        syscall(Nr.GET_MEMPOLICY, mode, mask, NR_MASK_BITS, 0, 0, name="get_mempolicy")
    except OSError:
        return None
    return unpack_policy(int.from_bytes(mode, "little"), bytes(mask))
