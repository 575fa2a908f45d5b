# SPDX-License-Identifier: Apache-2.0
"""Sockets saved from one process and brought back in another, each tried out afterwards."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from checkpointd.errors import CheckpointError, RestoreConflict, Unsupported
from checkpointd.restore.files import after_credentials, check_files
from checkpointd.restore.own_sockets import OwnSockets
from checkpointd.state.files import FilesOptions, PeerCredentials, UnixSocket
from checkpointd.target.files import file_blockers
from tests.files_lab import driven, moved, restored, save

QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
CLOSE = FilesOptions(tcp="close")


def free_port(family=socket.AF_INET, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as sock:
        sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_tcp_listener_accepts_again_with_its_options(family):
    host, port = "::1" if family == socket.AF_INET6 else "127.0.0.1", free_port(family)
    setup = f"""
s = socket.socket({int(family)}, socket.SOCK_STREAM); os.dup2(s.fileno(), 20)
s.setsockopt(1, socket.SO_REUSEADDR, 1); s.setsockopt(1, socket.SO_KEEPALIVE, 1)
s.setsockopt(6, socket.TCP_NODELAY, 1); s.setsockopt(6, socket.TCP_KEEPIDLE, 77)
s.setsockopt(1, socket.SO_RCVBUF, 30000)
s.setsockopt(1, socket.SO_LINGER, b'\\1\\0\\0\\0\\5\\0\\0\\0')
if {int(family)} == 10: s.setsockopt(41, socket.IPV6_V6ONLY, 1)
s.bind(({host!r}, {port})); s.listen(37); s.setblocking(False)
"""
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        stub.do("s = socket.socket(fileno=20)")
        assert stub.get("s.getsockname()[:2]") == (host, port)
        options = "[s.getsockopt(*o) for o in ((1, 2), (1, 9), (6, 1), (6, 4), (1, 8), (1, 15))]"
        values = stub.get(options)
        assert [bool(value) for value in values[:3]] == [True] * 3
        assert values[3:] == [77, 60000, 0]
        assert stub.get("s.getsockopt(1, socket.SO_LINGER, 8)") == struct.pack("2i", 1, 5)
        assert struct.unpack_from("=I", stub.get("s.getsockopt(6, 11, 256)"), 28) == (37,)
        with socket.create_connection((host, port)) as client:
            stub.do("fcntl.fcntl(20, fcntl.F_SETFL, 0); c, _ = s.accept(); c.sendall(b'welcome')")
            assert client.recv(10) == b"welcome"


def test_listener_comes_back_though_its_connections_linger():
    port = free_port()
    setup = f"""
s = socket.create_server(('127.0.0.1', {port}))
c = socket.create_connection(s.getsockname()); a, _ = s.accept()
"""
    with moved(setup, options=CLOSE, **QUIET) as (stub, _):
        with socket.create_connection(("127.0.0.1", port)):
            pass
        assert stub.get("socket.socket(fileno=3).getsockopt(1, socket.SO_REUSEADDR)") == 1


def test_connected_tcp_is_refused_and_with_leave_comes_back_closed():
    with socket.create_server(("127.0.0.1", 0)) as server, driven(**QUIET) as target:
        target.do(f"c = socket.create_connection({server.getsockname()!r}); os.dup2(c.fileno(), 20)")
        (blocker,) = file_blockers(target.pid)
        assert blocker.startswith("fd 3 is a TCP connection of 127.0.0.1:")
        assert "--tcp close" in blocker
        with pytest.raises(Unsupported) as error:
            save(target)
        assert error.value.details["blockers"] == [blocker]
        target.go()
        state, contents, _ = save(target, CLOSE)
    with restored(state, contents, CLOSE) as (stub, warnings):
        assert any("comes back closed" in text for text in warnings)
        stub.do(
            "c = socket.socket(fileno=20); ep = select.epoll(); ep.register(20, select.EPOLLIN | select.EPOLLRDHUP)"
        )
        assert stub.get("c.family == socket.AF_INET and ep.poll(5)") == [(20, 0x2001)]
        assert stub.get("c.recv(10)") == b""
        with pytest.raises(AssertionError, match=r"BrokenPipeError|ConnectionResetError"):
            stub.do("signal.signal(signal.SIGPIPE, signal.SIG_IGN)\nfor _ in range(1000): c.send(b'x')")


def test_many_connections_are_told_as_one():
    with socket.create_server(("127.0.0.1", 0)) as server, driven(**QUIET) as target:
        target.do(f"x = [socket.create_connection({server.getsockname()!r}) for _ in range(10)]")
        (blocker,) = file_blockers(target.pid)
        assert blocker.startswith("fd 3, 4, 5 and 7 more are TCP connections")
        state, contents, _ = save(target, CLOSE)
    with restored(state, contents, CLOSE) as (stub, warnings):
        assert len(warnings) == 1
        assert warnings[0].endswith("and so do 9 more connections")
        assert stub.get("[socket.socket(fileno=os.dup(n)).recv(1) for n in range(3, 13)]") == [b""] * 10


def test_address_in_use_names_who():
    port = free_port()
    with driven(**QUIET) as target:
        target.do(f"s = socket.create_server(('127.0.0.1', {port}))")
        state, contents, _ = save(target)
        target.go()
        (conflict,) = check_files(state)
        assert f"TCP address 127.0.0.1:{port} is in use by process {target.pid}" in conflict
        with (
            pytest.raises(RestoreConflict, match=f"in use by process {target.pid}"),
            restored(state, contents),
        ):
            pass
    assert check_files(state) == []


def test_udp_bound_and_connected():
    first, second = free_port(kind=socket.SOCK_DGRAM), free_port(kind=socket.SOCK_DGRAM)
    setup = f"""
