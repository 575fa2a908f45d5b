# SPDX-License-Identifier: Apache-2.0
"""One portable file for one image, its chain flattened, written and read as a stream.

Layout in docs/image-format.md, "Portable file": a header, then records, each with its length and checksum, the
last one holding counts and the SHA-256 of all that came before.  Digests are not in it: they are keyed by the
secret of a store, so the importing store makes its own, and the image has another id there.

Errors: `ImageDamaged`, `UnknownFormat` for what cannot be read, `NoSpace` for what cannot be written.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import zstandard

from checkpointd.errors import ImageDamaged
from checkpointd.image import files
from checkpointd.image.format import (
    BLOCK_PAGES,
    CHECKSUM_BYTES,
    CODEC_NONE,
    CODEC_ZSTD,
    FORMAT_VERSION,
    MAX_BLOCK_PAGES,
    MAX_IMAGE_PAGES,
    MAX_META_BYTES,
    MAX_STATE_BYTES,
    check_version,
    checksum,
    decompress,
)
from checkpointd.image.index import MAX_PAGE_NUMBER
from checkpointd.image.info import ImageInfo
from checkpointd.image.reader import Image
from checkpointd.memory import NO_PAGES, PAGE_SIZE, PageNumbers, pages_of, runs_of

if TYPE_CHECKING:
    from checkpointd.image.builder import ImageBuilder
    from checkpointd.image.store import Store

Progress = Callable[[int, int], None]

MAGIC = b"CKPTPORT"
_HEADER = struct.Struct("<8sI4xQ")  # magic, version, nr_pages
_RECORD = struct.Struct("<4sIQQQI4x16s")  # kind, codec, obj, stored size, raw size, nr_runs, checksum
_END = struct.Struct("<QQ")  # pages with data, zero pages
_META, _STATE, _DATA, _ZERO, _LAST = b"META", b"STAT", b"PAGE", b"ZERO", b"DONE"
_MAX_RUNS = 1 << 16
_ZERO_STEP_PAGES = 1 << 20  # zero pages are put into the builder in pieces of this size
_LOCAL_KEYS = (
    "bytes_packs",
    "pages_zero",
    "pages_same",
    "pages_written",
    "pages_delta",
    "pages_skipped_parent",
    "bytes_raw",
)


def export_image(image: Image, out: BinaryIO, progress: Progress | None) -> None:
    """Write `image` to `out`."""
    digest = hashlib.sha256()
    compressor = zstandard.ZstdCompressor(level=1)

    def write(data: bytes | memoryview) -> None:
        digest.update(data)
        with files.translated("the exported file"):
            out.write(data)

    def record(kind: bytes, obj: int, runs: bytes, raw: bytes | memoryview) -> None:
        stored: bytes | memoryview = compressor.compress(raw)
        codec = CODEC_ZSTD
        if len(stored) >= len(raw):
            stored, codec = raw, CODEC_NONE
        head = _RECORD.pack(kind, codec, obj, len(stored), len(raw), len(runs) // 16, checksum(stored))
        write(head + runs)
        # The head and the runs have a checksum of their own: a reader must trust lengths before it reads on.
        write(checksum(head + runs))
        write(stored)

    nr_pages = image.info.nr_pages
    write(_HEADER.pack(MAGIC, FORMAT_VERSION, nr_pages))
    record(_META, 0, b"", json.dumps(image.meta, ensure_ascii=False).encode())
    record(_STATE, 0, b"", image.state)
    nr_zero = nr_data = 0
    for obj in image.objects():
        runs = runs_of(image.zero_pages(obj))
        nr_zero += int(runs[:, 1].sum())
        for at in range(0, len(runs), _MAX_RUNS):
            record(_ZERO, obj, runs[at : at + _MAX_RUNS].astype("<u8").tobytes(), b"")
    for obj, pages, data in image.stream(chunk_pages=BLOCK_PAGES, verify_digests=True):
        record(_DATA, obj, runs_of(pages).astype("<u8").tobytes(), data.data)
        nr_data += len(pages)
        if progress is not None:
            progress(nr_data * PAGE_SIZE, (nr_pages - nr_zero) * PAGE_SIZE)
    record(_LAST, 0, b"", _END.pack(nr_data, nr_zero))
    with files.translated("the exported file"):
        out.write(digest.digest())
        out.flush()


class _Source:
    """A stream that is read exactly, hashed as it goes."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self.digest = hashlib.sha256()

    def read(self, size_bytes: int, *, hashed: bool = True) -> bytes:
        parts = []
        missing = size_bytes
        while missing:
            part = self._source.read(min(missing, 8 << 20))
            if not part:
                raise _damaged("it is truncated")
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts)
        if hashed:
            self.digest.update(data)
        return data


