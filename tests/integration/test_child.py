# SPDX-License-Identifier: Apache-2.0
"""Children that work for an agent while its target may stand still: none of them can hold it for ever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from checkpointd.dump.pages import PageWorker
from checkpointd.errors import CheckpointError
from checkpointd.measure.reader import ReaderProcess

Ask = Callable[[], object]


def page_worker() -> tuple[int, Ask, Ask]:
    worker = PageWorker()
    return worker._child.pid, worker.encode, worker.close


def reader() -> tuple[int, Ask, Ask]:
    process = ReaderProcess(os.getpid())
    return process._child.pid, process.prepare, process.close


@pytest.mark.parametrize("make", [page_worker, reader])
def test_one_that_is_stopped_is_ended(make: Callable[[], tuple[int, Ask, Ask]]) -> None:
    pid, ask, close = make()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(CheckpointError, match="ended unexpectedly"):
        ask()
    close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("make", [page_worker, reader])
def test_one_that_was_killed_is_said_to_be_gone(make: Callable[[], tuple[int, Ask, Ask]]) -> None:
    pid, ask, close = make()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="ended unexpectedly"):
        for _ in range(2):  # the first may have been sent before it died
            ask()
            time.sleep(0.1)
    close()


@pytest.mark.parametrize("make", [page_worker, reader])
def test_its_errors_are_those_of_the_agent(make: Callable[[], tuple[int, Ask, Ask]]) -> None:
    _, ask, close = make()
    if make is reader:
        ask()
    else:
        with pytest.raises(CheckpointError, match="no image is being written"):
            ask()
    close()
