# SPDX-License-Identifier: Apache-2.0
"""The directory of a store and its store.json: making, reading, whose it is.

Errors: `StoreMissing`, `NotPermitted`, `ImageDamaged`, `UnknownFormat`; OSError passes through.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat

from checkpointd.errors import ImageDamaged, NotPermitted, StoreMissing
from checkpointd.image import files
from checkpointd.image.format import FORMAT_VERSION, check_version, checksum
from checkpointd.image.reader import pread_all

CONFIG = "store.json"
_MAX_CONFIG_BYTES = 4096


def make_store(path: str) -> None:
    """Make what is missing of a store; safe against another process doing the same."""
    parent = os.path.abspath(os.path.join(path, os.pardir))
    os.makedirs(parent, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, files.DIR_MODE)
        _sync_dir(parent)
    try:
        root_fd = files.open_dir(path)
    except NotADirectoryError as error:
        raise StoreMissing(f"{path} is not a directory", path=path) from error
    try:
        if read_config(path, root_fd) is not None:
            return
        # store.json may appear now: another process makes the same store.
        ours = {"images", "packs", "tmp", "lock", CONFIG}
        strange = set(os.listdir(root_fd)) - ours
        if strange:
            raise StoreMissing(
                f"{path} is not a store: it is not empty and has no {CONFIG}",
                hint="name a directory that is new or empty",
                path=path,
            )
        check_owner(path, root_fd)
        _refuse_lost_config(path, root_fd)
        for name in ("images", "packs", "tmp"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, files.DIR_MODE, dir_fd=root_fd)
        text = _config_text(secrets.token_hex(16), secrets.token_hex(8))
        temporary = f"tmp/store-{secrets.token_hex(8)}"
        fd = files.create_file(temporary, root_fd)
        try:
            files.write_at(fd, text, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        # When another process was first, its store is as good (and may have swept our file from tmp).
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.link(temporary, CONFIG, src_dir_fd=root_fd, dst_dir_fd=root_fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=root_fd)
        os.fsync(root_fd)
    finally:
        os.close(root_fd)


def _refuse_lost_config(path: str, root_fd: int) -> None:
    """A new store.json would have another seed, under which no digest of the images there holds.

    Raises:
        ImageDamaged: there are images or packs.
    """
    for name in ("images", "packs"):
        with contextlib.suppress(FileNotFoundError):
            fd = files.open_dir(name, root_fd)
            try:
                held = os.listdir(fd)
            finally:
                os.close(fd)
            # it may have been made, and used, since it was looked for
            if held and read_config(path, root_fd) is None:
                raise ImageDamaged(
                    f"the store at {path} has lost its {CONFIG}: nothing was changed",
                    hint=f"bring {path}/{CONFIG} back from a copy; without it nothing here can be verified",
                    path=path,
                )


def read_config(path: str, root_fd: int) -> tuple[str, int] | None:
    """Id and digest seed of the store, None when there is no store.json."""
    where = f"{path}/{CONFIG}"
    try:
        fd = files.open_file(CONFIG, root_fd)
    except FileNotFoundError:
        return None
    try:
        data = pread_all(fd, _MAX_CONFIG_BYTES, where)
    finally:
        os.close(fd)
    try:
        config = json.loads(data)
        version, store_id, seed = config["format_version"], str(config["id"]), str(config["digest_seed"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ImageDamaged(f"{where}: it is damaged", path=where) from error
    if type(version) is int:
        check_version(version, where)
    if data != _config_text(store_id, seed) or not re.fullmatch(r"[0-9a-f]{16}", seed):
        raise ImageDamaged(f"{where}: it is damaged", path=where)
    return store_id, int(seed, 16)


def _config_text(store_id: str, seed: str) -> bytes:
    """The one way store.json is written, its own checksum in it: so any changed byte shows."""
    body = {"format_version": FORMAT_VERSION, "id": store_id, "digest_seed": seed}
    sealed = {**body, "checksum": checksum(json.dumps(body).encode()).hex()}
    return (json.dumps(sealed, indent=2) + "\n").encode()


def check_owner(path: str, root_fd: int) -> None:
    status = os.fstat(root_fd)
    if status.st_uid != os.geteuid():
        raise NotPermitted(
            f"the store {path} belongs to user {status.st_uid}, and this is user {os.geteuid()}",
            hint="images hold secrets: each user has a store of their own",
            path=path,
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        os.fchmod(root_fd, files.DIR_MODE)


def _sync_dir(path: str) -> None:
    fd = files.open_dir(path)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
