# SPDX-License-Identifier: Apache-2.0
"""Which old blocks a new image should copy, so that restore time does not grow with the depth of a chain.

A block is read whole though perhaps few of its pages are still live, and each pack is a file to open.  At commit
two bounds are kept (docs/image-format.md, "Consolidation"):

* pages in the blocks an image refers to <= `max_amplification` x its live pages; when passed, the worst blocks
  are copied until `settle_amplification` holds, so that the work comes seldom;
* packs an image refers to <= `max_packs`; when passed, the packs with the fewest live pages are merged into the
  new one until half as many are left.

Live here is a page of the image, as it is stored, and the base of a delta page.  Both are copied as they are: a delta
page stays one, and a base that was copied is found at its new place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from checkpointd import tracepoint
from checkpointd.image.columns import ORDINAL, SHIFT, Columns, locations_of
from checkpointd.image.index import U64, Places
from checkpointd.image.pack import PackReader
from checkpointd.image.writers import Writers


@dataclass(frozen=True, slots=True)
class ConsolidationPolicy:
    """The bounds; `min_dead_pages` keeps small images from being rewritten for nothing."""

    max_amplification: float = 1.6
    settle_amplification: float = 1.3
    max_packs: int = 32
    min_dead_pages: int = 1024


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Columns over all old blocks with at least one live page."""

    pack: npt.NDArray[np.int64]
    block: npt.NDArray[np.int64]
    live: npt.NDArray[np.int64]
    total: npt.NDArray[np.int64]


def consolidate(
    merged: dict[int, Columns], packs: list[PackReader], writers: Writers, policy: ConsolidationPolicy
) -> int:
    """Copy live pages out of old blocks that hold too many dead ones; changes `merged`.

    Args:
        packs: the old ones, numbered from 0.

    Returns:
        How many pages were copied.
    """
    if not packs:
        return 0
    limit = np.uint64(len(packs)) << SHIFT
    objs = list(merged)
    columns = [column for obj in objs for column in (merged[obj].places.locations, merged[obj].places.bases)]
    everything = np.concatenate([*columns, np.zeros(0, dtype=np.uint64)])
    old = np.flatnonzero(everything < limit)
    nr_new_packs = max(1, writers.nr_used)
    copy = old[blocks_to_copy(everything[old], packs, writers.nr_pages, nr_new_packs, policy)]
    if len(copy) == 0:
        return 0
    copy = copy[np.argsort(everything[copy], kind="stable")]
    everything[copy] = _copied(everything[copy], packs, writers)
    parts = iter(np.split(everything, np.cumsum([len(column) for column in columns])))
    for obj in objs:
        merged[obj] = Columns(merged[obj].pages, Places(next(parts), next(parts)))
    return len(copy)


def _copied(sources: U64, packs: list[PackReader], writers: Writers) -> U64:
    """Copy the pages at these sorted locations into a new pack; where they lie now."""
    out = np.empty(len(sources), dtype=np.uint64)
    with writers.take() as (number, writer):
        for pack_number in np.unique(sources >> SHIFT):
            pack = packs[int(pack_number)]
            at = np.flatnonzero(sources >> SHIFT == pack_number)
            ordinals = (sources[at] & ORDINAL).astype(np.int64)
            blocks = pack.block_of(ordinals.astype(np.uint64))
            for part in np.split(np.arange(len(at)), np.flatnonzero(np.diff(blocks)) + 1):
                block = int(blocks[part[0]])
                mine = ordinals[part]
                slots = mine - int(pack.block_firsts[block])
                first = writer.append(
                    pack.read_block(block), pack.digests[mine], slots, pack.are_deltas(mine)
                )
                out[at[part]] = locations_of(number, first, len(part))
            tracepoint.hit("image.consolidated")
    return out


def blocks_to_copy(
    locations: U64, packs: list[PackReader], nr_new_pages: int, nr_new_packs: int, policy: ConsolidationPolicy
) -> npt.NDArray[np.bool_]:
    """For each of `locations` (live pages and bases in old packs): should its block be copied into the new pack?

    Args:
        locations: not zero, not missing, all in `packs`.
        nr_new_pages, nr_new_packs: what the new image writes anyway.
    """
    if len(locations) == 0:
        return np.zeros(0, dtype=bool)
    owner, blocks = _live_blocks(locations, packs)
    chosen = np.zeros(len(blocks.block), dtype=bool)
    live_by_pack = np.bincount(blocks.pack, weights=blocks.live, minlength=len(packs)).astype(np.int64)
    used = np.flatnonzero(live_by_pack)
    if len(used) + nr_new_packs > policy.max_packs:
        by_size = used[np.argsort(live_by_pack[used], kind="stable")]
        nr_merge = len(used) + nr_new_packs - policy.max_packs // 2
        chosen |= np.isin(blocks.pack, by_size[:nr_merge])
    live = nr_new_pages + int(blocks.live.sum())
    referenced = nr_new_pages + int(np.where(chosen, blocks.live, blocks.total).sum())
    if referenced > policy.max_amplification * live and referenced - live > policy.min_dead_pages:
        worst = np.argsort(blocks.live / blocks.total, kind="stable")
        worst = worst[~chosen[worst]]
        gain = np.cumsum(blocks.total[worst] - blocks.live[worst])
        excess = referenced - policy.settle_amplification * live
        chosen[worst[: int(np.searchsorted(gain, excess)) + 1]] = True
    copy: npt.NDArray[np.bool_] = chosen[owner]
    return copy


def _live_blocks(locations: U64, packs: list[PackReader]) -> tuple[npt.NDArray[np.int64], _Blocks]:
    """The blocks that hold `locations`, and for each location the row of its block."""
    numbers = (locations >> SHIFT).astype(np.int64)
    firsts = np.cumsum([0] + [pack.nr_blocks for pack in packs])
    rows = np.empty(len(locations), dtype=np.int64)
    for number in np.flatnonzero(np.bincount(numbers)):
        at = numbers == number
        rows[at] = firsts[number] + packs[int(number)].block_of(locations[at] & ORDINAL)
    live = np.bincount(rows, minlength=int(firsts[-1]))
    kept = np.flatnonzero(live)
    pack = np.searchsorted(firsts, kept, side="right") - 1
    total = np.concatenate([pack.block_pages for pack in packs])
    new_row = np.full(len(live), -1, dtype=np.int64)
    new_row[kept] = np.arange(len(kept))
    blocks = _Blocks(pack=pack, block=kept - firsts[pack], live=live[kept], total=total[kept])
    return new_row[rows], blocks
