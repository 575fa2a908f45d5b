# SPDX-License-Identifier: Apache-2.0
"""The store: a directory of images, each one immutable generation of one process.

::

    STORE/                0700
      store.json          format version, id of the store, secret digest seed; written once
      lock                flock(2): shared while an image is opened; exclusive while one is published or removed
      images/ID.img       one generation: meta, state, complete index; ID is the SHA-256 of the file
      packs/ID.pack       page data, shared by all images that refer to it; ID covers its tables
      tmp/NAME/           one builder at work: `lock` (held by it), its packs, `parent.img` (a hard link: pins
                          the packs of the parent while the builder may refer to them)
      restored/NAME       which image a restored process came from (image/restored.py)

All files are 0600 and owned by the store's owner.  The exclusive lock is held for milliseconds: never while pages
are read, compressed or synced.  A reader that has opened an image keeps its files open, so removal does not
disturb it.  Removal: the image file goes first, then the packs no image (and no builder's parent) refers to; a
crash in between leaves packs that the next removal or `prune` drops.  While any image's header cannot be read,
no pack is dropped.

Errors: `StoreMissing`, `NotPermitted`, `Busy`, `ImageNotFound`, `UsageError` (names), `ImageDamaged`,
`UnknownFormat`, `NoSpace`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

from checkpointd import tracepoint
from checkpointd.errors import (
    CheckpointError,
    ImageDamaged,
    ImageNotFound,
    StoreMissing,
)
from checkpointd.image import files, refs
from checkpointd.image.builder import ImageBuilder
from checkpointd.image.consolidate import ConsolidationPolicy
from checkpointd.image.format import (
    CODEC_NONE,
    MAX_IMAGE_FILE_BYTES,
    Compression,
    valid_id,
)
from checkpointd.image.imagefile import HEAD_BYTES, Head, parse, parse_head
from checkpointd.image.info import ImageInfo, info_from_meta
from checkpointd.image.layout import CONFIG, check_owner, make_store, read_config
from checkpointd.image.pack import PackReader
from checkpointd.image.reader import Image, pread_all
from checkpointd.image.restored import read_note, write_note

if TYPE_CHECKING:
    from checkpointd.image.verify import VerifyReport

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Store:
    """An open store.  Safe for many threads and processes at once."""

    def __init__(self, path: str, root_fd: int, store_id: str, digest_seed: int) -> None:
        self.path = path
        self.id = store_id
        self.digest_seed = digest_seed
        self.policy = ConsolidationPolicy()
        self._root_fd = root_fd
        self.images_fd = files.open_dir("images", root_fd)
        self.packs_fd = files.open_dir("packs", root_fd)
        self.tmp_fd = files.open_dir("tmp", root_fd)
        self._packs: weakref.WeakValueDictionary[str, PackReader] = weakref.WeakValueDictionary()
        self._packs_mutex = threading.Lock()
        self._heads: dict[str, tuple[tuple[int, int, int], Head | str]] = {}
        self._finalizer = weakref.finalize(
            self, _close_all, root_fd, self.images_fd, self.packs_fd, self.tmp_fd
        )

    # -- opening ----------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = False) -> Store:
        """Open the store at `path`; with `create` make it when there is none.

        A store of ours that others may look into is closed to them (mode 0700).

        Raises:
            StoreMissing: nothing there, or something that is not a store.
            NotPermitted: it belongs to another user, or may not be opened.
            ImageDamaged, UnknownFormat: store.json cannot be read.
        """
        path = os.fspath(path)
        hint = "name another with --store, or make a first dump to create it"
        with files.translated(path):
            if create:
                make_store(path)
            try:
                root_fd = files.open_dir(path)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise StoreMissing(f"there is no store at {path}", hint=hint, path=path) from error
            try:
                config = read_config(path, root_fd)
                if config is None:
                    raise StoreMissing(f"{path} is not a store: it has no {CONFIG}", hint=hint, path=path)
                check_owner(path, root_fd)
                try:
                    return cls(path, root_fd, *config)
                except FileNotFoundError as error:
                    raise ImageDamaged(f"{path}: the store lacks a directory", path=path) from error
            except BaseException:
                os.close(root_fd)
                raise

    def is_at_its_path(self) -> bool:
        """Is what was opened still what lies at its path, or was it moved away?"""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._root_fd))
        except OSError:
            return False

    def locked(self, *, exclusive: bool) -> contextlib.AbstractContextManager[None]:
        """Hold the store's lock (see the module's head)."""
        return files.locked("lock", self._root_fd, self.path, exclusive=exclusive)

    # -- making -----------------------------------------------------------------------------------------------

    def begin(
        self,
        *,
        parent: Image | None = None,
        compress: str = "zstd:1",
        sync: bool = True,
        threads: int = 2,
        policy: ConsolidationPolicy | None = None,
        confirm_same: bool = False,
        delta: bool = False,
    ) -> ImageBuilder:
        """Start a new image.

        Args:
            parent: the image pages may be inherited from and compared with.
            compress: "none", "zstd" or "zstd:LEVEL".
            sync: make it durable at commit; False is for stores in memory.
            threads: how many threads may compress and write at once.
            confirm_same: compare pages that look the same as the parent's (by digest) byte by byte too.
            delta: store a page as its difference from the parent's where that is smaller.  Does nothing without a
                parent or without compression.

        Raises:
            UsageError: unknown compression.
            ImageNotFound: the parent was removed meanwhile.
        """
        compression = Compression.parse(compress)
        if parent is not None and parent.store_id != self.id:
            raise ValueError("the parent image lies in another store")
        name = secrets.token_hex(8)
        with files.translated(self.path), contextlib.ExitStack() as undo:
            with self.locked(exclusive=True):
                if self._sweep_tmp():
                    self._drop_packs()
                os.mkdir(name, files.DIR_MODE, dir_fd=self.tmp_fd)
                undo.callback(files.remove_tree, name, self.tmp_fd)
                dir_fd = files.open_dir(name, self.tmp_fd)
                undo.callback(os.close, dir_fd)
                lock_fd = files.create_file("lock", dir_fd)
                undo.callback(os.close, lock_fd)
                files.try_lock(lock_fd)
                if parent is not None:
                    try:
                        os.link(
                            f"{parent.id}.img", "parent.img", src_dir_fd=self.images_fd, dst_dir_fd=dir_fd
                        )
                    except FileNotFoundError as error:
                        raise _not_found(parent.id) from error
            tracepoint.hit("image.begun")
            builder = ImageBuilder(
                self,
                name=name,
                dir_fd=dir_fd,
                lock_fd=lock_fd,
                parent=parent,
                compression=compression,
                sync=sync,
                threads=threads,
                policy=policy or self.policy,
                confirm_same=confirm_same,
                delta=delta and compression.codec != CODEC_NONE,
            )
            undo.pop_all()
            return builder

    def next_sequence(self) -> int:
        """The number of the next image; the exclusive lock must be held."""
        return 1 + max((info.sequence for info in self.images()), default=0)

    # -- looking ----------------------------------------------------------------------------------------------

    def images(self) -> list[ImageInfo]:
        """All images, oldest first, from their headers alone.

        One whose header cannot be read is listed too, with `damaged` saying why, where its file's age puts it.
        """
        infos: list[tuple[ImageInfo, int]] = []
        with files.translated(f"{self.path}/images"):
            names = os.listdir(self.images_fd)
            for name in set(self._heads).difference(names):
                self._heads.pop(name, None)
            for name in names:
                image_id = name.removesuffix(".img")
                if not name.endswith(".img") or len(image_id) != 64:
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    infos.append(self._info(image_id))
        good = sorted((pair for pair in infos if not pair[0].damaged), key=lambda pair: pair[0].sequence)
        for pair in sorted((pair for pair in infos if pair[0].damaged), key=lambda pair: pair[1]):
            older = sum(1 for other in good if other[1] <= pair[1])
            good.insert(older, pair)
        return [info for info, _ in good]

    def latest_of(self, pid: int, start_time: int, boot_id: str) -> str:
        """The id of the newest whole image of that very process, else of the one it was restored from; "" for none."""
        wanted = (pid, start_time, boot_id)
        origin = read_note(self._root_fd, *wanted)
        found = ""
        for info in self.images():
            if not info.damaged:
                if (info.pid, info.start_time, info.boot_id) == wanted:
                    found = info.id
                elif info.id == origin and not found:
                    found = origin
        return found

    def note_restored(self, pid: int, start_time: int, boot_id: str, image_id: str) -> None:
        """Remember for `latest_of` that this process came from `image_id`.

        Raises:
            NotPermitted, NoSpace.
        """
        with files.translated(f"{self.path}/restored"):
            write_note(self._root_fd, pid, start_time, boot_id, image_id)

    def info(self, image_id: str) -> ImageInfo:
        """What `images` says of one image.

        Raises:
            ImageNotFound, UsageError.
        """
        try:
            with files.translated(f"{self.path}/images"):
                return self._info(valid_id(image_id))[0]
        except CheckpointError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise _not_found(image_id) from error
            raise

    def resolve(self, ref: str) -> str:
        """The full id `ref` names: an id, a unique prefix of 4 or more digits, latest, latest~N, tag:NAME, pid:N.

        Raises:
            UsageError: not such a word, or an ambiguous prefix (the candidates are listed).
            ImageNotFound: nothing has that name.
        """
        return refs.resolve(ref, self.images())

    def load(self, image_id: str) -> Image:
        """Open an image: its file is compared with its id, its packs are opened and their tables checked.

        Raises:
            ImageNotFound, UsageError, ImageDamaged, UnknownFormat.
        """
        valid_id(image_id)
        path = f"images/{image_id}.img"
        with _naming(image_id):
            with self.locked(exclusive=False), files.translated(f"{self.path}/{path}"):
                data, size_bytes = self._read_image(image_id)
                head, index = parse(data, path)
                packs = [self._open_pack(pack_id) for pack_id in head.pack_ids]
            return Image(
                info=_info_of(image_id, head, size_bytes),
                head=head,
                data=data,
                index=index,
                packs=packs,
                seed=self.digest_seed,
                store_id=self.id,
            )

    def verify(self, image_id: str, *, progress: Progress | None = None) -> VerifyReport:
        """Read everything an image needs and compare it with every checksum and digest.

        Raises:
            ImageNotFound, UsageError; damage is in the report.
        """
        from checkpointd.image.verify import verify_image  # noqa: PLC0415 (not needed to dump)

        return verify_image(self, valid_id(image_id), progress)

    def readable_packs(self, image_id: str, problems: list[str]) -> list[PackReader]:
        """The packs of a damaged image that can still be opened; why the others cannot goes to `problems`."""
        packs = []
        with self.locked(exclusive=False), files.translated(f"{self.path}/images/{image_id}.img"):
            try:
                fd = files.open_file(f"{image_id}.img", self.images_fd)
                try:
                    pack_ids = self._read_head(fd, os.fstat(fd).st_size, f"images/{image_id}.img").pack_ids
                finally:
                    os.close(fd)
            except (ImageDamaged, FileNotFoundError):
                return []
            for pack_id in pack_ids:
                try:
                    packs.append(self._open_pack(pack_id))
                except ImageDamaged as error:
                    if error.message not in problems:
                        problems.append(error.message)
        return packs

    # -- removing ---------------------------------------------------------------------------------------------

    def remove(self, image_id: str) -> None:
        """Remove one generation; all others stay whole.

        Raises:
            ImageNotFound, UsageError.
        """
        valid_id(image_id)
        with self.locked(exclusive=True), files.translated(f"{self.path}/images/{image_id}.img"):
            try:
                os.unlink(f"{image_id}.img", dir_fd=self.images_fd)
            except FileNotFoundError as error:
                raise _not_found(image_id) from error
            self._heads.pop(f"{image_id}.img", None)
            os.fsync(self.images_fd)
            tracepoint.hit("image.removed")
            self._sweep_tmp()
            self._drop_packs()

    def prune(self) -> int:
        """Remove what dead builders and crashes left behind; returns how many files went."""
        with self.locked(exclusive=True), files.translated(self.path):
            return self._sweep_tmp() + self._drop_packs()

    def export_image(self, image_id: str, out: BinaryIO, *, progress: Progress | None = None) -> None:
        """Write an image as one portable file, its chain flattened.  `out` need not seek.

        Raises:
            ImageNotFound, UsageError, ImageDamaged; NoSpace when `out` cannot take it.
        """
        from checkpointd.image.portable import export_image  # noqa: PLC0415

        with _naming(image_id):
            export_image(self.load(image_id), out, progress)

    def import_image(
        self, source: BinaryIO, *, progress: Progress | None = None, sync: bool = True
    ) -> ImageInfo:
        """Read what `export_image` wrote; the image gets an id of its own here and has no parent.

        Raises:
            ImageDamaged, UnknownFormat: truncated or changed; nothing stays behind.
        """
        from checkpointd.image.portable import import_image  # noqa: PLC0415

        return import_image(self, source, progress, sync=sync)

    # -- inside -----------------------------------------------------------------------------------------------

    def _info(self, image_id: str) -> tuple[ImageInfo, int]:
        head, status = self._head(f"{image_id}.img", self.images_fd)
        if isinstance(head, str):
            return ImageInfo(id=image_id, damaged=head), status.st_mtime_ns
        return _info_of(image_id, head, status.st_size), status.st_mtime_ns

    def _head(self, name: str, dir_fd: int) -> tuple[Head | str, os.stat_result]:
        """The head of an image file, or why it cannot be read; remembered while the file is the same.

        Raises:
            FileNotFoundError: removed meanwhile.
        """
        try:
            fd = files.open_file(name, dir_fd)
        except FileNotFoundError:
            raise
        except OSError as error:  # not ours to read, a directory, a link, a bad disk: the others can be used
            return f"images/{name} cannot be opened: {error.strerror}", os.lstat(name, dir_fd=dir_fd)
        try:
            status = os.fstat(fd)
            key = (status.st_ino, status.st_mtime_ns, status.st_size)
            known = self._heads.get(name)
            if known is not None and known[0] == key:
                return known[1], status
            head: Head | str
            try:
                head = self._read_head(fd, status.st_size, f"images/{name}")
            except CheckpointError as error:
                head = error.message
            except OSError as error:
                head = f"images/{name} cannot be read: {error.strerror}"
        finally:
            os.close(fd)
        self._heads[name] = (key, head)
        return head, status

    @staticmethod
    def _read_head(fd: int, file_bytes: int, path: str) -> Head:
        size_bytes = min(HEAD_BYTES, file_bytes)
        while True:
            head = parse_head(files.read_at(fd, size_bytes, 0, path), file_bytes, path)
            if isinstance(head, Head):
                return head
            size_bytes = min(head, file_bytes)  # what it needs lies within the file: parse_head checked

    def _read_image(self, image_id: str) -> tuple[bytes, int]:
        path = f"images/{image_id}.img"
        try:
            fd = files.open_file(f"{image_id}.img", self.images_fd)
        except FileNotFoundError as error:
            raise _not_found(image_id) from error
        try:
            data = pread_all(fd, MAX_IMAGE_FILE_BYTES, path)
        finally:
            os.close(fd)
        if hashlib.sha256(data).hexdigest() != image_id:
            parse_head(data, len(data), path)  # a clearer reason, when there is one
            raise ImageDamaged(f"{path}: its content does not have the digest it is named by", path=path)
        return data, len(data)

    def _open_pack(self, pack_id: str) -> PackReader:
        with self._packs_mutex:
            pack = self._packs.get(pack_id)
            if pack is None:
                path = f"packs/{pack_id}.pack"
                try:
                    fd = files.open_file(f"{pack_id}.pack", self.packs_fd)
                except FileNotFoundError as error:
                    raise ImageDamaged(f"{path}: page data of the image is missing", path=path) from error
                pack = self._packs[pack_id] = PackReader(pack_id, fd)
            return pack

    def _sweep_tmp(self) -> int:
        """Remove directories of builders that died; the exclusive lock must be held."""
        nr_removed = 0
        for name in os.listdir(self.tmp_fd):
            try:
                fd = os.open(f"{name}/lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self.tmp_fd)
            except FileNotFoundError:
                fd = -1  # died before it had a lock (or after most was removed): both under the lock we hold
            except NotADirectoryError:
                os.unlink(name, dir_fd=self.tmp_fd)
                continue
            try:
                if fd < 0 or files.try_lock(fd):
                    files.remove_tree(name, self.tmp_fd)
                    nr_removed += 1
            finally:
                if fd >= 0:
                    os.close(fd)
        return nr_removed

    def _drop_packs(self) -> int:
        """Remove packs nobody refers to; the exclusive lock must be held.  Unsure means keep."""
        referred: set[str] = set()
        pins = [f"{name}/parent.img" for name in os.listdir(self.tmp_fd)]
        images = [name for name in os.listdir(self.images_fd) if name.endswith(".img")]
        for dir_fd, names in ((self.images_fd, images), (self.tmp_fd, pins)):
            for name in names:
                try:
                    head, _ = self._head(name, dir_fd)
                except FileNotFoundError:
                    continue
                if isinstance(head, str):
                    return 0
                referred.update(head.pack_ids)
        nr_removed = 0
        for name in os.listdir(self.packs_fd):
            if name.removesuffix(".pack") not in referred:
                os.unlink(name, dir_fd=self.packs_fd)
                nr_removed += 1
                tracepoint.hit("image.pack_dropped")
        return nr_removed


def _info_of(image_id: str, head: Head, file_bytes: int) -> ImageInfo:
    bytes_packs = head.meta.get("bytes_packs", 0)
    return info_from_meta(
        image_id,
        head.meta,
        parent_id=head.parent_id,
        sequence=head.sequence,
        nr_pages=head.nr_pages,
        bytes_stored=file_bytes + (bytes_packs if type(bytes_packs) is int else 0),
        format_version=head.version,
        damaged="",
    )


@contextlib.contextmanager
def _naming(image_id: str) -> Iterator[None]:
    """Damage found within is said to be that of the image."""
    try:
        yield
    except ImageDamaged as error:
        raise error.of_image(f"image {image_id[:12]}") from error.__cause__


def _not_found(image_id: str) -> ImageNotFound:
    return ImageNotFound(
        f"there is no image {image_id[:12]}", hint="`checkpoint ls` lists the images", image_id=image_id
    )


def _close_all(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
