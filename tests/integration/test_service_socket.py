# SPDX-License-Identifier: Apache-2.0
"""Who may reach the service: modes, one service per socket, mutual TLS."""

from __future__ import annotations

import contextlib
import grp
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from checkpointd import errors
from checkpointd.client import connect
from checkpointd.client.connection import ClientTls
from tests.service_harness import PATIENCE_S, House, sleeping_target, wait_until


@pytest.fixture
def house(tmp_path):
    found = House(tmp_path)
    yield found
    found.close()


def checkpointd(house, *options):
    return subprocess.run(
        [sys.executable, "-m", "checkpointd.service.main", *options],
        env=house.environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_socket_is_0660_in_a_directory_0750_whatever_the_umask(house, umask):
    before = os.umask(umask)
    try:
        house.serve()
    finally:
        os.umask(before)
    assert stat.S_IMODE(house.socket.stat().st_mode) == 0o660
    assert stat.S_IMODE(house.socket.parent.stat().st_mode) == 0o750


def test_images_are_closed_to_others(house):
    house.serve()
    with house.client() as client, sleeping_target() as pid:
        list(client.dump(pid))
    for folder, _, names in os.walk(house.store):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        for name in names:
            assert stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) & 0o077 == 0


def test_a_second_service_at_the_same_socket_says_so_and_harms_nothing(house):
    house.serve()
    done = checkpointd(house)
    assert done.returncode == 11
    assert "another service is listening" in done.stderr
    with house.client() as client:
        assert client.version()["pid"] == house.service.pid


@pytest.mark.parametrize("kind", ["file", "directory", "pipe", "link"])
def test_what_is_no_socket_is_left_alone(house, kind):
    """The name of a socket is unlinked; as root that was the end of /dev/null."""
    house.socket.parent.mkdir(0o750)
    make = {
        "file": lambda path: path.write_text("precious"),
        "directory": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
        "link": lambda path: path.symlink_to("elsewhere"),
    }
    make[kind](house.socket)
    before = house.socket.lstat()
    done = checkpointd(house)
    assert done.returncode == 2
    assert "is not a socket" in done.stderr
    assert house.socket.lstat() == before
    assert os.listdir(house.socket.parent) == [house.socket.name]


def test_a_socket_of_another_program_is_left_alone(house):
    house.socket.parent.mkdir(0o750)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(house.socket))
        other.listen(1)
        before = house.socket.lstat()
        done = checkpointd(house)
        assert done.returncode == 11
        assert "not a checkpointd" in done.stderr
        assert house.socket.lstat().st_ino == before.st_ino


def test_a_socket_left_behind_is_replaced(house):
    house.socket.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(house.socket))
    house.serve()
    with house.client() as client:
        client.status()


def test_an_idle_service_ends_and_a_tracking_one_does_not(house):
    service = house.serve("--idle-exit", "0.5")
    with sleeping_target() as pid:
        with house.client() as client:
            client.track(pid)
        with pytest.raises(subprocess.TimeoutExpired):
            service.wait(2)
        with house.client() as client:
            client.untrack(pid)
    assert service.wait(PATIENCE_S) == 0


def test_the_service_manager_is_told(house, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        house.serve(NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert manager.recv(100) == b"READY=1"
        house.service.terminate()
        assert manager.recv(100) == b"STOPPING=1"


TLS_NAMES = ("--tls-cert", "c", "--tls-key", "k", "--tls-client-ca", "a")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--listen", "127.0.0.1:0"], "mutual TLS only"),
        (["--listen", "127.0.0.1:0", "--tls-cert", "c", "--tls-key", "k"], "needs a certificate, a key and"),
        (["--listen", "127.0.0.1:0", *TLS_NAMES], "cannot read c"),
        ([*TLS_NAMES], "not served without --listen"),
        (["--listen", "127.0.0.1:70000", *TLS_NAMES], "there is no port 70000: ports are 0 to 65535"),
        (["--listen", "127.0.0.1", *TLS_NAMES], "127.0.0.1 is not HOST:PORT"),
        (["--socket", "/tmp/" + "x" * 200], "107"),
        (["--group", "no-such-group"], "no group"),
    ],
)
def test_wrong_options_exit_with_2_and_a_sentence(house, options, words):
    done = checkpointd(house, *options)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr


@pytest.fixture
def other_group():
    """A group that is not ours, to which root may give things."""
    if os.geteuid() != 0:
        pytest.skip("needs root to give a directory to a group")
    return next(found for found in grp.getgrall() if found.gr_gid not in (0, *os.getgroups()))


@pytest.fixture
def open_house():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users further up
        os.chmod(folder, 0o755)
        found = House(Path(folder))
        yield found
        found.close()


def mode_and_group(path):
    found = path.stat()
    return stat.S_IMODE(found.st_mode), found.st_gid


