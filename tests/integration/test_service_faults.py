# SPDX-License-Identifier: Apache-2.0
"""Agents, services and clients that die or misbehave: the others go on, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from checkpointd import errors
from checkpointd.agent.protocol import DumpArgs
from checkpointd.service.agents import Agent, Watchdog
from tests.service_harness import FAKE_AGENT, PATIENCE_S, House, is_gone, sleeping_target, wait_until


@pytest.fixture
def house(tmp_path):
    found = House(tmp_path)
    found.serve()
    yield found
    found.close()


@pytest.fixture
def target():
    with sleeping_target() as pid:
        yield pid


def test_an_agent_killed_during_a_dump_is_a_clear_error_and_the_service_lives(house, target):
    with house.client() as client:
        for tag in ("die", "garbage", "malformed"):
            with pytest.raises(errors.CheckpointError, match=f"agent of pid {target}") as caught:
                list(client.dump(target, tag=tag))
            assert caught.value.hint
            assert is_gone(house.agent_pid())
        assert client.list()["images"] == []
        assert list(client.dump(target))[-1]["pid"] == target


def test_an_agent_killed_from_outside_names_the_signal(house, target):
    with house.client() as client:
        events = client.dump(target, tag="wait")
        assert [next(events)["message_type"] for _ in range(3)][-1] == "phase"
        os.kill(house.agent_pid(), signal.SIGKILL)
        with pytest.raises(errors.CheckpointError, match="SIGKILL"):
            list(events)


def test_a_deaf_agent_is_killed_when_cancelled(house, target):
    with house.client() as client:
        events = client.dump(target, tag="deaf")
        operation = next(events)["operation_id"]
        assert next(events)["phase"] == "freezing"
        assert client.cancel(operation)["state"] == "failed"
        with pytest.raises(errors.Cancelled):
            list(events)
        assert is_gone(house.agent_pid())


def test_a_stopped_agent_is_killed_by_the_watchdog(house, target):
    with house.client() as client:
        events = client.dump(target, tag="wait")
        assert [next(events)["message_type"] for _ in range(3)][-1] == "phase"
        os.kill(house.agent_pid(), signal.SIGSTOP)
        with pytest.raises(errors.CheckpointError, match="SIGKILL"):
            list(events)


@pytest.fixture
def fake_agent():
    made = Agent("pid 1", command=[sys.executable, str(FAKE_AGENT)])
    yield made
    made.kill()
    wait_until(lambda: made.ended, "the agent's end")


def dump_with(agent, tag):
    phases = []
    args = DumpArgs(pid=1, store="/nowhere", tag=tag).to_dict()
    request = agent.start("dump", args, lambda message: phases.append(message["event"]))
    wait_until(lambda: phases.count("phase") >= (3 if tag == "thawed" else 2), "its phases")
    return request


def test_an_agent_that_hangs_while_its_target_stands_still_is_killed(fake_agent):
    request = dump_with(fake_agent, "wait")
    watchdog = Watchdog(lambda: [fake_agent], interval_s=0.1, silence_limit_s=0.5)
    try:
        with pytest.raises(errors.CheckpointError, match="SIGKILL"):
            request.result(60)
    finally:
        watchdog.stop()


def test_an_agent_that_is_silent_after_the_thaw_is_left_alone(fake_agent):
    request = dump_with(fake_agent, "thawed")
    watchdog = Watchdog(lambda: [fake_agent], interval_s=0.05, silence_limit_s=0.1)
    try:
        assert not request.wait(2)
        assert not fake_agent.ended
    finally:
        watchdog.stop()


def test_progress_is_a_sign_of_life_however_long_a_copy_takes(fake_agent):
    dump_with(fake_agent, "slow")
    for _ in range(3):
        before = fake_agent._heard_at
        wait_until(lambda before=before: fake_agent._heard_at > before, "a word of progress")
        assert not fake_agent.holds_target_silently(PATIENCE_S)


def test_agents_end_when_the_service_is_killed(house, target):
    with house.client() as client:
        client.track(target)
        agent = house.agent_pid()
        house.service.kill()
        house.service.wait()
        wait_until(lambda: is_gone(agent), "the agent's end")
        assert house.agent_notes()[-1] == "eof"
        with pytest.raises(errors.ServiceUnreachable):
            client.status()
    house.serve()  # what the killed one left behind is in nobody's way
    with house.client() as client:
        assert client.status()["targets"] == []


def test_a_service_told_to_end_cancels_dumps_and_lets_targets_go(house, target):
    with house.client() as client, sleeping_target() as other:
        client.track(other)
        events = client.dump(target, tag="wait")
        assert [next(events)["message_type"] for _ in range(3)][-1] == "phase"
        house.service.send_signal(signal.SIGTERM)
        with pytest.raises(errors.Cancelled, match="service is ending"):
            list(events)
        assert house.service.wait(30) == 0
    assert house.agent_notes().count("shutdown") == 2
    assert not house.socket.exists()


def test_an_agent_of_another_protocol_is_refused(tmp_path, target):
    house = House(tmp_path)
    house.serve(FAKE_AGENT_PROTOCOL="99")
    try:
        with house.client() as client, pytest.raises(errors.VersionMismatch, match="protocol 99"):
            client.track(target)
    finally:
        house.close()


def test_a_request_to_an_agent_refused_already_says_why(monkeypatch):
    """Its first words may be read, and it be killed, before the first request is on its way."""
    monkeypatch.setenv("FAKE_AGENT_PROTOCOL", "99")
    agent = Agent("pid 1", command=[sys.executable, str(FAKE_AGENT)])
    wait_until(lambda: agent.ended, "the agent's end")
    with pytest.raises(errors.VersionMismatch, match="protocol 99"):
        agent.start("track", {}).result()


def test_an_agent_that_cannot_start_is_a_clear_error(tmp_path, target):
    for command, words in (
        ("/nonexistent/agent", "cannot start the agent"),
        ("false", "exited with status 1"),
    ):
        house = House(tmp_path / command.strip("/").replace("/", "-"))
        house.directory.mkdir()
        house.serve(CHECKPOINTD_AGENT=command)
        try:
            with house.client() as client, pytest.raises(errors.CheckpointError, match=words):
                list(client.dump(target))
        finally:
            house.close()
