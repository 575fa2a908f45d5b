# SPDX-License-Identifier: Apache-2.0
"""State out: which memory policies (NUMA) the mappings of a process have.

Read before the freeze: the one file that tells, numa_maps, walks all page tables (11 to 20 ms a GiB).  A policy that is
given between the look and the freeze is missed; like advice it steers where pages are placed, never what is in them.
So on a machine of one node, where they have no effect, nobody looks.

Source: mbind(2), set_mempolicy(2), numa(7).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from checkpointd.memory import Vma, VmaKind
from checkpointd.procfs import numa_maps
from checkpointd.state.memory import MemoryPolicy


@dataclass(frozen=True, slots=True)
class Policies:
    """What was found.

    Attributes:
        ranges: (start, end, policy) of the mappings that differ from the main thread, ascending.
        matter: any thread may have one: on a machine of several nodes.
    """

    ranges: tuple[tuple[int, int, MemoryPolicy], ...] = ()
    matter: bool = False

    def at(self, address: int) -> MemoryPolicy | None:
        """That of the mapping which holds the address; None where the thread's holds."""
        index = bisect.bisect_right(self.ranges, address, key=lambda one: one[0]) - 1
        if index < 0:
            return None
        _, end, policy = self.ranges[index]
        return policy if address < end else None


NO_POLICIES = Policies()


def prepare_policies(pid: int, vmas: Sequence[Vma]) -> Policies:
    """Look at a running process.

    Args:
        vmas: its mappings, of just now.

    Raises:
        OSError: it is gone.
    """
    if len(numa_maps.online_nodes()) == 1:
        return NO_POLICIES
    try:
        found = numa_maps.read(pid)
    except FileNotFoundError:  # a kernel without NUMA; who is gone is noticed by the next that asks
        return NO_POLICIES
    # nobody gives a policy to memory of the kernel's own: there the main thread's shows
    inherited = next((found.get(vma.start) for vma in vmas if vma.kind in (VmaKind.VVAR, VmaKind.VDSO)), None)
    ranges = []
    for vma in vmas:
        policy = found.get(vma.start)
        if policy is not None and policy != inherited:
            ranges.append((vma.start, vma.end, policy))
    return Policies(tuple(ranges), matter=True)