a = socket.socket(2, 2); a.setsockopt(1, socket.SO_BROADCAST, 1)
a.bind(('127.0.0.1', {first})); os.dup2(a.fileno(), 20)
b = socket.socket(2, 2); b.bind(('127.0.0.1', {second})); b.connect(('127.0.0.1', {first})); os.dup2(b.fileno(), 21)
"""
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        stub.do("a = socket.socket(fileno=20); b = socket.socket(fileno=21); b.send(b'ping')")
        assert stub.get("a.recvfrom(10)") == (b"ping", ("127.0.0.1", second))
        assert stub.get("a.getsockopt(1, socket.SO_BROADCAST)") == 1


@pytest.mark.needs("root")
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_sockets_of_another_user_that_share_a_port_still_share_it(kind):
    """The kernel lets only sockets of one owner share, and only such make a group."""
    port = free_port(kind=kind)
    setup = f"""
for fd in (20, 21, 22):
    s = socket.socket(2, {int(kind)}); s.setsockopt(1, 15, 1); s.bind(('127.0.0.1', {port}))
    if {int(kind)} == 1: s.listen(50)
    os.dup2(s.fileno(), fd); s.close()
for fd in (20, 21, 22): os.fchown(fd, 65534, 65534)
"""
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        assert stub.get("[os.fstat(fd).st_uid for fd in (20, 21, 22)]") == [65534] * 3
        senders = []
        for _ in range(60):
            senders.append(socket.socket(socket.AF_INET, kind))
            senders[-1].connect(("127.0.0.1", port))
            senders[-1].send(b"x")
        stub.do("socks = [socket.socket(fileno=fd) for fd in (20, 21, 22)]")
        stub.do("[s.setblocking(False) for s in socks]")
        stub.do(f"""
def count(s):
    n = 0
    try:
        while True:
            s.recv(1) if {int(kind)} == 2 else s.accept()
            n += 1
    except BlockingIOError:
        return n
""")
        counts = stub.get("[count(s) for s in socks]")
        assert sum(counts) == 60
        assert min(counts) > 0
        for one in senders:
            one.close()


@pytest.mark.parametrize(
    ("family", "level", "group", "request_"),
    [
        (socket.AF_INET, 0, "239.1.2.3", "struct.pack('=4s4si', socket.inet_aton('239.1.2.3'), bytes(4), 1)"),
        (socket.AF_INET6, 41, "ff02::4:5", "struct.pack('=16si', socket.inet_pton(10, 'ff02::4:5'), 1)"),
        (
            socket.AF_INET6,
            0,
            "239.1.2.4",
            "struct.pack('=4s4si', socket.inet_aton('239.1.2.4'), bytes(4), 1)",
        ),
    ],
)
def test_multicast_membership(family, level, group, request_):
    option = 35 if level == 0 else 20  # IP_ADD_MEMBERSHIP, IPV6_JOIN_GROUP, on the loopback
    setup = f"""
