# SPDX-License-Identifier: Apache-2.0
"""Sockets saved from one process and brought back in another, each tried out afterwards."""

import contextlib
import os
import socket
import struct
import subprocess

import pytest

from checkpointd.errors import RestoreConflict, Unsupported
from checkpointd.restore.files import after_credentials, check_files
from checkpointd.state.files import FilesOptions
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
