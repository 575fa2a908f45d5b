# SPDX-License-Identifier: Apache-2.0
"""Who goes ahead of others while a target stands still, and where."""

import errno
import os
import resource
import threading

import pytest

from checkpointd import tracepoint
from tests.programs.page_program import options


def _policies(*tids):
    return {os.sched_getscheduler(tid) & ~os.SCHED_RESET_ON_FORK for tid in tids}


@pytest.mark.needs("realtime")
@pytest.mark.parametrize("read_mode", ["stopped", "fork"])
def test_those_the_target_waits_for_go_ahead_of_others_until_the_thaw(
    target, dumper, store, tmp_path, read_mode
):
    dumper.dump(options(tmp_path))
    ours = (threading.get_native_id(), dumper._worker.pid)
    seen, started = {}, []
    for point in ("dump.freeze", "freeze.done", "dump.collected", "dump.copied", "dump.thawed"):
        tracepoint.register(point, lambda name: seen.setdefault(name, _policies(*ours)))
    tracepoint.register("dump.copied", lambda name: started.append(_policy_of_a_new_thread()), at=1)
    dumper.dump(options(tmp_path, read_mode=read_mode, incremental=True))
    ahead, ordinary = {os.SCHED_RR}, {os.SCHED_OTHER}
    assert seen.pop("dump.freeze") == seen.pop("dump.thawed") == ordinary
    assert list(seen.values()) == [ahead] * 3
    assert started == [ordinary]
    assert _policies(*ours, target.pid) == ordinary


@pytest.mark.needs("realtime", "uffd_wp", "holes_are_written")
def test_page_worker_keeps_off_the_cpu_of_the_target_until_the_thaw(target, dumper, store, tmp_path):
    dumper.dump(options(tmp_path))
    worker, everywhere, seen = dumper._worker.pid, os.sched_getaffinity(0), []
    tracepoint.register("dump.collected", lambda _: seen.append(os.sched_getaffinity(worker)))
    for cpu in sorted(everywhere)[:2]:
        os.sched_setaffinity(target.pid, {cpu})
        dumper.dump(options(tmp_path, incremental=True))
        assert seen.pop() == everywhere - {cpu}
        threads = [int(tid) for tid in os.listdir(f"/proc/{worker}/task")]
        assert len(threads) > 2
        assert [os.sched_getaffinity(tid) for tid in threads] == [everywhere] * len(threads)


def _policy_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(_policies(threading.get_native_id())))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.needs("realtime")
@pytest.mark.parametrize("point", ["dump.collected", "dump.copied"])
def test_a_dump_that_fails_leaves_nobody_ahead_of_others(target, dumper, store, tmp_path, point):
    ours = (threading.get_native_id(), dumper._worker.pid)
    seen = []

    def fail(name):
        seen.append(_policies(*ours))
        raise OSError(5, "staged failure", name)

    tracepoint.register(point, fail)
    with pytest.raises(OSError, match="staged failure"):
        dumper.dump(options(tmp_path))
    assert seen == [{os.SCHED_RR}]
    assert _policies(*ours) == {os.SCHED_OTHER}


@pytest.mark.needs("realtime")
def test_a_target_that_is_killed_is_encoded_with_ordinary_priority(target, dumper, store, tmp_path):
    ours = (threading.get_native_id(), dumper._worker.pid)
    seen = []
    for point in ("dump.copied", "dump.commit"):
        tracepoint.register(point, lambda _: seen.append(_policies(*ours)))
    dumper.dump(options(tmp_path, kill=True))
    assert seen == [{os.SCHED_RR}, {os.SCHED_OTHER}]


@pytest.mark.parametrize("policy", [os.SCHED_BATCH, os.SCHED_IDLE])
def test_a_service_that_runs_as_batch_work_stays_that(target, dumper, store, tmp_path, policy):
    seen = []
    tracepoint.register("dump.copied", lambda _: seen.append(_policies(threading.get_native_id())))
    os.sched_setscheduler(0, policy, os.sched_param(0))
    try:
        dumper.dump(options(tmp_path))
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    assert seen == [{policy}]


@pytest.mark.needs("realtime")
def test_where_time_ahead_of_others_is_limited_nobody_goes_ahead(target, dumper, store, tmp_path):
    """The kernel kills with SIGXCPU who exceeds it."""
    seen = []
    tracepoint.register("dump.copied", lambda _: seen.append(_policies(threading.get_native_id())))
    limits = resource.getrlimit(resource.RLIMIT_RTTIME)
    resource.setrlimit(resource.RLIMIT_RTTIME, (200_000, limits[1]))
    try:
        dumper.dump(options(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_RTTIME, limits)
    assert seen == [{os.SCHED_OTHER}]


@pytest.mark.needs("realtime")
def test_with_a_single_cpu_nobody_goes_ahead(target, dumper, store, tmp_path):
    """Whom they wait for would have to wait for them."""
    seen = []
    tracepoint.register("dump.copied", lambda _: seen.append(_policies(threading.get_native_id())))
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        dumper.dump(options(tmp_path))
    finally:
        os.sched_setaffinity(0, cpus)
    assert seen == [{os.SCHED_OTHER}]


def test_without_the_right_to_go_ahead_a_dump_is_made_all_the_same(
    target, dumper, store, tmp_path, monkeypatch
):
    asked = []

    def refuse(tid, policy, param):
        asked.append(tid)
        raise PermissionError(errno.EPERM, "staged")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    made = dumper.dump(options(tmp_path))
    if len(os.sched_getaffinity(0)) > 1:
        assert {threading.get_native_id(), dumper._worker.pid} <= set(asked)
    assert target.memory_differs_from(store.load(made.image_id)) == []
