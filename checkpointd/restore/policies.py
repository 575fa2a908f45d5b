# SPDX-License-Identifier: Apache-2.0
"""Memory policies (NUMA) of mappings and threads.

One that names a node which is not here is left out with a warning: the program runs as well, elsewhere in memory.

Source: mbind(2), set_mempolicy(2).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from checkpointd.linux import mempolicy
from checkpointd.linux.arch import Nr
from checkpointd.procfs import numa_maps
from checkpointd.state.memory import AddressSpace, MemoryPolicy
from checkpointd.state.threads import ThreadState
from checkpointd.target.remote import Call, Remote


def give_to_mappings(remote: Remote, space: AddressSpace) -> list[str]:
    """Before pages are placed; warnings."""
    wanted = [(vma, vma.policy) for vma in space.vmas if vma.policy is not None]
    here = numa_maps.online_nodes()
    possible = [(vma, policy) for vma, policy in wanted if here.issuperset(policy.nodes)]
    masks = {policy: _mask(remote, policy) for _, policy in possible}
    calls = [
        Call(Nr.MBIND, (vma.start, vma.end - vma.start, policy.mode, *masks[policy], 0))
        for vma, policy in possible
    ]
    failed = [result for result in (remote.batch(calls) if calls else []) if result < 0]
    nr_lost = len(wanted) - len(possible) + len(failed)
    if not nr_lost:
        return []
    why = os.strerror(-failed[0]) if failed else "this machine lacks nodes of it"
    return [f"{nr_lost} mapping(s) have no memory policy (mbind) any more: {why}"]


def give_to_threads(remote: Remote, threads: Mapping[int, ThreadState]) -> list[str]:
    """Each its own, in place of ours, with which they were born; warnings.

    Args:
        threads: by the ids they have now.
    """
    ours, here = mempolicy.own_policy(), numa_maps.online_nodes()
    warnings = []
    for tid, thread in threads.items():
        policy, why = thread.memory_policy, ""
        if policy is not None and not here.issuperset(policy.nodes):
            why, policy = "this machine lacks nodes of it", None
        if policy != ours:
            args = (policy.mode, *_mask(remote, policy)) if policy else (0, 0, 0)
            (result,) = remote.batch([Call(Nr.SET_MEMPOLICY, args)], tid=tid)
            why = why or (os.strerror(-result) if result < 0 else "")
        if why:
            warnings.append(f"thread {thread.tid} has no memory policy (set_mempolicy) any more: {why}")
    return warnings


def _mask(remote: Remote, policy: MemoryPolicy) -> tuple[int, int]:
    """(address, number of bits) of its nodes, as the calls take them."""
    if not policy.nodes:
        return 0, 0
    return remote.put(mempolicy.pack_nodes(policy.nodes)), mempolicy.NR_MASK_BITS + 1
