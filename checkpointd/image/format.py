# SPDX-License-Identifier: Apache-2.0
"""Bytes of the image format, versions 1 and 2: magics, structures, limits, codecs.  docs/image-format.md is the law.

Everything is little endian.  Decoding never trusts a size: it is compared with what the file can hold and with
the limits below before anything is allocated, and a checksum is compared before anything is decompressed.

Errors: `ImageDamaged` for bytes that do not fit, `UnknownFormat` for a version this code does not read.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

import xxhash
import zstandard

from checkpointd.errors import ImageDamaged, UnknownFormat, UsageError

FORMAT_VERSION = 1  # of a store, of an exported file, and of images and packs without delta pages
DELTA_VERSION = 2  # of images and packs with delta pages

IMAGE_MAGIC = b"CKPTIMG\x00"
IMAGE_END_MAGIC = b"CKPTEND\x00"
PACK_MAGIC = b"CKPTPACK"
PACK_END_MAGIC = b"CKPTPEND"

CHECKSUM_BYTES = 16
ID_BYTES = 32
ID_PATTERN = re.compile(r"[0-9a-f]{64}")

# magic, version, nr_sections, sequence, nr_pages, parent id, reserved
IMAGE_HEADER = struct.Struct("<8sIIQQ32s16x")
SECTION = struct.Struct(
    "<4sIQQQ16s"
)  # kind, codec, offset, stored size, raw size, checksum of the stored bytes
IMAGE_TRAILER = struct.Struct("<8sQ")  # magic, size of the file
PACK_HEADER = struct.Struct("<8sI4x16s32x")  # magic, version, nonce
BLOCK = struct.Struct("<III4x16s")  # stored size, nr_pages, codec, checksum of the stored bytes
PACK_TRAILER = struct.Struct("<8sI4xQQQ24x")  # magic, version, nr_blocks, nr_pages, offset of the block table

CODEC_NONE = 0
CODEC_ZSTD = 1

BLOCK_PAGES = 256  # 1 MiB: what the writer fills a block to
MIN_DIRECT_PAGES = 64  # 256 KiB: the writer closes a block early from here when that saves a copy
MAX_BLOCK_PAGES = 1024  # what a reader accepts

MAX_SECTIONS = 64
MAX_META_BYTES = 1 << 20
MAX_STATE_BYTES = 1 << 30
MAX_PACKS = 4096
MAX_OBJECTS = 1 << 22
MAX_EXTENTS = 1 << 28
MAX_IMAGE_PAGES = 1 << 36
MAX_IMAGE_FILE_BYTES = 16 << 30

LOCATION_SHIFT = 32  # location = pack ordinal << 32 | page ordinal in the pack
ZERO_LOCATION = 0xFFFF_FFFF_FFFF_FFFF
NO_BASE = 0xFFFF_FFFF_FFFF_FFFF  # in memory only: the page is stored plain
MISSING_LOCATION = 0xFFFF_FFFF_FFFF_FFFE  # in memory only: the index has no such page

SECTION_META = b"META"
SECTION_PACKS = b"PACK"
SECTION_STATE = b"STAT"
SECTION_OBJECTS = b"OBJS"
SECTION_FIRSTS = b"FRST"
SECTION_COUNTS = b"NRPG"
SECTION_LOCATIONS = b"LOCN"
SECTION_DELTAS = b"DEXT"  # version 2: which extents are stored as differences
SECTION_BASES = b"DBAS"  # version 2: and from what


def checksum(data: bytes | bytearray | memoryview) -> bytes:
    """The 16-byte checksum of stored bytes (XXH3, 128 bit, no seed): finds accidents, not forgers."""
    return xxhash.xxh3_128_digest(data)


@dataclass(frozen=True, slots=True)
class Compression:
    """A parsed `--compress`."""

    codec: int
    level: int = 0

    @staticmethod
    def parse(text: str) -> Compression:
        """`none`, `zstd` or `zstd:LEVEL` with LEVEL from -7 to 19.

        Raises:
            UsageError: anything else.
        """
        if text == "none":
            return Compression(CODEC_NONE)
        if match := re.fullmatch(r"zstd(?::(-?[0-9]{1,2}))?", text):
            number = int(match[1] or "1")
            if -7 <= number <= 19:
                return Compression(CODEC_ZSTD, number)
        raise UsageError(
            f"unknown compression {text!r}",
            hint='use "none", "zstd" or "zstd:LEVEL" with LEVEL from -7 to 19',
        )


def decompress(stored: bytes | bytearray | memoryview, raw_bytes: int, path: str) -> bytes:
    """One zstd frame that must hold exactly `raw_bytes` (the caller has capped them and checked the checksum).

    Raises:
        ImageDamaged: the frame does not say, or does not hold, that size.
    """
    try:
        if zstandard.frame_content_size(bytes(stored[:18])) != raw_bytes:
            raise ImageDamaged(f"{path}: a compressed section has the wrong length", path=path)
        # allow_extra_data=False: bytes after the frame would be bytes nobody accounts for.
        raw = zstandard.ZstdDecompressor().decompress(
            stored, max_output_size=raw_bytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ImageDamaged(f"{path}: a compressed section cannot be read: {error}", path=path) from error
    if len(raw) != raw_bytes:
        raise ImageDamaged(f"{path}: a compressed section has the wrong length", path=path)
    return raw


def check_version(version: int, path: str, *, newest: int = FORMAT_VERSION) -> None:
    """Refuse what a later (or no) version of this format wrote.

    Args:
        newest: the last version that such a file may have.

    Raises:
        UnknownFormat: `version` is not ours.
    """
    if not FORMAT_VERSION <= version <= newest:
        known = f"version {newest}" if newest == FORMAT_VERSION else f"versions {FORMAT_VERSION} to {newest}"
        raise UnknownFormat(
            f"{path}: format version {version}, and this program reads {known} only",
            hint="read it with the version of checkpointd that wrote it",
            path=path,
            version=version,
        )


def valid_id(image_id: str) -> str:
    """`image_id` when it is a full id.

    Raises:
        UsageError: it is not 64 lower-case hexadecimal digits (so a path can never be made of it).
    """
    if not ID_PATTERN.fullmatch(image_id):
        raise UsageError(f"{image_id!r} is not an image id", hint="`checkpoint ls` lists the images")
    return image_id
