# SPDX-License-Identifier: Apache-2.0
"""pytest plugin: fail a test when a program changes more memory than allowed in any interval.

The marker limits the test's own process, the fixture any other::

    @pytest.mark.limit_dirty("4 MB")                    # per second
    def test_parsing(): ...

    def test_server(limit_dirty):
        server = subprocess.Popen([...])
        limit_dirty.watch(server, "4 MB", interval="500ms")
        ...load it...

What is counted is what changed: bytes of the pages whose contents differ between two full reads of the frozen process
(`checkpoint measure --backends content`), so nothing is put into the process and any kernel will do.  An interval is
running time, freezes not counted.  A test that ends before its first interval does fails: nothing was measured.

Limits: "4 MB" is 4,000,000 bytes, "4 MiB" is 4,194,304.  Errors of the measurement fail the test in their own words.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest

DEFAULT_INTERVAL = "1s"
_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 60.0
_EPOCHS = 10_000
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_TIMES_US = {"ms": 1000, "s": 1_000_000, "m": 60_000_000}

_meters: pytest.StashKey[list[Meter]] = pytest.StashKey()


def bytes_of(text: str) -> int:
    """The bytes in e.g. "4 MB" or "512 KiB".

    Raises:
        ValueError: not a number with such a unit.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no amount of memory: write e.g. '4 MB' or '512 KiB'")
    return int(float(match[1]) * _UNITS[match[2]])


def microseconds_of(text: str) -> int:
    """The microseconds in e.g. "500ms" or "1s".

    Raises:
        ValueError: not a number with such a unit.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is no interval: write e.g. '500ms' or '1s'")
    return int(float(match[1]) * _TIMES_US[match[2]])


class Meter:
    """One measurement under way, on a thread of its own.  `changed`: bytes changed in each interval so far."""

    def __init__(self, pid: int, limit: str, interval: str) -> None:
        self.pid, self.limit, self.interval = pid, limit, interval
        self.changed: list[int] = []
        self._limit_bytes, self._interval_us = bytes_of(limit), microseconds_of(interval)
        self._begun, self._operation_id = threading.Event(), ""
        self._error: Exception | None = None
        self._stopping = False
        self._worst: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._follow, name=f"limit-dirty-{pid}", daemon=True)

    def start(self) -> None:
        """Returns when the first interval has begun, or it cannot begin."""
        self._thread.start()
        if not self._begun.wait(_START_TIMEOUT_S):
            self._error = TimeoutError(f"the measurement of process {self.pid} did not begin")

    def stop(self) -> None:
        """End the measurement; the process runs on."""
        self._stopping = True
        if self._operation_id:
            with contextlib.suppress(Exception), _client() as client:
                client.cancel(self._operation_id)
        self._thread.join(_END_TIMEOUT_S)

    def verdict(self) -> str:
        """Why the test has to fail; "" when it has not."""
        if self._error is not None:
            hint = getattr(self._error, "hint", "")
            return f"limit_dirty: {self._error}" + (f" ({hint})" if hint else "")
        if not self.changed:
            return (
                f"limit_dirty: nothing was measured: the test ended before one interval of {self.interval}; "
                "give a shorter interval"
            )
        worst = max(self.changed)
        if worst <= self._limit_bytes:
            return ""
        nr_over = sum(one > self._limit_bytes for one in self.changed)
        return (
            f"limit_dirty: process {self.pid} changed {worst / 1e6:.2f} MB in interval "
            f"{self.changed.index(worst) + 1} of {len(self.changed)}, more than {self.limit} per {self.interval} "
            f"({nr_over} intervals were over)\n" + _mappings(self._worst)
        )

    def _follow(self) -> None:
        from checkpointd.errors import CheckpointError  # noqa: PLC0415 - pytest loads us even where nobody asks

        try:
            with _client() as client:
                events = client.measure(
                    self.pid,
                    interval_us=self._interval_us,
                    epochs=_EPOCHS,
                    backends=["content"],
                    cancel_on_disconnect=True,
                )
                for event in events:
                    if event["message_type"] == "started":
                        self._operation_id = event["operation_id"]
                    elif event["message_type"] == "record":
                        self._take(json.loads(event["json"]))
        except (CheckpointError, OSError) as error:
            if not (self._stopping and getattr(error, "reason", "") == "CANCELLED"):
                self._error = error
        finally:
            self._begun.set()

    def _take(self, record: dict[str, Any]) -> None:
        if record["type"] != "epoch":
            return
        if record["epoch"] == 0:
            self._begun.set()
            return
        self.changed.append(record["bytes_raw"])
        if record["bytes_raw"] == max(self.changed):
            self._worst = record


class LimitDirty:
    """What the fixture gives."""

    def __init__(self, meters: list[Meter]) -> None:
        self._meters = meters

    def watch(
        self, process: int | subprocess.Popen[Any], limit: str, *, interval: str = DEFAULT_INTERVAL
    ) -> Meter:
        """Measure a process until the test ends; the test fails if it changed more than `limit` in an interval."""
        meter = Meter(process if isinstance(process, int) else process.pid, limit, interval)
        self._meters.append(meter)
        meter.start()
        return meter


@pytest.fixture
def limit_dirty(request: pytest.FixtureRequest) -> Iterator[LimitDirty]:
    """See `checkpointd.pytest_plugin`."""
    meters: list[Meter] = request.node.stash.setdefault(_meters, [])
    yield LimitDirty(meters)
    for meter in meters:
        meter.stop()  # of tests that failed otherwise


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        'limit_dirty(limit, interval="1s"): fail if this process changes more memory, e.g. "4 MB", in an interval',
    )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    meters: list[Meter] = pyfuncitem.stash.setdefault(_meters, [])
    mark = pyfuncitem.get_closest_marker("limit_dirty")
    if mark is not None:
        own = Meter(os.getpid(), *_words(*mark.args, **mark.kwargs))
        meters.append(own)
        own.start()
    try:
        result = yield
    finally:
        for meter in meters:
            meter.stop()
    failures = [why for meter in meters if (why := meter.verdict())]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return result


def _words(limit: str, interval: str = DEFAULT_INTERVAL) -> tuple[str, str]:
    return limit, interval


def _client() -> Any:
    from checkpointd.client import connect  # noqa: PLC0415

    return connect(os.environ.get("CHECKPOINT_SOCKET") or None)


def _mappings(record: dict[str, Any]) -> str:
    """The five mappings that changed most, a line each."""
    from checkpointd.report.summary import mapping_name  # noqa: PLC0415

    rows = [row for row in record["mappings"] if row[6]][:5]
    return "\n".join(f"  {row[6] * 4096 / 1e6:8.2f} MB  {mapping_name(row)}" for row in rows)
