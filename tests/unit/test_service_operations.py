# SPDX-License-Identifier: Apache-2.0
"""Operations: replay, cancel and deadline."""

from __future__ import annotations

import threading
import time

import pytest

from checkpointd.errors import Cancelled, CheckpointError, FrozenTooLong, NoSpace, UsageError
from checkpointd.service.operations import KEPT_OPERATIONS, Operation, OperationTable


def never() -> bool:
    return False


def types(events):
    return [event["type"] for event in events]


def test_a_follower_that_comes_late_sees_everything_from_the_start():
    table = OperationTable()
    operation = table.start(
        Operation("dump", pid=1), lambda o: o.publish({"type": "phase", "phase": "copying"})
    )
    assert operation.wait(30)
    for _ in range(2):
        assert types(operation.follow(never)) == ["started", "phase"]


def test_a_failure_reaches_every_follower():
    def work(operation):
        raise NoSpace("the disk is full")

    operation = OperationTable().start(Operation("dump", pid=1), work)
    for _ in range(2):
        with pytest.raises(NoSpace):
            list(operation.follow(never))


def test_a_surprise_becomes_an_error_with_a_sentence():
    operation = OperationTable().start(Operation("dump", pid=1), lambda o: 1 / 0)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        list(operation.follow(never))


def test_cancel_calls_the_canceller_once():
    calls, gate = [], threading.Event()

    def work(operation):
        operation.on_cancel(lambda: (calls.append(1), gate.set()))
        assert gate.wait(30)
        raise Cancelled("the agent's words")

    operation = OperationTable().start(Operation("dump", pid=1), work)
    while not calls:
        operation.cancel()
    operation.cancel()
    with pytest.raises(Cancelled, match="dump of pid 1"):
        list(operation.follow(never))
    assert calls == [1]


def test_work_cancelled_before_it_began_does_not_begin():
    operation = Operation("dump", pid=1)
    operation.cancel()
    with pytest.raises(Cancelled):
        operation.on_cancel(lambda: None)
    with pytest.raises(Cancelled):
        operation.check_cancelled()


def test_the_deadline_cancels_with_its_own_words():
    gate = threading.Event()

    def work(operation):
        operation.on_cancel(gate.set)
        assert gate.wait(30)
        raise Cancelled("the agent's words")

    operation = Operation("dump", pid=1, deadline=time.monotonic() + 0.2)
    OperationTable().start(operation, work)
    with pytest.raises(FrozenTooLong, match="deadline"):
        list(operation.follow(never))


def test_a_result_that_came_before_the_cancel_stands():
    operation = OperationTable().start(Operation("dump", pid=1), lambda o: None)
    assert operation.wait(30)
    operation.cancel()
    assert operation.state == "done"
    assert types(operation.follow(never)) == ["started"]


def test_a_follower_that_goes_away_does_not_end_the_operation():
    gate = threading.Event()
    operation = OperationTable().start(Operation("dump", pid=1), lambda o: gate.wait(30))
    left = threading.Event()
    follower = threading.Thread(target=lambda: list(operation.follow(left.is_set)))
    follower.start()
    left.set()
    operation.wake()
    follower.join(30)
    assert not follower.is_alive()
    assert operation.state == "running"
    gate.set()
    assert operation.wait(30)
    assert operation.state == "done"


def test_progress_is_thinned_out_but_its_end_is_kept():
    operation = Operation("dump", pid=1)
    for done in range(1, 1001):
        operation.publish({"type": "progress", "done": done, "total": 1000, "unit": "bytes"})
    operation.end(None)
    events = [event for event in operation.follow(never) if event["type"] == "progress"]
    assert len(events) < 100
    assert events[-1]["done"] == 1000


def test_operations_are_found_by_unique_prefix():
    table = OperationTable()
    one = table.start(Operation("dump", pid=1), lambda o: None)
    table.start(Operation("dump", pid=1), lambda o: None)
    assert table.find(one.id) is one
    for ref in ("op-", "", "op-zzz"):
        with pytest.raises(UsageError):
            table.find(ref)


def test_old_operations_are_forgotten_and_running_ones_never():
    table, gate = OperationTable(), threading.Event()
    running = table.start(Operation("dump", pid=1), lambda o: gate.wait(30))
    for _ in range(KEPT_OPERATIONS + 20):
        assert table.start(Operation("dump", pid=1), lambda o: None).wait(30)
    assert len(table.all()) <= KEPT_OPERATIONS + 2
    assert table.find(running.id) is running
    gate.set()
    assert running.wait(30)


def test_an_operation_says_what_it_is_about():
    assert str(Operation("dump", pid=7)).startswith("dump of pid 7 (op-")
    assert str(Operation("verify", image_id="0123456789abcdef")).startswith("verify of 0123456789ab (op-")
    assert str(Operation("verify")).startswith("verify of all images (op-")