@pytest.mark.parametrize("is_there", [False, True])
def test_a_group_gets_the_socket_and_the_way_to_it(open_house, other_group, is_there):
    house = open_house
    house.socket = house.directory / "above" / "run" / "s.sock"
    house.environ["CHECKPOINT_SOCKET"] = str(house.socket)
    if is_there:
        house.socket.parent.mkdir(parents=True)
        house.socket.parent.chmod(0o700)
        Path(f"{house.socket}.lock").touch()
    before = os.umask(0o077)
    try:
        if is_there:
            house.serve("--group", other_group.gr_name)
            house.service.terminate()
            house.service.wait(PATIENCE_S)
        house.serve("--group", other_group.gr_name)
    finally:
        os.umask(before)
    assert mode_and_group(house.socket) == (0o660, other_group.gr_gid)
    assert mode_and_group(house.socket.parent) == (0o750, other_group.gr_gid)
    assert mode_and_group(house.directory / "above")[0] & 0o001
    done = _connect_as_another_user(house, groups=[other_group.gr_gid])
    assert (done.returncode, done.stderr) == (0, "")


def test_a_directory_with_other_things_in_it_is_not_opened_to_a_group(open_house, other_group):
    house = open_house
    house.socket.parent.mkdir(mode=0o700)
    (house.socket.parent / "letters").touch()
    done = checkpointd(house, "--group", other_group.gr_name)
    assert done.returncode == 5, done.stderr
    assert "letters" in done.stderr
    assert f"chgrp {other_group.gr_name} {house.socket.parent}" in done.stderr
    assert mode_and_group(house.socket.parent) == (0o700, 0)


def test_a_group_that_cannot_come_near_the_socket_is_told_so(open_house, other_group):
    house = open_house
    house.directory.chmod(0o700)
    done = checkpointd(house, "--group", other_group.gr_name)
    assert done.returncode == 5, done.stderr
    assert f"may not pass through {house.directory} " in done.stderr


def test_a_member_of_the_group_cannot_end_root_s_service(open_house, other_group):
    house = open_house
    house.serve("--group", other_group.gr_name)
    code = "sys.exit(run(['serve', '--stop']))"
    done = _as_another_user(house, code, groups=[other_group.gr_gid])
    assert done.returncode == 5, done.stderr
    assert "belongs to another user" in done.stderr
    assert "Traceback" not in done.stderr
    assert house.service.poll() is None


@pytest.fixture(scope="module")
def authority():
    return pytest.importorskip("trustme", reason="trustme is not installed").CA()


@pytest.fixture
def tls(authority, house, tmp_path):
    """A service on TCP, and what a client of it needs."""
    import trustme

    def write(name, certificate):
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.crt")

    stranger = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    stranger.cert_pem.write_to_path(tmp_path / "other-ca.crt")
    write("server", authority.issue_cert("127.0.0.1"))
    write("client", authority.issue_cert("client@example.org"))
    write("stranger", stranger.issue_cert("client@example.org"))
    house.serve(
        *("--listen", "127.0.0.1:0", "--tls-cert", str(tmp_path / "server.crt")),
        *("--tls-key", str(tmp_path / "server.key"), "--tls-client-ca", str(tmp_path / "ca.crt")),
    )
    found = wait_until(
        lambda: re.search(r"port (\d+), with mutual", house.service_log.read_text()), "the port"
    )
    return f"127.0.0.1:{found[1]}", tmp_path


def client_tls(folder, name="client"):
    return ClientTls(folder / f"{name}.crt", folder / f"{name}.key", folder / "ca.crt")


def test_a_client_with_a_certificate_is_served_over_tcp(tls, tmp_path):
    address, folder = tls
    with connect(address=address, tls=client_tls(folder)) as client, sleeping_target() as pid:
        assert list(client.dump(pid))[-1]["pid"] == pid
        assert len(client.list()["images"]) == 1
        with pytest.raises(errors.UsageError, match="unix socket"):
            client.list(store=str(tmp_path / "other"))


def test_a_client_of_another_authority_is_not(tls):
    address, folder = tls
    with pytest.raises(errors.NotPermitted, match=r"accept the certificate .*stranger\.crt") as raised:
        connect(address=address, tls=client_tls(folder, "stranger"))
    assert "--tls-client-ca" in raised.value.hint


def test_a_service_of_another_authority_or_name_is_not_believed(tls):
    address, folder = tls
    ours = client_tls(folder)
    other = ClientTls(ours.certificate, ours.key, folder / "other-ca.crt")
    with pytest.raises(errors.NotPermitted, match=r"is not of the authority .*other-ca\.crt") as raised:
        connect(address=address, tls=other)
    assert "--tls-ca" in raised.value.hint
    with pytest.raises(errors.NotPermitted, match="is not for localhost"):
        connect(address=address.replace("127.0.0.1", "localhost"), tls=ours)