s = socket.socket({int(family)}, 2); s.setsockopt({level}, {option}, {request_}); os.dup2(s.fileno(), 20)
"""
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        # joining again says it is joined already
        with pytest.raises(AssertionError, match="Address already in use"):
            stub.do(f"socket.socket(fileno=os.dup(20)).setsockopt({level}, {option}, {request_})")


def test_membership_for_some_sources_is_refused_on_sockets_of_both_families():
    request = "struct.pack('=4s4s4s', *map(socket.inet_aton, ('239.1.2.5', '127.0.0.1', '127.0.0.2')))"
    for family in (2, 10):
        with driven(**QUIET) as target:
            target.do(f"s = socket.socket({family}, 2); s.setsockopt(0, 39, {request})")
            (blocker,) = file_blockers(target.pid)
            assert "239.1.2.5 for some sources only" in blocker


def test_unix_listener_takes_its_path_back(tmp_path):
    path = str(tmp_path / "service.sock")
    setup = """
s = socket.socket(1); s.bind('service.sock'); s.listen(9); os.dup2(s.fileno(), 20)
os.chmod('service.sock', 0o711)
"""
    with driven(cwd=tmp_path, **QUIET) as target:
        target.do(setup)
        state, contents, _ = save(target)
        target.go()
        (conflict,) = check_files(state)
        assert "service.sock" in conflict
    assert check_files(state) == []  # the dead socket's file is still there
    with restored(state, contents) as (stub, warnings):
        assert warnings == []
        assert os.stat(path).st_mode & 0o777 == 0o711
        assert stub.batch(after_credentials(state)) == [0]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            assert pid == stub.pid
            stub.do("s = socket.socket(fileno=20); c, _ = s.accept(); c.sendall(b'hello')")
            assert client.recv(10) == b"hello"
        assert stub.get("s.getsockname()") == "service.sock"


@pytest.mark.parametrize("name", ["inner/socket", "../far/socket", "./socket", "x" * 100])
def test_relative_names_stay_relative(tmp_path, name):
    """Those of accepted connections too; one may be longer than a name can be with its directory."""
    for directory in ("home", "home/inner", "far"):
        (tmp_path / directory).mkdir()
    here = os.getcwd()
    setup = f"""
s = socket.socket(1, 2); s.bind({name!r}); os.dup2(s.fileno(), 20)
l = socket.socket(1); l.bind('listener'); l.listen(); os.dup2(l.fileno(), 21)
c = socket.socket(1); c.connect('listener'); a, _ = l.accept(); os.dup2(a.fileno(), 22); os.dup2(c.fileno(), 23)
"""
    with moved(setup, cwd=tmp_path / "home", **QUIET) as (stub, warnings):
        assert warnings == []
        assert stub.get("[socket.socket(fileno=os.dup(fd)).getsockname() for fd in (20, 21, 22)]") == [
            name,
            "listener",
            "listener",
        ]
        assert stub.get("socket.socket(fileno=23).getpeername()") == "listener"
        assert (tmp_path / "home" / name).is_socket()
    assert os.getcwd() == here


def test_relative_name_becomes_absolute_where_no_directory_of_our_own_is_allowed(tmp_path, monkeypatch):
    def denied(fd, action):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("checkpointd.restore.unix_sockets.in_directory", denied)
    with moved("s = socket.socket(1); s.bind('name')", cwd=tmp_path, **QUIET) as (stub, warnings):
        assert warnings == []
        assert stub.get("socket.socket(fileno=3).getsockname()") == str(tmp_path / "name")


def test_abstract_unix_listener():
    name = f"checkpoint-test-{os.getpid()}"
    with moved(
        f"s = socket.socket(1); s.bind(b'\\0' + {name.encode()!r}); s.listen(); os.dup2(s.fileno(), 20)",
        **QUIET,
    ) as (
        stub,
        _,
    ):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(b"\0" + name.encode())
            stub.do("socket.socket(fileno=20).accept()")
        assert any("in use by process" in text for text in check_files(stub.state))


def test_socketpair_with_queued_data_and_shutdown():
    setup = """
