# SPDX-License-Identifier: Apache-2.0
"""Connections of UNIX sockets within a process: their names, and who made them, before and after."""

import os
import signal
import socket
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from checkpointd.errors import CheckpointError
from checkpointd.restore.files import check_files
from checkpointd.restore.own_sockets import OwnSockets
from checkpointd.state.files import PeerCredentials, UnixSocket
from tests.files_lab import driven, moved, restored, save

QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


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
