# SPDX-License-Identifier: Apache-2.0
"""Bytes of one `images/<id>.img`: header, section table, sections, trailer.  No I/O.

`parse_head` reads what `ls` and the reference counting of packs need (header, meta, pack list) from the first
bytes of a file; `parse` reads a whole file whose SHA-256 has been compared with its name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import Any

import zstandard

from checkpointd.errors import ImageDamaged
from checkpointd.image.format import (
    CHECKSUM_BYTES,
    CODEC_NONE,
    CODEC_ZSTD,
    DELTA_VERSION,
    FORMAT_VERSION,
    ID_BYTES,
    IMAGE_END_MAGIC,
    IMAGE_HEADER,
    IMAGE_MAGIC,
    IMAGE_TRAILER,
    MAX_EXTENTS,
    MAX_META_BYTES,
    MAX_OBJECTS,
    MAX_PACKS,
    MAX_SECTIONS,
    MAX_STATE_BYTES,
    SECTION,
    SECTION_BASES,
    SECTION_COUNTS,
    SECTION_DELTAS,
    SECTION_FIRSTS,
    SECTION_LOCATIONS,
    SECTION_META,
    SECTION_OBJECTS,
    SECTION_PACKS,
    SECTION_STATE,
    check_version,
    checksum,
    decompress,
)
from checkpointd.image.index import ObjectIndex, decode_columns, encode_columns, encode_deltas

HEAD_BYTES = 64 << 10  # one read of this size shows the head of nearly every image
_LIMITS = {
    SECTION_META: MAX_META_BYTES,
    SECTION_PACKS: MAX_PACKS * ID_BYTES,
    SECTION_STATE: MAX_STATE_BYTES,
    SECTION_OBJECTS: MAX_OBJECTS * 16,
    SECTION_FIRSTS: MAX_EXTENTS * 8,
    SECTION_COUNTS: MAX_EXTENTS * 8,
    SECTION_LOCATIONS: MAX_EXTENTS * 8,
    SECTION_DELTAS: MAX_EXTENTS * 8,
    SECTION_BASES: MAX_EXTENTS * 8,
}
_OF_DELTAS = {SECTION_DELTAS, SECTION_BASES}  # in version 2 alone, and there both
_PLAIN = {SECTION_META, SECTION_PACKS}  # read by `ls` without decompressing


@dataclass(frozen=True, slots=True)
class Section:
    codec: int
    offset: int
    stored_bytes: int
    raw_bytes: int
    checksum: bytes


@dataclass(frozen=True, slots=True)
class Head:
    """What the first bytes of an image file say."""

    version: int
    sequence: int
    nr_pages: int
    parent_id: str
    sections: dict[bytes, Section]
    meta: dict[str, Any]
    pack_ids: list[str]
    end: int  # offset after the last section: the trailer


def build(
    *,
    sequence: int,
    parent_id: str,
    meta: dict[str, Any],
    state: bytes,
    pack_ids: list[str],
    objects: dict[int, ObjectIndex],
) -> tuple[str, bytes]:
    """The id and the bytes of an image; it is of version 2 when a page has a base, else of version 1.

    Raises:
        ValueError: meta or state is beyond the limits of the format, or meta is not JSON.
    """
    meta_bytes = json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    if len(meta_bytes) > MAX_META_BYTES or len(state) > MAX_STATE_BYTES:
        raise ValueError(f"meta ({len(meta_bytes)} bytes) or state ({len(state)} bytes) is too long")
    ids = sorted(objects)
    firsts, counts, locations = encode_columns([objects[obj] for obj in ids])
    deltas, bases = encode_deltas([objects[obj] for obj in ids])
    version = DELTA_VERSION if deltas else FORMAT_VERSION
    table = b"".join(
        obj.to_bytes(8, "little") + len(objects[obj].firsts).to_bytes(8, "little") for obj in ids
    )
    raw_sections = {
        SECTION_META: meta_bytes,
        SECTION_PACKS: b"".join(bytes.fromhex(pack_id) for pack_id in pack_ids),
        SECTION_STATE: state,
        SECTION_OBJECTS: table,
        SECTION_FIRSTS: firsts,
        SECTION_COUNTS: counts,
        SECTION_LOCATIONS: locations,
    }
    if deltas:
        raw_sections |= {SECTION_DELTAS: deltas, SECTION_BASES: bases}
    compressor = zstandard.ZstdCompressor(level=3)
    offset = IMAGE_HEADER.size + len(raw_sections) * SECTION.size + CHECKSUM_BYTES
    entries, bodies = [], []
    for kind, raw in raw_sections.items():
        stored, codec = raw, CODEC_NONE
        if kind not in _PLAIN:
            packed = compressor.compress(raw)
            if len(packed) < len(raw):
                stored, codec = packed, CODEC_ZSTD
        entries.append(SECTION.pack(kind, codec, offset, len(stored), len(raw), checksum(stored)))
        bodies.append(stored)
        offset += len(stored)
    nr_pages = sum(index.nr_pages for index in objects.values())
    parent = bytes.fromhex(parent_id) if parent_id else bytes(ID_BYTES)
    head = IMAGE_HEADER.pack(IMAGE_MAGIC, version, len(entries), sequence, nr_pages, parent)
    head += b"".join(entries)
    data = b"".join(
        (head, checksum(head), *bodies, IMAGE_TRAILER.pack(IMAGE_END_MAGIC, offset + IMAGE_TRAILER.size))
    )
    return hashlib.sha256(data).hexdigest(), data


def parse_head(data: bytes | memoryview, file_bytes: int, path: str) -> Head | int:
    """Read header, meta and pack list from the first bytes of a file of `file_bytes`.

    Returns:
        The head, or how many bytes of the file are needed when `data` is too short.

    Raises:
        ImageDamaged, UnknownFormat.
    """
    if file_bytes < IMAGE_HEADER.size + CHECKSUM_BYTES + IMAGE_TRAILER.size or len(data) < IMAGE_HEADER.size:
        raise _damaged(path, "the file is truncated")
    magic, version, nr_sections, sequence, nr_pages, parent = IMAGE_HEADER.unpack_from(data)
    if magic != IMAGE_MAGIC:
        raise _damaged(path, "this is not an image")
    check_version(version, path, newest=DELTA_VERSION)
    if nr_sections > MAX_SECTIONS:
        raise _damaged(path, f"the header claims {nr_sections} sections")
    table_end = IMAGE_HEADER.size + nr_sections * SECTION.size
    if table_end + CHECKSUM_BYTES + IMAGE_TRAILER.size > file_bytes:
        raise _damaged(path, "the file is truncated")
    if len(data) < table_end + CHECKSUM_BYTES:
        return int(table_end + CHECKSUM_BYTES)
    if checksum(bytes(data[:table_end])) != bytes(data[table_end : table_end + CHECKSUM_BYTES]):
        raise _damaged(path, "the header does not have its checksum")
    sections: dict[bytes, Section] = {}
    offset = table_end + CHECKSUM_BYTES
    for at in range(IMAGE_HEADER.size, table_end, SECTION.size):
        kind, *values = SECTION.unpack_from(data, at)
        section = Section(*values)
        if kind not in _LIMITS or kind in sections:
            raise _damaged(path, f"the header names a section {kind!r} that is unknown or twice there")
        plain = section.codec == CODEC_NONE
        if (
            section.offset != offset
            or section.raw_bytes > _LIMITS[kind]
            or section.codec > CODEC_ZSTD
            or (kind in _PLAIN and not plain)
            or (
                section.stored_bytes != section.raw_bytes
                if plain
                else section.stored_bytes > section.raw_bytes
            )
        ):
            raise _damaged(path, f"section {kind!r} makes no sense")
        offset += section.stored_bytes
        sections[kind] = section
    if set(sections) != set(_LIMITS) - (_OF_DELTAS if version == FORMAT_VERSION else set()):
        raise _damaged(path, "the header lacks a section")
    if offset + IMAGE_TRAILER.size != file_bytes:
        raise _damaged(path, "the file is truncated or has more than it should")
    needed = max(sections[kind].offset + sections[kind].stored_bytes for kind in _PLAIN)
    if len(data) < needed:
        return needed
    try:
        meta = json.loads(_raw_section(data, sections[SECTION_META], path))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its meta is not JSON: {error}") from error
    ids = _raw_section(data, sections[SECTION_PACKS], path)
    if not isinstance(meta, dict) or len(ids) % ID_BYTES:
        raise _damaged(path, "its meta or pack list makes no sense")
    return Head(
        version=version,
        sequence=sequence,
        nr_pages=nr_pages,
        parent_id=parent.hex() if any(parent) else "",
        sections=sections,
        meta=meta,
        pack_ids=[ids[at : at + ID_BYTES].hex() for at in range(0, len(ids), ID_BYTES)],
        end=offset,
    )


def parse(data: bytes | memoryview, path: str) -> tuple[Head, dict[int, ObjectIndex]]:
    """Read a whole image file; its state stays compressed (`read_state`).

    Raises:
        ImageDamaged, UnknownFormat.
    """
    head = parse_head(data, len(data), path)
    if not isinstance(head, Head):
        raise _damaged(path, "the file is truncated")
    if IMAGE_TRAILER.unpack_from(data, head.end) != (IMAGE_END_MAGIC, len(data)):
        raise _damaged(path, "the end is missing: the file is truncated or overwritten")
    table = _raw_section(data, head.sections[SECTION_OBJECTS], path)
    if len(table) % 16:
        raise _damaged(path, "its object table makes no sense")
    words = [int.from_bytes(table[at : at + 8], "little") for at in range(0, len(table), 8)]
    ids, extents = words[::2], words[1::2]
    if any(b <= a for a, b in itertools.pairwise(ids)) or sum(extents) > MAX_EXTENTS:
        raise _damaged(path, "its object table makes no sense")
    columns = (
        _raw_section(data, head.sections[SECTION_FIRSTS], path),
        _raw_section(data, head.sections[SECTION_COUNTS], path),
        _raw_section(data, head.sections[SECTION_LOCATIONS], path),
    )
    deltas = (b"", b"")
    if head.version == DELTA_VERSION:
        deltas = (
            _raw_section(data, head.sections[SECTION_DELTAS], path),
            _raw_section(data, head.sections[SECTION_BASES], path),
        )
    indexes = decode_columns(columns, deltas, extents, path)
    if sum(index.nr_pages for index in indexes) != head.nr_pages:
        raise _damaged(path, "the index does not hold as many pages as the header says")
    return head, dict(zip(ids, indexes, strict=True))


def read_state(data: bytes | memoryview, head: Head, path: str) -> bytes:
    """The opaque state of the process."""
    return _raw_section(data, head.sections[SECTION_STATE], path)


def _raw_section(data: bytes | memoryview, section: Section, path: str) -> bytes:
    stored = bytes(data[section.offset : section.offset + section.stored_bytes])
    if checksum(stored) != section.checksum:
        raise _damaged(path, "a section does not have its checksum")
    if section.codec == CODEC_NONE:
        return stored
    return decompress(stored, section.raw_bytes, path)


def _damaged(path: str, what: str) -> ImageDamaged:
    return ImageDamaged(f"{path}: {what}", path=path)