a, b = socket.socketpair(); os.dup2(a.fileno(), 20); os.dup2(b.fileno(), 21)
a.sendall(b'first '); a.sendall(b'second' * 5000); b.sendall(b'reply')
c, d = socket.socketpair(); os.dup2(c.fileno(), 22); os.dup2(d.fileno(), 23)
c.sendall(b'end'); c.shutdown(socket.SHUT_WR)
e, f = socket.socketpair(); e.sendall(b'orphan'); e.close(); os.dup2(f.fileno(), 24)
"""
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        stub.do("a, b, c, d, f = (socket.socket(fileno=n) for n in range(20, 25))")
        assert stub.get("b.recv(100000)") == b"first " + b"second" * 5000
        assert stub.get("a.recv(100)") == b"reply"
        stub.do("b.sendall(b'more')")
        assert stub.get("a.recv(100)") == b"more"
        assert stub.get("d.recv(100), d.recv(100)") == (b"end", b"")
        stub.do("d.sendall(b'back')")
        assert stub.get("c.recv(100)") == b"back"
        assert stub.get("f.recv(100), f.recv(100)") == (b"orphan", b"")


def test_saving_a_socketpair_consumes_nothing():
    with driven(**QUIET) as target:
        target.do("a, b = socket.socketpair(); a.sendall(b'stay')")
        save(target)
        target.go()
        assert target.get("b.recv(10)") == b"stay"


def test_a_peek_offset_is_not_moved():
    """Peeking moves it, as the program would see: nothing is peeked at then."""
    with driven(**QUIET) as target:
        target.do("a, b = socket.socketpair(); b.setsockopt(1, 42, 2); a.sendall(b'unread')")
        with contextlib.suppress(Unsupported):
            save(target)
        target.go()
        assert target.get("b.getsockopt(1, 42), b.recv(10, socket.MSG_PEEK | socket.MSG_DONTWAIT)") == (
            2,
            b"read",
        )


def test_datagram_socket_connected_to_a_name(tmp_path):
    path = str(tmp_path / "log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as logger:
        logger.bind(path)
        with moved(f"s = socket.socket(1, 2); s.connect({path!r}); os.dup2(s.fileno(), 20)", **QUIET) as (
            stub,
            warnings,
        ):
            assert warnings == []
            stub.do("socket.socket(fileno=20).send(b'line')")
            assert logger.recv(10) == b"line"


NAMES = "[(s.getsockname(), s.getpeername()) for s in socks]"


def name_of(kind, tmp_path, word):
    """A name, and whether it is a file."""
    return str(tmp_path / word) if kind == "file" else f"\0checkpoint-test-{os.getpid()}-{word}".encode()


@pytest.mark.parametrize("sort", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("listens", ["listening", "closed", "removed"])
@pytest.mark.parametrize("kind", ["file", "abstract"])
def test_connection_within_the_process_keeps_its_names(tmp_path, kind, listens, sort):
    server, client = name_of(kind, tmp_path, "server"), name_of(kind, tmp_path, "client")
    setup = f"""
l = socket.socket(1, {int(sort)}); l.bind({server!r}); l.listen(); os.dup2(l.fileno(), 30)
for fd, name in ((20, None), (22, {client!r})):
    c = socket.socket(1, {int(sort)})
    if name: c.bind(name)
    c.connect({server!r}); a, _ = l.accept(); os.dup2(c.fileno(), fd); os.dup2(a.fileno(), fd + 1)
