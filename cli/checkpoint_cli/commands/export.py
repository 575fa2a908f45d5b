# SPDX-License-Identifier: Apache-2.0
"""`checkpoint export`."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import stat
import sys
import termios
import time
from collections.abc import Iterator
from typing import BinaryIO

import click

from checkpoint_cli.options import IMAGE_HELP, Session, complete_image, session_options, store_option
from checkpoint_cli.output import print_document, short_id, size
from checkpointd.errors import CheckpointError, NoSpace, NotPermitted

PIPE_POLL_MS = 20
PATIENCE_S = 10.0  # with a reader that takes nothing


@click.command(
    "export",
    short_help="Write an image as one portable file.",
    epilog="\b\nexample:\n  checkpoint export latest -o redis.ckpt && scp redis.ckpt other:",
    help="Write an image, its chain flattened, as one file that `checkpoint import` takes anywhere.\n\n"
    f"{IMAGE_HELP}\n\nThe file holds the process's memory, secrets too: it is made with mode 0600.",
)
@click.argument("image", shell_complete=complete_image)
@click.option(
    "-o", "--output", required=True, metavar="FILE", help='The file to write; "-" is the standard output.'
)
@click.option("-f", "--force", is_flag=True, help="Replace FILE if it exists.")
@store_option
@session_options
def command(session: Session, image: str, output: str, force: bool, store: str) -> None:
    if output == "-" and sys.stdout.isatty():
        raise click.UsageError("an image is not for a terminal: redirect the output, or give -o FILE")
    if output != "-" and os.path.lexists(output):
        if not (os.path.isfile(output) or os.path.islink(output)):
            raise click.UsageError(f"{output} is not a regular file; give another, or write through -o -")
        if not force:
            raise click.UsageError(f"{output} exists; --force replaces it")
    nr_bytes = 0
    with session.client() as client:
        parts = client.export(image, store=store)
        image_id = next(parts).decode("ascii")  # a wrong name fails here, before there is a file
        with _translated(output), _sink(output, force) as sink:
            for part in parts:
                sink.write(part)
                nr_bytes += len(part)
    if output == "-":
        return
    if session.json:
        print_document({"image_id": image_id, "file": output, "bytes": nr_bytes})
    else:
        session.say(f"image {short_id(image_id)} exported to {output}, {size(nr_bytes)}")


@contextlib.contextmanager
def _sink(output: str, force: bool) -> Iterator[BinaryIO]:
    """The file to write; it gets its name only when it is whole and on the disk."""
    if output == "-":
        with os.fdopen(sys.stdout.fileno(), "wb", closefd=False) as sink:
            yield sink
        _until_read(sys.stdout.fileno())
        return
    part = f"{output}.{os.getpid()}.part"
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        if force:
            os.replace(part, output)
        else:
            os.link(part, output)  # unlike rename, does not replace what came to be there meanwhile
            os.unlink(part)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise


def _until_read(fd: int) -> None:
    """Wait until a pipe's reader has taken all of it: the end of a small image fits into a pipe that nobody reads on.

    Not for ever: a reader may be waiting for our end before it reads.

    Raises:
        BrokenPipeError: there is no reader any more.
    """
    if not stat.S_ISFIFO(os.fstat(fd).st_mode) or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_RDWR:
        return
    reader = select.poll()
    reader.register(fd, 0)  # POLLERR, when the last reader is gone, is always told
    left, since = _unread(fd), time.monotonic()
    while left and time.monotonic() - since < PATIENCE_S:
        gone = reader.poll(PIPE_POLL_MS)
        now = _unread(fd)
        if gone and now:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        if now != left:
            left, since = now, time.monotonic()


def _unread(pipe: int) -> int:
    """Bytes in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


@contextlib.contextmanager
def _translated(output: str) -> Iterator[None]:
    name = "the standard output" if output == "-" else output
    try:
        yield
    except BrokenPipeError as error:
        raise CheckpointError(
            "the reader of the standard output is gone: the export is incomplete",
            hint="see why the reader ended, throw away what it has, and export again",
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"no space left for {name}", hint="free some, or write elsewhere with -o"
            ) from error
        kind = NotPermitted if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else CheckpointError
        raise kind(f"cannot write {name}: {error.strerror}", hint="give another file with -o") from error
