# SPDX-License-Identifier: Apache-2.0
"""Children that work for an agent while its target may stand still: none of them can hold it for ever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest

from checkpointd.dump.page_reading import CopyRequest
from checkpointd.dump.pages import PageWorker
from checkpointd.errors import CheckpointError
from checkpointd.measure.reader import ReaderProcess
from checkpointd.memory import PRIVATE_OBJECT

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


def test_its_errors_are_those_of_the_agent() -> None:
    _, ask, close = page_worker()
    with pytest.raises(CheckpointError, match="no image is being written"):
        ask()
    close()


def test_one_that_is_stopped_cannot_hold_a_long_request() -> None:
    worker = PageWorker()
    os.kill(worker._child.pid, signal.SIGSTOP)
    scattered = np.stack((np.arange(0, 120_000, 2), np.ones(60_000)), axis=1).astype(np.uint64)
    with pytest.raises(CheckpointError, match="ended unexpectedly"):
        worker.copy([CopyRequest(os.getpid(), PRIVATE_OBJECT, scattered)])
    worker.close()


def test_nothing_is_asked_of_a_worker_that_reads() -> None:
    """Its answers would be taken for those to other requests."""
    worker = PageWorker()
    worker.start_copy([])
    for ask in (lambda: worker.start_copy([]), lambda: worker.copy([]), worker.encode):
        with pytest.raises(CheckpointError, match="while it reads"):
            ask()
    worker.finish_copy()
    worker.copy([])
    worker.close()