socket.socket(fileno=os.dup(20)).send(b'waits'); l.close(); c.close(); a.close()
if {listens!r} != 'listening': os.close(30)
if {listens!r} == 'removed' and {kind!r} == 'file': os.unlink({server!r})
socks = [socket.socket(fileno=fd) for fd in range(20, 24)]
"""
    with driven(**QUIET) as target:
        target.do(setup)
        names = target.get(NAMES)
        assert names[1] == (server, ""), "as the kernel has it"
        assert names[2] == (client, server)
        state, contents, warnings = save(target)
        assert warnings == []
    for _ in range(2):  # a restored process is dumped again
        there = os.path.lexists(server)
        with restored(state, contents) as (stub, warnings):
            assert warnings == []
            stub.do("socks = [socket.socket(fileno=fd) for fd in range(20, 24)]")
            assert stub.get(NAMES) == names
            assert stub.get("[fcntl.fcntl(s, fcntl.F_GETFL) for s in socks]") == [os.O_RDWR] * 4
            assert os.path.lexists(server) == there
            assert os.path.lexists(client) == (kind == "file")
            if listens == "listening":
                stub.do(f"d = socket.socket(1, {int(sort)}); d.connect({server!r})")
                stub.do("l = socket.socket(fileno=os.dup(30)); e, _ = l.accept(); d.send(b'new')")
                assert stub.get("e.recv(9)") == b"new"
                stub.do("d.close(); e.close(); l.close()")
            else:
                with (
                    socket.socket(socket.AF_UNIX, sort) as other,
                    pytest.raises(OSError, match=r"refused|No such"),
                ):
                    other.connect(server)
            state, contents, _ = save(stub)
            stub.go()
            assert stub.get("socks[1].recv(9)") == b"waits"
            stub.do("socks[3].send(b'back')")
            assert stub.get("socks[2].recv(9)") == b"back"


@pytest.mark.parametrize("kind", ["file", "abstract"])
def test_datagram_pair_with_names(tmp_path, kind):
    first, second = name_of(kind, tmp_path, "first"), name_of(kind, tmp_path, "second")
    setup = f"""
a, b = socks = socket.socketpair(1, 2); a.bind({first!r}); b.bind({second!r})
os.dup2(a.fileno(), 20); os.dup2(b.fileno(), 21)
"""
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        stub.do("a, b = socks = [socket.socket(fileno=fd) for fd in (20, 21)]")
        assert stub.get(NAMES) == [(first, second), (second, first)]
        stub.do("a.send(b'one')")
        assert stub.get("b.recvfrom(9)") == (b"one", first)
        assert any("in use by" in text for text in check_files(stub.state))


@pytest.mark.parametrize("kind", ["file", "abstract"])
def test_datagram_sockets_connected_one_by_one_show_no_credentials(tmp_path, kind):
    """To each other, or one to itself."""
    first, second, alone = (name_of(kind, tmp_path, word) for word in ("first", "second", "alone"))
    setup = f"""
a, b, c = [socket.socket(1, 2) for _ in range(3)]
a.bind({first!r}); b.bind({second!r}); a.connect({second!r}); b.connect({first!r}); b.shutdown(socket.SHUT_WR)
c.bind({alone!r}); c.connect({alone!r})
for nth, s in enumerate((a, b, c)): os.dup2(s.fileno(), 20 + nth)
"""
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        stub.do("a, b, c = socks = [socket.socket(fileno=fd) for fd in (20, 21, 22)]")
        assert stub.get(NAMES) == [(first, second), (second, first), (alone, alone)]
        assert stub.get("[struct.unpack('3i', s.getsockopt(1, 17, 12)) for s in socks]") == [(0, -1, -1)] * 3
        stub.do("a.send(b'one'); c.send(b'self')")
        assert stub.get("b.recv(9), c.recv(9)") == (b"one", b"self")
        with pytest.raises(AssertionError, match="BrokenPipe"):
            stub.do("b.send(b'shut')")


def test_accepted_end_whose_client_hung_up_keeps_its_name(tmp_path):
    path = str(tmp_path / "server")
    setup = f"""
l = socket.socket(1); l.bind({path!r}); l.listen(); os.dup2(l.fileno(), 20)
c = socket.socket(1); c.connect({path!r}); a, _ = l.accept(); os.dup2(a.fileno(), 21); c.send(b'last'); c.close()
"""
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        stub.do("a = socket.socket(fileno=21)")
        assert stub.get("a.getsockname(), a.recv(9), a.recv(9)") == (path, b"last", b"")


def test_listener_without_a_name_of_its_own_listens_all_the_same(tmp_path):
    """Its file was removed, and another socket is there now."""
    path = str(tmp_path / "server")
    with driven(**QUIET) as target:
        target.do(f"l = socket.socket(1); l.bind({path!r}); l.listen(); os.dup2(l.fileno(), 20); l.close()")
        os.unlink(path)
        state, contents, _ = save(target)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        with restored(state, contents) as (stub, warnings):
            assert any("left without name" in warning for warning in warnings)
            stub.do(
                "l = socket.socket(fileno=20); c = socket.socket(1); c.connect(l.getsockname()); l.accept()"
            )


def connection_of_a_removed_listener(tmp_path):
    """Its name, and the files of a process that had both its ends."""
    path = str(tmp_path / "server")
    setup = f"""
