# SPDX-License-Identifier: Apache-2.0
"""Options of sockets, set by one process and read back in the one restored from it."""

import errno
import os
import socket
import struct

import pytest

from checkpointd.errors import Unsupported
from checkpointd.linux.inet_diag import TCP_MD5SIG_EXT, ListenerDiag, Md5Key
from checkpointd.linux.socket import has_tcp_ao_keys
from checkpointd.state.files import SocketOption
from checkpointd.target.files import file_blockers
from checkpointd.target.socket_options import why_unsettable
from tests.files_lab import driven, moved, save

ON = struct.pack("i", 1)
INET_DATAGRAM = (socket.AF_INET, socket.SOCK_DGRAM, 0)
INET_STREAM = (socket.AF_INET, socket.SOCK_STREAM, 0)
INET6_DATAGRAM = (socket.AF_INET6, socket.SOCK_DGRAM, 0)
INET6_STREAM = (socket.AF_INET6, socket.SOCK_STREAM, 0)
UNIX_DATAGRAM = (socket.AF_UNIX, socket.SOCK_DGRAM, 0)
NETLINK = (socket.AF_NETLINK, socket.SOCK_RAW, 0)

SOL_SOCKET = {
    "SO_DEBUG": (1, ON),
    "SO_NO_CHECK": (11, ON),
    "SO_TIMESTAMPNS": (35, ON),
    "SO_TIMESTAMPING": (37, struct.pack("2i", 0x18, 0)),  # RX_SOFTWARE, SOFTWARE
    "SO_WIFI_STATUS": (41, ON),
    "SO_NOFCS": (43, ON),
    "SO_LOCK_FILTER": (44, ON),
    "SO_SELECT_ERR_QUEUE": (45, ON),
    "SO_MAX_PACING_RATE": (47, struct.pack("Q", 1 << 33)),
    "SO_INCOMING_CPU": (49, ON),
    "SO_TXTIME": (61, struct.pack("2I", 1, 1)),  # CLOCK_MONOTONIC, SOF_TXTIME_DEADLINE_MODE
    "SO_PREFER_BUSY_POLL": (69, ON),
    "SO_RCVMARK": (75, ON),
    "SO_RCVPRIORITY": (82, ON),
}
SOL_IP = {
    "IP_OPTIONS": (4, bytes([1, 1, 148, 4, 0, 0, 0, 0])),  # no operation twice, router alert, end
    "IP_PASSSEC": (18, ON),
    "IP_CHECKSUM": (23, ON),
    "IP_RECVFRAGSIZE": (25, ON),
    "IP_RECVERR_RFC4884": (26, ON),
    "IP_UNICAST_IF": (50, struct.pack("!I", 1)),
    "IP_LOCAL_PORT_RANGE": (51, struct.pack("2H", 40000, 40100)),
}
SOL_IPV6 = {
    "IPV6_2292PKTINFO": (2, ON),
    "IPV6_2292HOPOPTS": (3, ON),
    "IPV6_2292DSTOPTS": (4, ON),
    "IPV6_2292RTHDR": (5, ON),
    "IPV6_2292HOPLIMIT": (8, ON),
    "IPV6_FLOWINFO": (11, ON),
    "IPV6_RECVERR_RFC4884": (31, ON),
    "IPV6_FLOWINFO_SEND": (33, ON),
    "IPV6_RECVHOPOPTS": (53, ON),
    "IPV6_HOPOPTS": (54, bytes([0, 0, 5, 2, 0, 0, 1, 0])),  # router alert, padded
    "IPV6_RECVRTHDR": (56, ON),
    "IPV6_RTHDR": (57, bytes([0, 2, 2, 1, 0, 0, 0, 0]) + bytes([0x20, 1, 0xD, 0xB8]) + bytes(11) + ON[:1]),
    "IPV6_RECVDSTOPTS": (58, ON),
    "IPV6_DSTOPTS": (59, bytes([0, 12, 1, 100]) + bytes(100)),  # longer than an ordinary option
    "IPV6_RECVPATHMTU": (60, ON),
    "IPV6_ADDR_PREFERENCES": (72, struct.pack("i", 0x402)),  # public, home
    "IPV6_MINHOPCOUNT": (73, struct.pack("i", 30)),
    "IPV6_RECVORIGDSTADDR": (74, ON),
    "IPV6_UNICAST_IF": (76, struct.pack("!I", 1)),
    "IPV6_RECVFRAGSIZE": (77, ON),
}
SOL_TCP = {
    "TCP_MAXSEG": (2, struct.pack("i", 1000)),
    "TCP_WINDOW_CLAMP": (10, struct.pack("i", 50000)),
    "TCP_QUICKACK": (12, bytes(4)),
    "TCP_THIN_LINEAR_TIMEOUTS": (16, ON),
    "TCP_SAVE_SYN": (27, ON),
    "TCP_FASTOPEN_KEY": (33, bytes(range(16))),
    "TCP_FASTOPEN_NO_COOKIE": (34, ON),
    "TCP_INQ": (36, ON),
    "TCP_TX_DELAY": (37, struct.pack("i", 20000)),
    "TCP_RTO_MAX_MS": (44, struct.pack("i", 5000)),
    "TCP_RTO_MIN_US": (45, struct.pack("i", 60000)),
    "TCP_DELACK_MAX_US": (46, struct.pack("i", 60000)),
}
SOL_NETLINK = {
    "NETLINK_PKTINFO": (3, ON),
    "NETLINK_BROADCAST_ERROR": (4, ON),
    "NETLINK_NO_ENOBUFS": (5, ON),
    "NETLINK_LISTEN_ALL_NSID": (8, ON),
    "NETLINK_CAP_ACK": (10, ON),
    "NETLINK_EXT_ACK": (11, ON),
    "NETLINK_GET_STRICT_CHK": (12, ON),
}


