# SPDX-License-Identifier: Apache-2.0
"""An agent that brings a process back, and stays its agent: tracking is armed before its first instruction."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from checkpointd.agent.check import files_options
from checkpointd.agent.protocol import RestoreArgs
from checkpointd.dump.dump import Dumper
from checkpointd.errors import CheckpointError, ImageDamaged, RestoreConflict
from checkpointd.image.reader import Image
from checkpointd.image.store import Store
from checkpointd.memory import FILE_CONTENT_OBJECTS, PAGE_SIZE
from checkpointd.procfs import process
from checkpointd.procfs.process import ProcessIdentity
from checkpointd.restore.restorer import RestoreOptions, restore_process
from checkpointd.restore.stub import Stub
from checkpointd.state import codec
from checkpointd.state.process import ImageState
from checkpointd.stats import RestoreStats

Report = Callable[[str, int, int], None]

_CONTENT_PIECE_PAGES = 256


def restore(args: RestoreArgs, report: Report) -> tuple[RestoreStats, Dumper | None]:
    """Restore an image; its statistics and, unless tracking was declined, the dumper of the new process.

    Raises:
        what `restore_process` raises; no process is left behind then.
    """
    started_ns = time.monotonic_ns()
    store = Store.open(args.store)
    try:
        image = store.load(args.image)
        state = _state_of(image)
    except ImageDamaged as error:
        raise _nothing_restored(error, args.image) from None
    dumper: Dumper | None = None
    tracking = ""
    warnings: list[str] = []

    identity: ProcessIdentity | None = None

    def arm(stub: Stub) -> None:
        nonlocal dumper, tracking, identity
        identity = process.identity(stub.pid)
        if args.track_backend == "none":
            return
        made = Dumper(stub.pid)
        try:
            tracking = made.arm_restored(stub, image.id, args.track_backend).backend
        except (CheckpointError, OSError) as error:
            # a process that runs untracked is worth more than none
            made.close()
            warnings.append(f"tracking could not be armed ({error}): the next dump is compared by content")
        else:
            dumper = made

    options = RestoreOptions(
        files=files_options(args.tcp, args.external, args.tty, args.changed),
        file_content=lambda index: _content(image, index),
        before_release=arm,
    )
    try:
        done = restore_process(image, state, new_pid=args.new_pid, options=options, progress=report)
    except BaseException as error:
        if isinstance(error, ImageDamaged):
            _nothing_restored(error, image.id)
        if dumper is not None:
            with contextlib.suppress(CheckpointError, OSError):
                dumper.close()
        raise
    if dumper is not None:
        dumper.sleeps = done.sleeps
    if identity is not None:
        # for dumps by others than this agent; a store that cannot be written to takes no dumps anyway
        with contextlib.suppress(CheckpointError):
            store.note_restored(identity.pid, identity.start_time, identity.boot_id, image.id)
    stats = RestoreStats(
        image_id=image.id,
        pid=done.pid,
        pages_restored=done.pages_restored,
        total_time=(time.monotonic_ns() - started_ns) // 1000,
        restore_time=done.restore_time_us,
        nr_threads=len(done.tids),
        tracking=tracking,
        phases=done.phases,
        warnings=[*done.warnings, *warnings],
    )
    return stats, dumper


def _state_of(image: Image) -> ImageState:
    state = codec.decode_json(ImageState, image.state)
    if not state.process.threads:
        raise RestoreConflict(f"image {image.id} holds no thread")
    return state


def _content(image: Image, index: int) -> Iterator[bytes]:
    """The content of an open deleted file, holes as zeroes, in order."""
    obj = FILE_CONTENT_OBJECTS + index
    if obj not in image.objects():
        return
    pages = image.pages(obj)
    nr_pages = int(pages[-1]) + 1 if len(pages) else 0
    for first in range(0, nr_pages, _CONTENT_PIECE_PAGES):
        last = min(first + _CONTENT_PIECE_PAGES, nr_pages)
        inside = pages[(pages >= first) & (pages < last)]
        piece = bytearray((last - first) * PAGE_SIZE)
        if len(inside):
            content = image.read(obj, inside).tobytes()
            for n, page in enumerate(inside.tolist()):
                at = (page - first) * PAGE_SIZE
                piece[at : at + PAGE_SIZE] = content[n * PAGE_SIZE : (n + 1) * PAGE_SIZE]
        yield bytes(piece)


def _nothing_restored(error: ImageDamaged, image_id: str) -> ImageDamaged:
    if error.hint == ImageDamaged.usual_hint:
        error.hint = f"nothing was restored of it; {error.hint}"
    return error.of_image(f"image {image_id[:12]}")
