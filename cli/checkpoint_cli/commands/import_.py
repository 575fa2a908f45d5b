# SPDX-License-Identifier: Apache-2.0
"""`checkpoint import`."""

from __future__ import annotations

import errno
import os
import select
from types import TracebackType

import click

from checkpoint_cli.options import Session, session_options, store_option
from checkpoint_cli.output import print_document, short_id
from checkpointd.errors import CheckpointError, UsageError


@click.command(
    "import",
    short_help="Take in an exported file.",
    epilog="\b\nexample:\n  checkpoint import redis.ckpt && checkpoint restore latest",
)
@click.argument("file", metavar="FILE")
@store_option
@session_options
def command(session: Session, file: str, store: str) -> None:
    """Take an exported file into the store as a new image ("-": from the standard input).

    Restoring an imported image runs the code in it with the credentials it names: import only files you trust.
    """
    with _Source(file) as source, session.client() as client:
        answer = client.import_file(source, store=store)
    image = answer["image"]
    if session.json:
        print_document(answer)
    elif session.quiet:
        click.echo(image["id"])
    else:
        session.say(
            f"image {short_id(image['id'])} imported ({image['name'] or 'unnamed'}, pid {image['pid']})"
        )


class _Source:
    """What is imported, read by a thread of gRPC's that the end of the command waits for.

    Leaving the context ends a read that waits for a pipe or a terminal, which Ctrl-C of another thread would not.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._failure: OSError | None = None
        try:
            self._fd = 0 if file == "-" else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            os.pread(self._fd, 0, 0)  # a directory cannot be read
        except OSError as error:
            if error.errno != errno.ESPIPE:
                raise self._unreadable(error) from error
        self._end, self._ends = os.pipe()

    def read(self, nr_bytes: int) -> bytes:
        """Nothing at the end of the file, when nothing more is wanted, and when it cannot be read on."""
        if self._end in select.select([self._fd, self._end], [], [])[0]:
            return b""
        try:
            return os.read(self._fd, nr_bytes)
        except OSError as error:
            self._failure = error
            return b""

    def __enter__(self) -> _Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._ends)  # the other descriptors stay: the thread may be using them, and the command ends
        if self._failure is not None and isinstance(value, CheckpointError):
            raise self._unreadable(self._failure) from value

    def _unreadable(self, error: OSError) -> UsageError:
        return UsageError(f"cannot read {self._file}: {error.strerror}", hint="name a file made by export")
