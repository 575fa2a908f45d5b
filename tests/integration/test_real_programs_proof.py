# SPDX-License-Identifier: Apache-2.0
"""The proof of the demo: it holds for what is right and fails for a lost, an extra or a changed write."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator

import pytest

from demo.clients import Client, Life, churn_key, total_acknowledged
from demo.proof import Proof, prove
from demo.resp import Connection
from demo.server import Server, fill

NR_CLIENTS = 3


class Scene:
    """A server that stopped being written to; `called` and `returned` lie around the last instant of its writes."""

    def __init__(self, server: Server, clients: list[Client], called: int, returned: int) -> None:
        self.server, self.clients = server, clients
        self.called, self.returned = called, returned
        self.logs = [copy.deepcopy(client.lives[-1]) for client in clients]

    def prove(self, logs: list[Life]) -> Proof:
        return prove(1, self.server.port, self.clients, logs, self.called, self.returned, 64)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    server = Server("sqlite", tmp_path_factory.mktemp("proof"))
    gate, stop = threading.Event(), threading.Event()
    clients = [Client(n, server.port, gate, stop) for n in range(NR_CLIENTS)]
    try:
        assert fill(server.port, 64 * 4096) == 64
        gate.set()
        for client in clients:
            client.start()
        while total_acknowledged(clients) < 300:
            time.sleep(0.01)
        called = time.monotonic_ns()
        stop.set()
        for client in clients:
            client.join()
        yield Scene(server, clients, called, time.monotonic_ns())
    finally:
        stop.set()
        server.kill()


def test_true_generation_is_proven(scene: Scene) -> None:
    proof = scene.prove(scene.logs)
    assert proof.failures == []
    assert proof.nr_present >= proof.nr_must >= 290
    assert proof.nr_values >= proof.nr_present


def test_lost_acknowledged_write_is_noticed(scene: Scene) -> None:
    logs = copy.deepcopy(scene.logs)
    logs[1].sent_ns.append(scene.called - 2000)
    logs[1].acknowledged_ns.append(scene.called - 1000)
    assert any("is lost" in failure for failure in scene.prove(logs).failures)


def test_write_sent_after_the_dump_is_noticed(scene: Scene) -> None:
    logs = copy.deepcopy(scene.logs)
    logs[2].sent_ns[-1] = scene.returned + 1000
    logs[2].acknowledged_ns[-1] = scene.returned + 2000
    assert any("sent after the dump" in failure for failure in scene.prove(logs).failures)


def test_two_clients_of_two_instants_are_noticed(scene: Scene) -> None:
    """Each alone could be right; no single freeze fits both."""
    logs = copy.deepcopy(scene.logs)
    middle = (scene.called + scene.returned) // 2
    logs[0].sent_ns[-1] = middle + 2000  # is there, so the freeze came later
    logs[0].acknowledged_ns[-1] = middle + 3000
    logs[1].sent_ns.append(middle - 2000)
    logs[1].acknowledged_ns.append(middle - 1000)  # is not there, so the freeze came earlier
    assert any("no single instant" in failure for failure in scene.prove(logs).failures)


def test_changed_value_is_noticed(scene: Scene) -> None:
    with Connection(scene.server.port) as connection:
        count = connection("LLEN", "log:0")
        key = churn_key(0, count - 1)
        value = connection("GET", key)
        connection("SET", key, "something else")
        assert any("does not fit" in failure for failure in scene.prove(scene.logs).failures)
        connection("SET", key, value)
    assert scene.prove(scene.logs).failures == []
