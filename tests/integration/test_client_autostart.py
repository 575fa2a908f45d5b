# SPDX-License-Identifier: Apache-2.0
"""The client starts a service when none runs, one of another version is named, a hostile place is refused."""

from __future__ import annotations

import concurrent.futures
import os
import signal

import grpc
import pytest

from checkpointd import errors
from checkpointd.api.v1 import checkpoint_pb2 as pb
from checkpointd.api.v1 import checkpoint_pb2_grpc
from checkpointd.client import autostart, connect
from tests.service_harness import House, is_gone, sleeping_target, wait_until


@pytest.fixture
def house(tmp_path, monkeypatch):
    found = House(tmp_path)
    for name in [name for name in os.environ if name.startswith("CHECKPOINT")]:
        monkeypatch.delenv(name)
    for name, value in found.environ.items():
        monkeypatch.setenv(name, value)
    yield found
    found.close()


def service_pid(house):
    with connect(house.socket) as client:
        return client.version()["pid"]


def test_the_first_client_starts_the_service_and_the_next_one_finds_it(house):
    first = service_pid(house)
    assert service_pid(house) == first
    assert os.getsid(first) == first  # Ctrl-C on the client's terminal is not for it
    assert autostart.log_path(house.socket).stat().st_mode & 0o077 == 0


def test_many_first_clients_start_one_service(house):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        pids = set(pool.map(lambda _: service_pid(house), range(8)))
    assert len(pids) == 1
    sessions = [name for name in os.listdir("/proc") if name.isdigit() and serves(int(name), house.socket)]
    assert [int(name) for name in sessions] == list(pids)  # the losers of the race are gone


def serves(pid, path):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as words:
            return os.fsencode(path) in words.read().split(b"\0")
    except OSError:
        return False


def test_two_commands_at_once_start_one_service(house):
    commands = [house.begin("ls", "--json") for _ in range(2)]
    for command in commands:
        assert command.wait(60) == 0, command.stderr.read()
        command.stdout.close()
        command.stderr.close()
    log = autostart.log_path(house.socket).read_text()
    assert log.count("serving at") == 1


def test_a_client_that_finds_the_service_ending_starts_another_one(house):
    first = service_pid(house)
    os.kill(first, signal.SIGTERM)
    second = service_pid(house)  # whether it still answered, or was just gone
    wait_until(lambda: is_gone(first), "the end of the first service")
    assert service_pid(house) in (second, service_pid(house))
    assert service_pid(house) != first


def test_a_killed_service_is_replaced(house):
    first = service_pid(house)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: is_gone(first), "the end of the first service")
    assert service_pid(house) != first


def test_the_service_is_not_started_against_the_caller_s_word(house):
    with pytest.raises(errors.ServiceUnreachable, match="no service listens"):
        connect(house.socket, start=False)
    assert not house.socket.exists()


def test_a_service_that_cannot_start_says_why(house, monkeypatch):
    house.socket.parent.mkdir()
    (house.socket.parent / "s.sock.lock").mkdir()  # in the way of its lock
    with pytest.raises(errors.ServiceUnreachable, match="cannot use the socket directory") as caught:
        connect(house.socket)
    assert str(autostart.log_path(house.socket)) in caught.value.hint


def test_a_place_others_may_write_is_refused(house):
    house.socket.parent.mkdir()
    house.socket.parent.chmod(0o777)
    with pytest.raises(errors.NotPermitted, match="everybody may write"):
        connect(house.socket)


class OldService(checkpoint_pb2_grpc.CheckpointServiceServicer):
    def GetVersion(self, request, context):
        return pb.GetVersionResponse(version="99.7.0", pid=1234)


@pytest.fixture
def other_version(house):
    house.socket.parent.mkdir(mode=0o750)
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server(OldService(), server)
    server.add_insecure_port(f"unix:{house.socket}")
    server.start()
    yield house
    server.stop(None).wait()


def test_a_service_of_another_version_is_named_with_both_versions(other_version):
    with pytest.raises(errors.VersionMismatch, match=r"99\.7\.0.*0\.1"):
        connect(other_version.socket)
    done = other_version.checkpoint("ls")
    assert done.returncode == 20
    assert "99.7.0" in done.stderr
    assert "1234" in done.stderr


def test_the_python_interface_dumps_and_restores(house):
    with sleeping_target() as pid, connect() as client:
        *_, summary = client.dump(pid)
        assert client.list()["images"][0]["id"] == summary["image_id"]
        client.untrack(pid)
