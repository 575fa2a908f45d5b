# SPDX-License-Identifier: Apache-2.0
"""Memory policies as the kernel prints them, and as its calls take them."""

from __future__ import annotations

import pytest

from checkpointd.linux import mempolicy
from checkpointd.procfs import numa_maps
from checkpointd.state.memory import MemoryPolicy
from checkpointd.target.policies import Policies

TEXT = b"""00400000 default file=/usr/bin/a\\040b mapped=5 N0=5 kernelpagesize_kB=4
7f00 prefer:0 anon=1 dirty=1 N0=1 kernelpagesize_kB=4
8000 prefer (many)=relative:0-1,3 heap
9000 weighted interleave=static|balancing:2
a000 local stack
b000 bind:0
c000 novelty:0
d000 default
"""


def test_policies_are_parsed() -> None:
    assert dict(numa_maps.parse(TEXT)) == {
        0x400000: None,
        0x7F00: MemoryPolicy(1, (0,)),
        0x8000: MemoryPolicy(5 | 1 << 14, (0, 1, 3)),
        0x9000: MemoryPolicy(6 | 1 << 15 | 1 << 13, (2,)),
        0xA000: MemoryPolicy(4, ()),
        0xB000: MemoryPolicy(2, (0,)),
        0xD000: None,
    }


@pytest.mark.parametrize("nodes", [(), (0,), (0, 63, 64, 1023)])
def test_masks_hold_the_nodes(nodes: tuple[int, ...]) -> None:
    mask = mempolicy.pack_nodes(nodes)
    assert len(mask) == mempolicy.MASK_BYTES
    assert mempolicy.unpack_nodes(mask) == nodes


def test_policy_at_an_address() -> None:
    first, second = MemoryPolicy(2, (0,)), MemoryPolicy(3, (1,))
    policies = Policies(((0x1000, 0x3000, first), (0x5000, 0x6000, second)))
    wanted = {0xFFF: None, 0x1000: first, 0x2FFF: first, 0x3000: None, 0x5000: second, 0x6000: None}
    assert {at: policies.at(at) for at in wanted} == wanted