def only(table, *names):
    return {name: table[name] for name in names}


# socket, level, options that such a socket takes together
TOGETHER = [
    ("datagram", INET_DATAGRAM, 1, SOL_SOCKET),
    ("datagram-ip", INET_DATAGRAM, 0, SOL_IP),
    ("datagram6-ip", INET6_DATAGRAM, 0, SOL_IP),
    ("datagram6-ipv6", INET6_DATAGRAM, 41, SOL_IPV6),
    ("stream6-ipv6", INET6_STREAM, 41, SOL_IPV6),
    ("stream", INET_STREAM, 6, SOL_TCP),
    ("stream6", INET6_STREAM, 6, SOL_TCP),
    ("txrehash", INET_STREAM, 1, {"SO_TXREHASH": (74, bytes(4))}),
    ("encapsulation", INET_DATAGRAM, 17, {"UDP_ENCAP": (100, struct.pack("i", 2))}),
    # three more ways to ask for the time of arrival, each of which undoes the others
    ("timestamp", INET_DATAGRAM, 1, {"SO_TIMESTAMP": (29, ON)}),
    ("timestamp-new", INET_DATAGRAM, 1, {"SO_TIMESTAMP_NEW": (63, ON)}),
    ("timestampns-new", INET_DATAGRAM, 1, {"SO_TIMESTAMPNS_NEW": (64, ON)}),
    ("timestamping-new", INET_DATAGRAM, 1, {"SO_TIMESTAMPING_NEW": (65, struct.pack("2i", 0x18, 0))}),
    (
        "unix",
        UNIX_DATAGRAM,
        1,
        only(SOL_SOCKET, "SO_TIMESTAMPNS", "SO_TIMESTAMPING", "SO_LOCK_FILTER")
        | {"SO_PASSRIGHTS": (83, bytes(4))},
    ),
    ("netlink", NETLINK, 270, SOL_NETLINK),
]


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("which", "level", "options"), [case[1:] for case in TOGETHER], ids=[case[0] for case in TOGETHER]
)
def test_rarer_options_come_back(which, level, options):
    """Those that this kernel has: asked of a fresh socket, set, and read after the restore as before the dump."""
    wanted = {}
    with socket.socket(*which) as fresh:
        for name, (number, value) in options.items():
            try:
                before = fresh.getsockopt(level, number, 1024)
                fresh.setsockopt(level, number, value)
            except OSError:
                continue  # not of this kernel
            after = fresh.getsockopt(level, number, 1024)
            assert after != before, f"{name}: nothing to see"
            wanted[name] = after
    assert wanted
    chosen = [(options[name][0], options[name][1]) for name in wanted]
    setup = f"""
s = socket.socket(*{tuple(map(int, which))}); os.dup2(s.fileno(), 20)
for number, value in {chosen}: s.setsockopt({level}, number, value)
"""
    with moved(setup) as (stub, warnings):
        assert warnings == []
        stub.do("s = socket.socket(fileno=20)")
        found = stub.get(f"[s.getsockopt({level}, number, 1024) for number, _ in {chosen}]")
        assert dict(zip(wanted, found, strict=True)) == wanted


def test_a_listener_with_rarer_options_listens_again():
    setup = """
s = socket.socket(); os.dup2(s.fileno(), 20)
s.setsockopt(6, 2, 1000); s.setsockopt(6, 27, 1); s.setsockopt(6, 23, 5); s.setsockopt(6, 33, bytes(range(16)))
s.bind(('127.0.0.1', 0)); s.listen()
"""
    with moved(setup) as (stub, warnings):
        assert warnings == []
        stub.do(
            "s = socket.socket(fileno=20); c = socket.create_connection(s.getsockname()); a, _ = s.accept()"
        )
        assert stub.get("[s.getsockopt(6, n) for n in (2, 27, 23)]") == [1000, 1, 5]
        assert stub.get("s.getsockopt(6, 33, 64)") == bytes(range(16))
        assert stub.get("len(a.getsockopt(6, 28, 1024))") > 20  # TCP_SAVED_SYN