def import_image(store: Store, source: BinaryIO, progress: Progress | None, *, sync: bool) -> ImageInfo:
    """Read a portable file into `store`; nothing of it stays when it is damaged."""
    stream = _Source(source)
    with files.translated("the file to import"):
        magic, version, nr_pages = _HEADER.unpack(stream.read(_HEADER.size))
    if magic != MAGIC:
        raise _damaged("it is not an exported image")
    check_version(version, "the file to import")
    if nr_pages > MAX_IMAGE_PAGES:
        raise _damaged("its header makes no sense")
    with store.begin(parent=None, sync=sync) as builder:
        meta, state = _records(stream, builder, nr_pages, progress)
        meta["nr_pages"] = nr_pages
        for key in _LOCAL_KEYS:
            meta.pop(key, None)
        try:
            return builder.commit(meta=meta, state=state)
        except ValueError as error:  # a page twice
            raise _damaged(str(error)) from error


def _records(
    stream: _Source, builder: ImageBuilder, nr_pages: int, progress: Progress | None
) -> tuple[dict[str, Any], bytes]:
    meta: dict[str, Any] | None = None
    state: bytes | None = None
    nr_data = nr_zero = 0
    while True:
        kind, obj, pages, raw = _record(stream, nr_pages - nr_data - nr_zero)
        if kind == _META and meta is None:
            meta = _json_object(raw)
        elif kind == _STATE and state is None:
            state = raw
        elif kind == _ZERO:
            nr_zero += len(pages)
            builder.add_zero_pages(obj, pages)
        elif kind == _DATA:
            nr_data += len(pages)
            builder.add_pages(obj, pages, np.frombuffer(raw, dtype=np.uint8))
            if progress is not None:
                progress(nr_data * PAGE_SIZE, max(nr_pages - nr_zero, nr_data) * PAGE_SIZE)
        elif kind == _LAST:
            if raw != _END.pack(nr_data, nr_zero) or nr_data + nr_zero != nr_pages:
                raise _damaged("it does not hold the pages it says")
            if stream.read(hashlib.sha256().digest_size, hashed=False) != stream.digest.digest():
                raise _damaged("it does not have the digest at its end")
            if meta is None or state is None:
                raise _damaged("it lacks the meta or the state")
            return meta, state
        else:
            raise _damaged("it has a record that is unknown or twice there")


def _record(stream: _Source, nr_pages_left: int) -> tuple[bytes, int, PageNumbers, bytes]:
    head = stream.read(_RECORD.size)
    kind, codec, obj, stored_bytes, raw_bytes, nr_runs, expected = _RECORD.unpack(head)
    limit = {
        _META: MAX_META_BYTES,
        _STATE: MAX_STATE_BYTES,
        _DATA: MAX_BLOCK_PAGES * PAGE_SIZE,
        _LAST: 64,
    }.get(kind, 0)
    if (
        raw_bytes > limit
        or codec not in (CODEC_NONE, CODEC_ZSTD)
        or stored_bytes > raw_bytes
        or nr_runs > (_MAX_RUNS if kind in (_DATA, _ZERO) else 0)
    ):
        raise _damaged("a record makes no sense")
    runs_bytes = stream.read(nr_runs * 16)
    if stream.read(CHECKSUM_BYTES) != checksum(head + runs_bytes):
        raise _damaged("a record does not have its checksum")
    runs = np.frombuffer(runs_bytes, dtype="<u8").reshape(-1, 2)
    nr_pages = _checked_runs(runs, nr_pages_left)
    if kind == _DATA and nr_pages * PAGE_SIZE != raw_bytes:
        raise _damaged("a record holds more or fewer pages than it says")
    stored = stream.read(stored_bytes)
    if checksum(stored) != expected:
        raise _damaged("a record does not have its checksum")
    raw = decompress(stored, raw_bytes, "the file to import") if codec == CODEC_ZSTD else stored
    if len(raw) != raw_bytes:
        raise _damaged("a record has the wrong length")
    return kind, obj, pages_of(runs) if len(runs) else NO_PAGES, raw


def _checked_runs(runs: PageNumbers, nr_pages_left: int) -> int:
    """How many pages the runs hold, when they are in order and not more than there may be."""
    if len(runs) == 0:
        return 0
    firsts, counts = runs[:, 0], runs[:, 1]
    if not (
        bool((firsts < MAX_PAGE_NUMBER).all())
        and bool((counts - np.uint64(1) < MAX_PAGE_NUMBER).all())
        and bool((firsts[1:] >= (firsts + counts)[:-1]).all())
        and sum(counts.tolist()) <= nr_pages_left
    ):
        raise _damaged("a record's page numbers make no sense")
    return int(counts.sum())


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged("its meta is not JSON") from error
    if not isinstance(meta, dict):
        raise _damaged("its meta is not an object")
    return meta


def _damaged(what: str) -> ImageDamaged:
    return ImageDamaged(
        f"the file to import cannot be used: {what}", hint="export or copy it again; nothing was imported"
    )