l = socket.socket(1); l.bind({path!r}); l.listen(); c = socket.socket(1); c.connect({path!r}); a, _ = l.accept()
os.dup2(c.fileno(), 20); os.dup2(a.fileno(), 21); l.close(); os.unlink({path!r})
"""
    with driven(**QUIET) as target:
        target.do(setup)
        state, contents, _ = save(target)
        return path, state, contents


def test_names_that_were_borrowed_are_removed_though_the_process_dies(tmp_path, monkeypatch):
    path, state, contents = connection_of_a_removed_listener(tmp_path)
    accept = OwnSockets._accept

    def die(self, listener):
        accepted = accept(self, listener)
        assert os.path.lexists(path)
        os.kill(self._remote.pid, signal.SIGKILL)
        return accepted

    monkeypatch.setattr(OwnSockets, "_accept", die)
    with pytest.raises(CheckpointError), restored(state, contents):
        pass
    assert not os.path.lexists(path)


def test_a_stranger_who_finds_a_borrowed_name_gets_nothing(tmp_path, monkeypatch):
    path, state, contents = connection_of_a_removed_listener(tmp_path)
    listener, stranger = OwnSockets._listener, socket.socket(socket.AF_UNIX)

    def found(self, kind, bind):
        made = listener(self, kind, bind)
        made[1].listen(4)
        stranger.connect(path)
        return made

    monkeypatch.setattr(OwnSockets, "_listener", found)
    with stranger:
        with restored(state, contents) as (stub, warnings):
            assert warnings == []
            stub.do("c, a = [socket.socket(fileno=fd) for fd in (20, 21)]; c.send(b'own')")
            assert stub.get("a.recv(9), a.getsockname()") == (b"own", path)
        stranger.setblocking(False)
        assert stranger.recv(1) == b""


def test_a_failed_connection_leaves_no_limit_of_segments():
    """TCP_MAXSEG of a closed socket is what its last connection came to, until it is set."""
    setup = """
for fd, limit in ((20, 0), (21, 1000)):
    s = socket.socket()
    if limit: s.setsockopt(6, socket.TCP_MAXSEG, limit)
    else:
        try: s.connect(('127.0.0.1', 1))
        except OSError: pass
    os.dup2(s.fileno(), fd); s.close()
"""
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        stub.do(
            """
sizes = []
for fd in (20, 21):
    s = socket.socket(fileno=fd); l = socket.create_server(('127.0.0.1', 0))
    s.connect(l.getsockname()); sizes.append(l.accept()[0].getsockopt(6, socket.TCP_MAXSEG))
"""
        )
        free, limited = stub.get("sizes")
        assert free > 10_000
        assert limited <= 1000


def test_name_that_somebody_has_now_costs_the_name_only():
    """It is tried and told once, however many connections were accepted there."""
    name = name_of("abstract", None, "taken")
    setup = f"""
l = socket.socket(1); l.bind({name!r}); l.listen(); c = socket.socket(1); c.connect({name!r}); a, _ = l.accept()
os.dup2(c.fileno(), 20); os.dup2(a.fileno(), 21)
c = socket.socket(1); c.connect({name!r}); a, _ = l.accept()
os.dup2(c.fileno(), 22); os.dup2(a.fileno(), 23); l.close()
"""
    with driven(**QUIET) as target:
        target.do(setup)
        state, contents, _ = save(target)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(name)
        assert check_files(state) == []
        with restored(state, contents) as (stub, warnings):
            (warning,) = warnings
            assert "comes back without that name" in warning
            stub.do("c, a = [socket.socket(fileno=fd) for fd in (20, 21)]; c.send(b'works')")
            assert stub.get("a.recv(9)") == b"works"


CREDENTIALS = (
    "[struct.unpack('3i', socket.socket(fileno=os.dup(fd)).getsockopt(1, 17, 12)) for fd in range(20, 26)]"
)
MAKE_PAIRS = """
def keep(fd, *socks):
    for nth, s in enumerate(socks): os.dup2(s.fileno(), fd + nth); s.close()
