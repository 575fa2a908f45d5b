# SPDX-License-Identifier: Apache-2.0
"""What the service does with stores by itself, without an agent: list, look, verify, remove, export, import.

The image room needs numpy, which takes 0.15 s to import: it is imported by the first call that needs it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from checkpointd.errors import CheckpointError, ImageDamaged, UsageError
from checkpointd.state import codec
from checkpointd.state.process import ImageState

if TYPE_CHECKING:
    from checkpointd.image.info import ImageInfo
    from checkpointd.image.store import Store

CHUNK_BYTES = 1 << 20


class Stores:
    """Stores by path.  The default one is made when it is first needed; others must exist to be read."""

    def __init__(self, default: Path) -> None:
        self.default = default

    def path(self, given: str, *, may_choose: bool = True) -> Path:
        """The store a request means.

        Raises:
            UsageError: a relative path, or a store of the caller's choice where it may not choose.
        """
        if not given or given == str(self.default):
            return self.default
        if not may_choose:
            raise UsageError(
                "a store can only be chosen over the unix socket",
                hint="leave --store out: the service has one",
            )
        if not given.startswith("/"):
            raise UsageError(f"the store {given!r} is not an absolute path", hint="give its full path")
        return Path(given)

    def open(self, path: Path, *, create: bool = False) -> Store:
        """Raises: StoreMissing, NotPermitted, ImageDamaged."""
        from checkpointd.image.store import Store  # noqa: PLC0415 - heavy, see the module's head

        if path == self.default:
            path.parent.mkdir(parents=True, exist_ok=True)
        return Store.open(str(path), create=create or path == self.default)


def manifest_json(store: Store, image_id: str) -> str:
    """Meta and state of an image as one JSON object: {"meta": {...}, "state": {...}}.

    A state that no restore would take is null, and `state_problem` tells why.
    """
    image = store.load(image_id)
    state: Any = None
    problem = {}
    try:
        codec.decode_json(ImageState, image.state)
        state = json.loads(image.state)
    except ImageDamaged as error:
        problem = {"state_problem": error.message}
    return json.dumps(
        {"meta": image.meta, "state": state, **problem, "info": dataclasses.asdict(image.info)}, default=str
    )


def export_chunks(store: Store, image_id: str) -> Iterator[bytes]:
    """The portable file in chunks of at most `CHUNK_BYTES`, made on a thread while the last ones travel.

    Raises:
        CheckpointError: what the export met.
    """
    chunks: queue.Queue[bytes | CheckpointError | None] = queue.Queue(maxsize=4)
    abandoned = threading.Event()

    def work() -> None:
        sink = _ChunkWriter(chunks, abandoned)
        try:
            store.export_image(image_id, cast(BinaryIO, sink))
            sink.finish()
        except _Abandoned:
            return
        except CheckpointError as error:
            _put(chunks, error, abandoned)
        except Exception as error:
            _put(chunks, CheckpointError(f"the export of {image_id[:12]} failed: {error}"), abandoned)

    threading.Thread(target=work, name=f"export-{image_id[:8]}", daemon=True).start()
    try:
        while (chunk := chunks.get()) is not None:
            if isinstance(chunk, CheckpointError):
                raise chunk
            yield chunk
    finally:
        abandoned.set()


def import_chunks(store: Store, chunks: Iterator[bytes]) -> ImageInfo:
    """Raises: ImageDamaged, UnknownFormat, NoSpace."""
    return store.import_image(cast(BinaryIO, io.BufferedReader(_ChunkReader(chunks), CHUNK_BYTES)))


class _Abandoned(Exception):
    """Nobody reads the export any more."""


def _put(chunks: queue.Queue[Any], item: Any, abandoned: threading.Event) -> None:
    while not abandoned.is_set():
        try:
            chunks.put(item, timeout=0.2)
            return
        except queue.Full:
            continue
    raise _Abandoned


class _ChunkWriter:
    """A file to write to, whose bytes come out as chunks."""

    def __init__(self, chunks: queue.Queue[Any], abandoned: threading.Event) -> None:
        self._chunks = chunks
        self._abandoned = abandoned
        self._pending = bytearray()

    def write(self, data: bytes | memoryview) -> int:
        self._pending += data
        while len(self._pending) >= CHUNK_BYTES:
            _put(self._chunks, bytes(self._pending[:CHUNK_BYTES]), self._abandoned)
            del self._pending[:CHUNK_BYTES]
        return len(data)

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        if self._pending:
            _put(self._chunks, bytes(self._pending), self._abandoned)
        _put(self._chunks, None, self._abandoned)


class _ChunkReader(io.RawIOBase):
    """A file to read from, fed by chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        nr_bytes = min(len(into), len(self._rest))
        into[:nr_bytes] = self._rest[:nr_bytes]
        self._rest = self._rest[nr_bytes:]
        return nr_bytes


Progress = Callable[[int, int], None]


def verify_image(store: Store, image_id: str, progress: Progress) -> int:
    """Check one image; returns the bytes read.

    Raises:
        ImageDamaged: with all problems in its details.
    """
    report = store.verify(image_id, progress=progress)
    report.raise_if_damaged()
    return report.bytes_read


def damage_found(failures: dict[str, ImageDamaged], whole: list[str]) -> ImageDamaged:
    """One error for all damage that a look at many images found.

    Args:
        failures: of each damaged image, by its id.
        whole: ids of the other images, oldest first.
    """
    nr_images = len(failures) + len(whole)
    return ImageDamaged(
        f"{len(failures)} of {nr_images} {'image' if nr_images == 1 else 'images'} "
        f"{'is' if len(failures) == 1 else 'are'} damaged",
        hint=f"restore a whole one, the newest is {whole[-1][:12]}; remove a damaged one with `checkpoint rm`"
        if whole
        else "no image in this store is whole: use a copy of the store",
        problems=[error.message for error in failures.values()],
        damaged=list(failures),
        whole=whole,
    )
