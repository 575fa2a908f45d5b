# SPDX-License-Identifier: Apache-2.0
"""Dumps that fail half-way, and processes that die or stand still: no page is lost, nobody waits."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointd import tracepoint
from checkpointd.dump import dump as dump_module
from checkpointd.dump.dump import Dumper, DumpOptions
from checkpointd.errors import CheckpointError, FrozenTooLong, Unsupported
from checkpointd.tracking import uffd_wp
from checkpointd.tracking.base import TrackingLostError
from tests.programs.page_program import options

POINTS = ["track.written", "track.armed", "dump.collected", "dump.copied", "dump.thawed", "dump.commit"]


@pytest.mark.parametrize("point", POINTS)
def test_failed_dump_loses_no_dirty_page(target, dumper, store, tmp_path, point):
    dumper.dump(options(tmp_path))
    target.write(p5=77)

    def fail(name):
        raise OSError(5, "staged failure", name)

    tracepoint.register(point, fail)
    with pytest.raises(OSError, match="staged failure"):
        dumper.dump(options(tmp_path, incremental=True))
    tracepoint.clear()
    target.write(p9=78)
    made = dumper.dump(options(tmp_path, incremental=True))
    assert made.backend == "uffd-wp"
    assert target.memory_differs_from(store.load(made.image_id)) == []
    assert len(store.images()) == 2


@pytest.mark.needs("uffd_wp", "holes_are_written")
def test_page_worker_killed_while_it_walks_loses_no_dirty_page(target, store, tmp_path, monkeypatch):
    """What it had armed nobody knows any more."""
    monkeypatch.setenv(tracepoint.ENVIRONMENT, "worker.walked@2=kill")
    dumper = Dumper(target.pid)
    try:
        for value in range(2):
            dumper.dump(options(tmp_path, incremental=True))
            target.write(p5=value + 2)
        with pytest.raises(CheckpointError, match="page worker ended unexpectedly"):
            dumper.dump(options(tmp_path, incremental=True))
        monkeypatch.delenv(tracepoint.ENVIRONMENT)
        for value in range(2):
            target.write(p9=value + 2)
            made = dumper.dump(options(tmp_path, incremental=True))
            assert made.backend == "uffd-wp"
            assert target.memory_differs_from(store.load(made.image_id)) == []
    finally:
        dumper.close()


@pytest.mark.needs("uffd_wp", "holes_are_written")
def test_dump_refused_in_the_middle_of_a_collection_loses_no_knowledge(
    target, dumper, store, tmp_path, monkeypatch
):
    dumper.dump(options(tmp_path))
    target.write(p5=77)
    with monkeypatch.context() as patch:
        patch.setattr(dump_module, "capture_files", _refuse)
        with pytest.raises(Unsupported, match="staged"):
            dumper.dump(options(tmp_path, incremental=True))
    target.write(p9=78)
    made = dumper.dump(options(tmp_path, incremental=True))
    assert made.backend == "uffd-wp"
    assert made.pages_skipped_parent > 200
    assert target.memory_differs_from(store.load(made.image_id)) == []


@pytest.mark.needs("uffd_wp", "holes_are_written")
@pytest.mark.parametrize("what", ["walk", "copy_written", "copy"])
def test_request_that_cannot_be_made_holds_nobody(target, dumper, store, tmp_path, monkeypatch, what):
    """Its answer would never come."""
    dumper.dump(options(tmp_path))
    target.write(p5=77)
    dumps = pickle.dumps

    def failing(message, **kwargs):
        if message[0] == what:
            raise MemoryError
        return dumps(message, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pickle, "dumps", failing)
        with pytest.raises(MemoryError):
            dumper.dump(options(tmp_path, incremental=True))
    made = dumper.dump(options(tmp_path, incremental=True))
    assert target.memory_differs_from(store.load(made.image_id)) == []


@pytest.mark.needs("uffd_wp", "holes_are_written")
def test_freeze_longer_than_allowed_when_the_walk_has_begun_loses_no_knowledge(
    target, dumper, store, tmp_path
):
    dumper.dump(options(tmp_path))
    target.write(p5=77)
    with pytest.raises(FrozenTooLong):
        dumper.dump(options(tmp_path, incremental=True, max_frozen_us=1))
    made = dumper.dump(options(tmp_path, incremental=True))
    assert made.backend == "uffd-wp"
    assert made.pages_skipped_parent > 200
    assert target.memory_differs_from(store.load(made.image_id)) == []


def _refuse(*_, **__):
    raise Unsupported("staged")


@pytest.mark.needs("uffd_wp")
@pytest.mark.parametrize("point", ["track.scanned", "track.armed", "the second walk"])
def test_tracking_lost_in_the_middle_of_a_collection_is_made_anew(
    target, dumper, store, tmp_path, monkeypatch, point
):
    def lose(*_, **__):
        raise TrackingLostError("staged")

    dumper.dump(options(tmp_path))
    target.write(p5=77, p6=78)
    with monkeypatch.context() as patch:
        if point == "the second walk":
            look_again, results = uffd_wp.look_again, [lose]
            patch.setattr(
                uffd_wp, "look_again", lambda *a, **k: (results.pop() if results else look_again)(*a, **k)
            )
        else:
            tracepoint.register(point, lose, at=1)
        made = dumper.dump(options(tmp_path, incremental=True))
    assert [one for one in made.warnings if "dirty tracking was lost (staged)" in one]
    assert made.backend == "content"
    for value in (2, 3):
        assert target.memory_differs_from(store.load(made.image_id)) == []
        target.write(p9=value)
        made = dumper.dump(options(tmp_path, incremental=True))
        assert made.backend == "uffd-wp"
    assert target.memory_differs_from(store.load(made.image_id)) == []


def _worker_pid(dumper):
    return dumper._worker._child.pid


@pytest.mark.parametrize(
    ("point", "how"),
    [("dump.collected", signal.SIGSTOP), ("dump.collected", signal.SIGKILL), ("dump.commit", signal.SIGKILL)],
)
def test_a_page_worker_that_is_stopped_or_killed_costs_one_dump(target, store, tmp_path, point, how):
    """The target goes on, and the next dump has everything, with a worker of its own."""
    dumper = Dumper(target.pid)
    options = DumpOptions(store=str(tmp_path / "store"), incremental=True, read_mode="stopped")
    try:
        first = dumper.dump(options)
        target.write(p3=3)
        tracepoint.register(point, lambda name: os.kill(_worker_pid(dumper), how), at=1)
        try:
            with pytest.raises(CheckpointError, match="page worker"):
                dumper.dump(options)
        finally:
            tracepoint.clear()
        target.write(p5=5)
        second = dumper.dump(options)
        assert second.parent_id == first.image_id
        assert target.memory_differs_from(store.load(second.image_id)) == []
    finally:
        dumper.close()


def test_an_agent_that_is_stopped_while_it_holds_its_target_is_killed_by_its_page_worker(
    target, tmp_path, store
):
    """No service is needed for that."""
    code = (
        "import sys; from checkpointd.dump.dump import Dumper, DumpOptions\n"
        "Dumper(int(sys.argv[1])).dump(DumpOptions(store=sys.argv[2]))"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", code, str(target.pid), str(tmp_path / "store")],
        env={**os.environ, "CHECKPOINTD_TRACEPOINT": "dump.collected=stop"},
        cwd=Path(__file__).parents[2],
    )
    assert agent.wait(60) == -signal.SIGKILL
    target.write(p1=1)
    assert store.images() == []