"""


def test_peers_of_pairs_are_the_process_itself(tmp_path):
    setup = f"""{MAKE_PAIRS}
keep(20, *socket.socketpair()); keep(22, *socket.socketpair(1, 2))
l = socket.socket(1); l.bind({str(tmp_path / "server")!r}); l.listen()
c = socket.socket(1); c.connect(l.getsockname()); keep(24, c, l.accept()[0])
"""
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        ours = (stub.pid, os.geteuid(), os.getegid())
        assert stub.get(CREDENTIALS) == [ours] * 6


@pytest.mark.needs("root")
def test_peers_of_pairs_are_the_users_that_made_them():
    """A server that dropped its privileges half way: each call shows who it was then."""
    setup = f"""{MAKE_PAIRS}
keep(20, *socket.socketpair())
os.setegid(1234); os.seteuid(4321)
keep(22, *socket.socketpair())
os.seteuid(0); os.setegid(0)
os.setegid(77); e, f = socket.socketpair()
os.setegid(99); os.seteuid(98); g, h = socket.socketpair(); os.seteuid(0); os.setegid(0)
h.close(); keep(24, e, g)
"""
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        root, user, group, other = ((stub.pid, *ids) for ids in ((0, 0), (4321, 1234), (0, 77), (98, 99)))
        assert stub.get(CREDENTIALS) == [root, root, user, user, group, other]
        assert stub.get("os.getresuid(), os.getresgid()") == ((0, 0, 0), (0, 0, 0))
        capabilities = stub.get("open('/proc/self/status').read().split('CapEff:')[1].split()[0]")
        assert capabilities == Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0]


@pytest.mark.needs("root")
def test_credentials_of_a_connection_are_those_of_listen_and_connect():
    name = name_of("abstract", None, "users")
    setup = f"""{MAKE_PAIRS}
l = socket.socket(1); l.bind({name!r})
os.setegid(11); os.seteuid(10); l.listen(); os.seteuid(0); os.setegid(0)
os.setegid(21); os.seteuid(20); c = socket.socket(1); c.connect({name!r}); os.seteuid(0); os.setegid(0)
keep(20, c, l.accept()[0]); keep(22, *socket.socketpair()); keep(24, *socket.socketpair())
"""
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        assert stub.get(CREDENTIALS)[:2] == [(stub.pid, 10, 11), (stub.pid, 20, 21)]


@pytest.mark.needs("root")
def test_a_process_with_capabilities_only_does_not_lose_them_for_a_moment_as_root():
    """Leaving user 0 altogether takes all capabilities away, and they are needed to the end of the restore."""
    status = "open('/proc/self/status').read()"
    capabilities = f"[line for line in {status}.splitlines() if line.startswith(('Cap', 'Uid', 'Gid'))]"
    with driven(**QUIET) as stub:
        stub.do("""