def test_a_locked_filter_stays_locked():
    setup = """
code = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0xffff))
s = socket.socket(2, 2); os.dup2(s.fileno(), 20)
s.setsockopt(1, 26, struct.pack('@HP', 1, ctypes.addressof(code))); s.setsockopt(1, 44, 1)
"""
    with moved(setup) as (stub, warnings):
        assert warnings == []
        stub.do("s = socket.socket(fileno=20)")
        assert stub.get("s.getsockopt(1, 44)") == 1
        assert stub.get("len(s.getsockopt(1, 26, 1024))") > 0
        with pytest.raises(AssertionError, match="Operation not permitted"):
            stub.do("s.setsockopt(1, 27, 0)")


@pytest.mark.needs("root")
def test_a_socket_in_repair_mode_is_refused():
    with driven() as target:
        target.do("s = socket.socket(); s.setsockopt(6, 19, 1)")
        (blocker,) = file_blockers(target.pid)
        assert "repair mode" in blocker
        with pytest.raises(Unsupported, match="repair mode"):
            save(target)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (SocketOption(6, 31, b"tls".ljust(16, b"\0")), "upper layer protocol tls"),
        (SocketOption(17, 100, struct.pack("i", 3)), "kernel tunnel"),
        (SocketOption(17, 100, struct.pack("i", 2)), ""),
        (SocketOption(41, 54, bytes([0, 200]) + bytes(1022)), "more than 1024 bytes"),
        (SocketOption(41, 54, bytes([0, 127]) + bytes(1022)), ""),
    ],
)
def test_what_no_new_socket_can_be_made_to_be_is_told(option, words):
    assert words in why_unsettable(option)
    assert bool(words) == bool(why_unsettable(option))


MD5_KEYS = {
    socket.AF_INET: (
        Md5Key(socket.AF_INET, socket.inet_aton("127.0.0.1"), 32, b"of one peer"),
        Md5Key(socket.AF_INET, socket.inet_aton("10.0.0.0"), 8, b"of a network"),
    ),
    socket.AF_INET6: (
        Md5Key(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, "fd00::"), 8, b"of a network"),
        Md5Key(socket.AF_INET, socket.inet_aton("127.0.0.1"), 32, b"of one peer"),
    ),
}


@pytest.mark.needs("root", "tcp_md5")
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_listener_keeps_its_md5_keys(family):
    """Each of two listeners that share a port keeps its own, and a peer of the key gets through."""
    values = [key.option(family) for key in MD5_KEYS[family]]
    setup = f"""
host, port = {"127.0.0.1" if family == socket.AF_INET else "::"!r}, 0
for fd in (20, 21):
    s = socket.socket({int(family)}); s.setsockopt(1, 15, 1); s.bind((host, port)); s.listen(); os.dup2(s.fileno(), fd)
    port = s.getsockname()[1]; s.close()
s = socket.socket(fileno=20)
for value in {values}: s.setsockopt(6, {TCP_MD5SIG_EXT}, value)
"""
    with moved(setup) as (stub, warnings):
        assert warnings == []
        stub.do("s = socket.socket(fileno=20)")
        address = stub.get("s.getsockname()[:2]")
        diag = ListenerDiag()
        inodes = stub.get("[os.fstat(fd).st_ino for fd in (20, 21)]")
        assert set(diag.md5_keys(family, *address, inodes[0])) == set(MD5_KEYS[family])
        assert diag.md5_keys(family, *address, inodes[1]) == ()
        diag.close()
        stub.do("os.close(21)")
        with socket.socket() as client:
            client.settimeout(5)
            key = Md5Key(socket.AF_INET, socket.inet_aton("127.0.0.1"), 32, b"of one peer")
            client.setsockopt(6, TCP_MD5SIG_EXT, key.option(socket.AF_INET))
            client.connect(("127.0.0.1", address[1]))


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EPROTONOSUPPORT, errno.EPERM])
@pytest.mark.parametrize("call", ["__init__", "md5_keys"])
def test_a_listener_is_saved_where_nobody_tells_of_keys(monkeypatch, call, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ListenerDiag, call, fail)
    with driven() as target:
        target.do("s = socket.create_server(('127.0.0.1', 0))")
        assert file_blockers(target.pid) == []


def test_keys_of_the_tcp_authentication_option_are_refused(monkeypatch):
    # struct tcp_ao_add: address, algorithm, interface, (bits), reserved, prefix, ids, MAC length, flags, key
    address = struct.pack("=HH4s", socket.AF_INET, 0, socket.inet_aton("127.0.0.1")).ljust(128, b"\0")
    ids = bytes([32, 100, 100, 12, 0, 3])
    key = (
        address
        + b"hmac(sha1)".ljust(64, b"\0")
        + struct.pack("=iIH", 0, 0, 0)
        + ids
        + b"key".ljust(80, b"\0")
    )
    with driven() as target:
        target.do("s = socket.socket()")
        try:
            target.do(f"s.setsockopt(6, 38, {key})")
        except AssertionError:  # a kernel without CONFIG_TCP_AO: as if it had told of keys
            monkeypatch.setattr("checkpointd.linux.socket.has_tcp_ao_keys", lambda sock: True)
        (blocker,) = file_blockers(target.pid)
        assert "TCP-AO" in blocker


def test_a_socket_without_keys_of_the_tcp_authentication_option():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as idle:
        assert not has_tcp_ao_keys(listener)
        assert not has_tcp_ao_keys(idle)