def test_who_is_no_service_is_told_apart(tls):
    _, folder = tls
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    with client:
                        client.sendall(b"SSH-2.0-x\r\n")
                        client.recv(1 << 16)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(errors.ServiceUnreachable, match="does not speak TLS"):
            connect(address=address, tls=client_tls(folder))
        listening.shutdown(socket.SHUT_RDWR)
    with pytest.raises(
        errors.ServiceUnreachable, match=f"no service answers at {address}: Connection refused"
    ):
        connect(address=address, tls=client_tls(folder))


def test_files_of_tls_that_are_wrong_are_named(tls, house):
    address, folder = tls
    (folder / "junk").write_text("junk")
    crt, key, ca, junk = (str(folder / name) for name in ("client.crt", "client.key", "ca.crt", "junk"))
    for names, said in (
        ((crt, str(folder / "server.key"), ca), f"{folder}/server.key does not fit the certificate {crt}"),
        ((crt, junk, ca), f"{junk} holds no private key"),
        ((junk, key, ca), f"{junk} holds no certificate"),
        ((crt, key, junk), f"{junk} holds no certificate"),
    ):
        options = zip(("--tls-cert", "--tls-key", "--tls-ca"), names, strict=True)
        done = house.checkpoint("ls", "--connect", address, *(word for pair in options for word in pair))
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
        options = zip(("--tls-cert", "--tls-key", "--tls-client-ca"), names, strict=True)
        words = [word for pair in options for word in pair]
        done = checkpointd(house, "--socket", str(folder / "s" / "s.sock"), "--listen", "127.0.0.1:0", *words)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
        assert len(done.stderr.splitlines()) == 2  # none of gRPC's


def test_a_port_that_is_taken_is_told(tls, house):
    address, folder = tls
    done = checkpointd(
        house,
        *("--socket", str(folder / "s" / "s.sock"), "--listen", address),
        *("--tls-cert", str(folder / "server.crt"), "--tls-key", str(folder / "server.key")),
        *("--tls-client-ca", str(folder / "ca.crt")),
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"checkpointd: cannot listen at {address}: Address already in use",
        "  give --listen HOST:PORT of a free port of this machine",
    ]


def test_a_client_without_tls_is_not(tls):
    address, _ = tls
    with pytest.raises(errors.UsageError, match="mutual TLS"):
        connect(address=address)


def test_the_command_speaks_tls_too(tls, house):
    address, folder = tls
    names = ("--tls-cert", str(folder / "client.crt"), "--tls-key", str(folder / "client.key"))
    assert "CHECKPOINT_STORE" in house.environ  # which is of this machine, and not sent
    done = house.checkpoint("ls", "--connect", address, *names, "--tls-ca", str(folder / "ca.crt"))
    assert done.returncode == 0, done.stderr
    done = house.checkpoint("ls", "--connect", address, *names)
    assert done.returncode == 2
    assert "--tls-ca" in done.stderr
    names = (*names, "--tls-ca", str(folder / "ca.crt"))
    done = house.checkpoint("ls", "--connect", address, *names, "--store", str(folder / "elsewhere"))
    assert done.returncode == 2
    assert "unix socket" in done.stderr
    done = house.checkpoint("serve", "--stop", "--connect", address, *names)
    assert done.returncode == 2
    assert "leave --connect out" in done.stderr
    assert house.service.poll() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_is_told_that_the_socket_is_closed(house, tmp_path):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users further up
        os.chmod(folder, 0o755)
        house.socket = house.socket.__class__(folder) / "run" / "s.sock"
        house.environ["CHECKPOINT_SOCKET"] = str(house.socket)
        house.serve()
        done = _connect_as_another_user(house)
        house.close()
    assert done.returncode == 5, done.stderr
    assert "closed to this user" in done.stdout


def _connect_as_another_user(house, groups=()):
    code = (
        f"try: connect({str(house.socket)!r}, start=False)\n"
        "except NotPermitted as error: print(error); sys.exit(5)\n"
    )
    return _as_another_user(house, code, groups)


def _as_another_user(house, code, groups=()):
    """Everything is imported before: our directories may be closed to that user."""
    code = (
        "import os, sys\nfrom checkpointd.client import connect, connection\n"
        "from checkpointd.errors import NotPermitted\n"
        "from checkpoint_cli.commands import serve\nfrom checkpoint_cli.main import run\n"
        f"os.setgroups({list(groups)}); os.setgid(12345); os.setuid(12345)\n{code}"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=house.environ)


def test_calls_wait_for_no_one_s_stream(house):
    house.serve()
    with house.client() as client, sleeping_target() as pid:
        operation = next(client.dump(pid, tag="wait"))["operation_id"]
        watchers = [threading.Thread(target=_watch, args=(house, operation)) for _ in range(20)]
        for watcher in watchers:
            watcher.start()
        client.status()
        client.cancel(operation)
        for watcher in watchers:
            watcher.join(PATIENCE_S)
        assert not any(watcher.is_alive() for watcher in watchers)


def _watch(house, operation):
    with house.client() as client, pytest.raises(errors.Cancelled):
        list(client.watch(operation))