import checkpointd.linux.arch  # while it may still read that
libc.prctl(8, 1)  # PR_SET_KEEPCAPS
os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)
header = ctypes.create_string_buffer(struct.pack('Ii', 0x20080522, 0))
both = 1 << 6 | 1 << 7  # CAP_SETGID, CAP_SETUID
data = ctypes.create_string_buffer(struct.pack('6I', both, both, 0, 0, 0, 0))
assert libc.syscall(126, header, data) == 0
""")
        before = stub.get(capabilities)
        for uid, shown in ((4321, 4321), (0, 1000)):
            own = OwnSockets(stub)
            for end in own.pair(socket.SOCK_STREAM, PeerCredentials(1, uid, 99)):
                found = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                assert found[:2] == (stub.pid, shown)
                end.close()
            assert bool(own.refused) == (uid != shown)
            assert stub.get(capabilities) == before


def test_ids_that_may_not_be_taken_are_told():
    with driven(**QUIET) as target:
        target.do("pairs = [socket.socketpair() for _ in range(3)]")
        state, contents, _ = save(target)
    nobody = PeerCredentials(target.pid, 2**32 - 1, os.getegid())  # no process can have this user
    state = replace(
        state,
        descriptions=tuple(
            replace(one, credentials=nobody) if isinstance(one, UnixSocket) else one
            for one in state.descriptions
        ),
    )
    with restored(state, contents) as (stub, warnings):
        (warning,) = warnings
        assert f"shows as process {stub.pid} of user {os.geteuid()}" in warning


def test_pair_that_another_process_made_is_told_at_the_dump(tmp_path):
    path = str(tmp_path / "bring")
    with socket.socket(socket.AF_UNIX) as server, driven(**QUIET) as target:
        server.bind(path)
        server.listen()
        target.do(f"c = socket.socket(1); c.connect({path!r})")
        link, _ = server.accept()
        with link:
            for _ in range(2):
                ends = socket.socketpair()
                socket.send_fds(link, [b"x"], [end.fileno() for end in ends])
                target.do("socket.recv_fds(c, 1, 2)")
                for end in ends:
                    end.close()
        target.do("c.close()")
        state, contents, warnings = save(target)
        (warning,) = warnings
        assert f"that process {os.getpid()} made" in warning
    with restored(state, contents) as (_, warnings):
        assert warnings == []  # it was told already


def test_unix_connection_to_another_process(tmp_path):
    path = str(tmp_path / "server")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        with driven(**QUIET) as target:
            target.do(f"s = socket.socket(1); s.connect({path!r}); os.dup2(s.fileno(), 20)")
            assert "--external null" in file_blockers(target.pid, FilesOptions(external="refuse"))[0]
            state, contents, _ = save(target)
    (conflict,) = check_files(state)
    assert path in conflict
    with pytest.raises(RestoreConflict, match="nobody holds that connection"), restored(state, contents):
        pass
    with restored(state, contents, FilesOptions(external="null")) as (stub, warnings):
        assert any(path in text for text in warnings)
        assert stub.get("socket.socket(fileno=20).recv(5)") == b""


def test_netlink_groups():
    setup = "s = socket.socket(16, 3, 0); s.bind((0, 1)); s.setsockopt(270, 1, 27); os.dup2(s.fileno(), 20)"
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        stub.do("s = socket.socket(fileno=20)")
        assert stub.get("s.getsockname()[1]") & 1
        assert stub.get("s.getsockopt(270, 9, 8)")[3] == 1 << (27 - 1 - 24)


REFUSED = [
    ("s = socket.socket(2, 3, 255)", "raw"),
    ("s = socket.socket(17, 3)", "packet"),
    ("a, b = socket.socketpair(1, 2); a.send(b'1')", "datagram socket with unread messages"),
    ("a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [0])", "descriptors or credentials under way"),
    ("a, b = socket.socketpair(); b.setsockopt(1, 42, 0); a.send(b'unread')", "SO_PEEK_OFF"),
]


@pytest.mark.parametrize(("setup", "words"), REFUSED)
def test_what_cannot_be_saved_is_refused_with_its_sentence(setup, words):
    with driven(**QUIET) as target:
        target.do(setup)
        with pytest.raises(Unsupported, match=words) as error:
            save(target)
        assert error.value.details["blockers"][0].startswith("fd ")
        target.go()


def test_classic_filter_goes_on_filtering():
    port = free_port(kind=socket.SOCK_DGRAM)
    # accept packets whose byte 8 (first of the payload) is "y"
    setup = f"""
code = struct.pack('HBBI' * 4, 0x30, 0, 0, 8, 0x15, 0, 1, ord('y'), 6, 0, 0, 0xffff, 6, 0, 0, 0)
s = socket.socket(2, 2); os.dup2(s.fileno(), 20); s.bind(('127.0.0.1', {port}))
buffer = ctypes.create_string_buffer(code)
s.setsockopt(1, 26, struct.pack('@HP', 4, ctypes.addressof(buffer)))
"""
    with moved(setup, **QUIET) as (stub, warnings):
        assert warnings == []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for text in (b"no", b"yes"):
                sender.sendto(text, ("127.0.0.1", port))
        assert stub.get("socket.socket(fileno=20).recv(10)") == b"yes"


def test_sockets_are_left_as_they_were():
    """Status flags and options of the target's sockets are the same after a save."""
    look = "[(fcntl.fcntl(n, fcntl.F_GETFL), s.getsockopt(1, 42) if n else 0) for n in [s.fileno()]]"
    with driven(**QUIET) as target:
        target.do("s, t = socket.socketpair(); s.setblocking(False)")
        before = target.get(look)
        with contextlib.suppress(Unsupported):
            save(target)
        target.go()
        assert target.get(look) == before
