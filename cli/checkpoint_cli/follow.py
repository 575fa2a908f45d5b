# SPDX-License-Identifier: Apache-2.0
"""Following a long operation: events in, progress out, Ctrl-C to cancel.

The first Ctrl-C (or SIGTERM) asks the service to cancel and waits for its word that the target runs on; the
second one leaves at once, and the service goes on cancelling.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from checkpoint_cli.options import Session
from checkpoint_cli.output import print_line, tell
from checkpointd.errors import CheckpointError

if TYPE_CHECKING:
    from checkpointd.client.connection import Client

Event = dict[str, Any]


class Interruption:
    """Turns SIGINT and SIGTERM into a cancel of the operation under way."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._operation_id = ""
        self._signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_status(self) -> int:
        """128 + signal; 0 when there was none."""
        return 128 + self._signal if self._signal else 0

    def started(self, operation_id: str) -> None:
        self._operation_id = operation_id
        if self._signal:
            self._cancel()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._signal:
            os._exit(128 + number)
        self._signal = number
        if self._operation_id:
            self._cancel()

    def _cancel(self) -> None:
        # On a thread: a signal handler may have interrupted gRPC anywhere.
        def work() -> None:
            with contextlib.suppress(CheckpointError):
                self._client.cancel(self._operation_id)

        threading.Thread(target=work, daemon=True).start()


def follow(session: Session, client: Client, events: Iterable[Event], what: str) -> Event:
    """Show the events of an operation until its end; returns the summary.

    Raises:
        CheckpointError: the operation failed; after an interruption with `exit_status` in its details.
    """
    summary: Event = {}
    with Interruption(client) as interruption:
        try:
            with display(session, what) as show:
                for event in events:
                    kind = event["message_type"]
                    if kind == "started":
                        interruption.started(event["operation_id"])
                    elif kind == "summary":
                        summary = event
                    if session.json:
                        print_line(event)
                    show(event)
        except CheckpointError as error:
            if interruption.exit_status and error.reason == "CANCELLED":
                error.details["exit_status"] = interruption.exit_status
            raise
    return summary


@contextlib.contextmanager
def display(session: Session, what: str) -> Iterator[Any]:
    """A progress bar where there is a terminal; call what it gives with every event."""
    if session.json or session.quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield _lines if session.verbose and not session.json else _nothing
        return
    from rich.console import Console  # noqa: PLC0415 - only where somebody looks
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (
        TextColumn(what),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    # rich itself honours NO_COLOR
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)

        def show(event: Event) -> None:
            if event["message_type"] == "phase":
                progress.update(task, description=event["phase"], total=None, completed=0)
            elif event["message_type"] == "progress":
                progress.update(task, total=event["total"] or None, completed=event["done"])

        yield show


def _nothing(_event: Event) -> None:
    pass


def _lines(event: Event) -> None:
    if event["message_type"] == "started":
        tell(f"operation {event['operation_id']}")
    elif event["message_type"] == "phase":
        tell(event["phase"])
