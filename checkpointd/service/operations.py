# SPDX-License-Identifier: Apache-2.0
"""Long operations: a thread each, a log of events that anybody may follow from the start, and a way to cancel.

An operation does not belong to the call that started it: a client may go away and another one may follow the
same log.  Events are plain dicts with a "type" (started, phase, progress, stats, summary); service/convert.py
turns them into messages.

Lock order: `OperationTable._lock` before `Operation._changed`; no callback is called with either held.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from checkpointd.errors import Cancelled, CheckpointError, FrozenTooLong, UsageError

log = logging.getLogger(__name__)

Event = dict[str, Any]

PROGRESS_INTERVAL_S = 0.1
KEPT_OPERATIONS = 200
KEPT_MEASUREMENTS = 4
"""Their logs hold the whole record, megabytes perhaps; the client has it in its file."""


class Operation:
    """One dump, restore, verify or measurement.

    Attributes:
        deadline: on time.monotonic(), or None.
        state: "running", "done" or "failed".
    """

    def __init__(self, kind: str, *, pid: int = 0, image_id: str = "", deadline: float | None = None) -> None:
        self.id = "op-" + secrets.token_hex(6)
        self.kind = kind
        self.pid = pid
        self.image_id = image_id
        self.deadline = deadline
        self.started_at = time.time()
        self.state = "running"
        self._error: CheckpointError | None = None
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._cancel_error: CheckpointError | None = None
        self._canceller: Callable[[], None] | None = None
        self._last_progress_at = 0.0
        self.publish({"type": "started", "operation_id": self.id})

    def __str__(self) -> str:
        what = f"pid {self.pid}" if self.pid else self.image_id[:12] or "all images"
        return f"{self.kind} of {what} ({self.id})"

    def publish(self, event: Event) -> None:
        """Add to the log; progress more often than `PROGRESS_INTERVAL_S` is dropped."""
        if event["type"] == "progress":
            now = time.monotonic()
            if now - self._last_progress_at < PROGRESS_INTERVAL_S and event["done"] != event["total"]:
                return
            self._last_progress_at = now
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def on_cancel(self, canceller: Callable[[], None] | None) -> None:
        """Name what ends the work now under way; it is called at most once, from another thread.

        Raises:
            CheckpointError: the operation was cancelled already.
        """
        with self._changed:
            if canceller is not None and self._cancel_error is not None:
                raise self._cancel_error
            self._canceller = canceller

    def cancel(self, error: CheckpointError | None = None) -> None:
        """Ask the operation to end, with this error if it ends by the asking; returns at once."""
        with self._changed:
            if self.state != "running" or self._cancel_error is not None:
                return
            self._cancel_error = error or Cancelled(f"the {self} was cancelled")
            canceller, self._canceller = self._canceller, None
        if canceller is not None:
            canceller()

    @property
    def cancel_error(self) -> CheckpointError | None:
        return self._cancel_error

    def check_cancelled(self) -> None:
        """For work that looks by itself.

        Raises:
            CheckpointError: the operation was cancelled, or its deadline has passed.
        """
        if self._cancel_error is not None:
            raise self._cancel_error
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise self.deadline_error()

    def deadline_error(self) -> FrozenTooLong:
        return FrozenTooLong(
            f"the {self} did not end before its deadline and was cancelled",
            hint="allow it more time with --timeout",
        )

    def end(self, error: CheckpointError | None) -> None:
        with self._changed:
            self.state = "failed" if error else "done"
            self._error = error
            self._changed.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; False when it has not come in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.state != "running", timeout_s)

    def wake(self) -> None:
        """Make followers look at their `stopped` again."""
        with self._changed:
            self._changed.notify_all()

    def follow(self, stopped: Callable[[], bool]) -> Iterator[Event]:
        """All events from the first one, as they come, until the end or until `stopped()`.

        Raises:
            CheckpointError: the operation failed.
        """
        position = 0
        while True:
            with self._changed:
                while not (stopped() or self.state != "running" or position < len(self._events)):
                    self._changed.wait()
                fresh = self._events[position:]
                ended = self.state != "running"
            if stopped():
                return
            position += len(fresh)
            yield from fresh
            if ended:
                if self._error is not None:
                    raise self._error
                return


class OperationTable:
    """All operations of this service; the latest `KEPT_OPERATIONS` ended ones stay to be watched."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._operations: dict[str, Operation] = {}

    def start(self, operation: Operation, work: Callable[[Operation], None]) -> Operation:
        """Run `work` on a thread of its own; what it raises ends the operation."""
        with self._lock:
            ended = [o for o in self._operations.values() if o.state != "running"]
            measured = [o for o in ended if o.kind == "measure"]
            surplus = [
                *ended[: max(0, len(ended) - KEPT_OPERATIONS)],
                *measured[: max(0, len(measured) - KEPT_MEASUREMENTS)],
            ]
            for old in surplus:
                self._operations.pop(old.id, None)
            self._operations[operation.id] = operation
        threading.Thread(target=self._run, args=(operation, work), name=operation.id, daemon=True).start()
        return operation

    def _run(self, operation: Operation, work: Callable[[Operation], None]) -> None:
        timer = None
        if operation.deadline is not None:
            left_s = max(0.0, operation.deadline - time.monotonic())
            timer = threading.Timer(left_s, lambda: operation.cancel(operation.deadline_error()))
            timer.daemon = True
            timer.start()
        error: CheckpointError | None = None
        try:
            work(operation)
        except Cancelled as cancelled:
            error = operation.cancel_error or cancelled  # the deadline's own words, not the agent's
        except CheckpointError as raised:
            error = raised
        except Exception as unexpected:
            log.exception("the %s failed unexpectedly", operation)
            error = CheckpointError(
                f"the {operation} failed inside the service: {type(unexpected).__name__}: {unexpected}",
                hint="the service's log has the traceback; please report it",
            )
        finally:
            if timer is not None:
                timer.cancel()
        log.info("the %s %s", operation, f"failed: {error}" if error else "is done")
        operation.end(error)

    def find(self, ref: str) -> Operation:
        """By id or unique prefix of it.

        Raises:
            UsageError: none or several fit.
        """
        with self._lock:
            found = [o for o in self._operations.values() if o.id.startswith(ref)] if ref else []
        if len(found) != 1:
            raise UsageError(
                f"{'no operation has' if not found else f'{len(found)} operations have'} the id {ref!r}",
                hint="`checkpoint status` lists them; a restarted service knows none of its predecessor's",
            )
        return found[0]

    def all(self) -> list[Operation]:
        with self._lock:
            return list(self._operations.values())

    def running(self) -> list[Operation]:
        return [operation for operation in self.all() if operation.state == "running"]
