# SPDX-License-Identifier: Apache-2.0
"""Reading everything an image needs and comparing it with every checksum and digest.

All blocks of all packs it refers to are read, those without a live page too, so that any byte of any of its
files that changed is found.  Damage does not stop the walk: the report names every file that is affected.

The pages of an image that are stored as deltas are put together and compared with their digests once more: that reads
their bases a second time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from checkpointd.errors import ImageDamaged
from checkpointd.image.digest import digest_pages
from checkpointd.image.pack import PackReader
from checkpointd.image.reader import Image

if TYPE_CHECKING:
    from checkpointd.image.store import Store


@dataclass
class VerifyReport:
    """What `verify` found; `problems` has one sentence for each damaged thing, naming its file."""

    image_id: str
    nr_pages: int = 0
    nr_packs: int = 0
    nr_blocks: int = 0
    bytes_read: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def raise_if_damaged(self) -> None:
        """Raises:
        ImageDamaged: there are problems; the first is the message.
        """
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise ImageDamaged(self.problems[0] + more, problems=self.problems).of_image(
                f"image {self.image_id[:12]}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "ok": self.ok}


def verify_image(store: Store, image_id: str, progress: Callable[[int, int], None] | None) -> VerifyReport:
    """Check one image; see the module's head.

    Raises:
        ImageNotFound: there is no such image.
    """
    report = VerifyReport(image_id)
    image: Image | None = None
    try:
        image = store.load(image_id)
    except ImageDamaged as error:
        report.problems.append(error.details["damage"])
        # The index or a pack's tables are unreadable; the other packs may still be looked at one by one.
        packs = store.readable_packs(image_id, report.problems)
    else:
        report.nr_pages = image.info.nr_pages
        packs = image.packs
    report.nr_packs = len(packs)
    report.nr_blocks = sum(pack.nr_blocks for pack in packs)
    total = sum(pack.size_bytes for pack in packs)
    mutex = threading.Lock()

    def check(pack: PackReader, block: int) -> None:
        problem = _check_block(pack, block, store.digest_seed)
        with mutex:
            report.bytes_read += int(pack.block_stored[block])
            if problem and problem not in report.problems:
                report.problems.append(problem)
            if progress is not None:
                progress(report.bytes_read, total)

    with ThreadPoolExecutor(2, thread_name_prefix="image-verify") as pool:
        for pack in packs:
            for _ in pool.map(lambda block, pack=pack: check(pack, block), range(pack.nr_blocks)):
                pass
    if image is not None:
        _check_deltas(image, report)
    if progress is not None:
        progress(total, total)
    return report


def _check_deltas(image: Image, report: VerifyReport) -> None:
    """Compare every page that is stored as a delta with its digest."""
    try:
        for _ in image.stream_deltas():
            pass
    except ImageDamaged as error:
        if error.message not in report.problems:  # a damaged block was named before
            report.problems.append(error.message)


def _check_block(pack: PackReader, block: int, seed: int) -> str:
    """What is wrong with a block; empty when nothing is."""
    try:
        pages = pack.read_block(block)
    except ImageDamaged as error:
        return error.message
    first = int(pack.block_firsts[block])
    ordinals = np.arange(first, first + len(pages))
    plain = ~pack.are_deltas(ordinals)  # the digest of a delta page is that of the whole page
    if not np.array_equal(digest_pages(pages[plain], seed), pack.digests[ordinals[plain]]):
        return f"{pack.path}: a page of block {block} does not have its digest"
    return ""
