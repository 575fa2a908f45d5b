# SPDX-License-Identifier: Apache-2.0
"""Framing and arguments of the talk between service and agent."""

from __future__ import annotations

import socket
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointd.agent.protocol import (
    MAX_MESSAGE,
    AgentStatus,
    Channel,
    CheckArgs,
    CheckItem,
    DumpArgs,
    ProtocolError,
    RestoreArgs,
    TrackArgs,
)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    yield Channel(ours), theirs
    theirs.close()
    ours.close()


@given(
    st.dictionaries(st.text(), st.recursive(st.integers() | st.text() | st.none(), st.lists, max_leaves=5))
)
def test_a_message_arrives_as_it_was_sent(message):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Channel(ours).send(message)
        assert Channel(theirs).recv() == message


def test_many_threads_do_not_mix_their_messages(pair):
    channel, theirs = pair
    big = "x" * 100_000
    threads = [
        threading.Thread(target=lambda n=n: [channel.send({"n": n, "big": big}) for _ in range(10)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    reader = Channel(theirs)
    found = [reader.recv() for _ in range(40)]
    for thread in threads:
        thread.join()
    assert sorted(message["n"] for message in found) == sorted(list(range(4)) * 10)
    assert all(message["big"] == big for message in found)


def test_end_of_file_is_none_also_within_a_message(pair):
    channel, theirs = pair
    theirs.sendall(struct.pack("<I", 100) + b"{")
    theirs.shutdown(socket.SHUT_WR)
    assert channel.recv() is None


def test_a_message_in_single_bytes_arrives(pair):
    channel, theirs = pair
    body = b'{"id": 1}'
    raw = struct.pack("<I", len(body)) + body
    thread = threading.Thread(target=lambda: [theirs.sendall(raw[at : at + 1]) for at in range(len(raw))])
    thread.start()
    assert channel.recv() == {"id": 1}
    thread.join()


@pytest.mark.parametrize(
    "raw", [struct.pack("<I", MAX_MESSAGE + 1), struct.pack("<I", 3) + b"{{{", struct.pack("<I", 2) + b"[]"]
)
def test_nonsense_is_refused_before_memory_is_taken(pair, raw):
    channel, theirs = pair
    theirs.sendall(raw)
    with pytest.raises(ProtocolError):
        channel.recv()


def test_too_long_a_message_is_not_sent_at_all(pair):
    channel, theirs = pair
    with pytest.raises(ProtocolError):
        channel.send({"x": "y" * MAX_MESSAGE})
    channel.send({"after": 1})
    assert Channel(theirs).recv() == {"after": 1}


def test_sending_to_a_dead_peer_raises_oserror(pair):
    channel, theirs = pair
    theirs.close()
    with pytest.raises(OSError):
        for _ in range(10):
            channel.send({})


def test_close_wakes_a_waiting_receiver(pair):
    channel, _ = pair
    found = []
    thread = threading.Thread(target=lambda: found.append(channel.recv()))
    thread.start()
    channel.close()
    thread.join(30)
    assert found == [None]


@pytest.mark.parametrize(
    "args",
    [
        CheckArgs(5),
        TrackArgs(5, "content", True),
        DumpArgs(5, "/s", incremental=True, external=["fd:1"], deadline_s=1.5),
        RestoreArgs("/s", "ab", external=["fd:1=/x"]),
        CheckItem("n", "required", True, "d"),
        AgentStatus(1, "uffd-wp"),
    ],
)
def test_arguments_survive_the_wire(args):
    assert type(args).from_dict(args.to_dict()) == args


def test_an_unknown_option_is_refused_not_ignored():
    with pytest.raises(ProtocolError, match="kill_gently"):
        DumpArgs.from_dict({"pid": 1, "store": "/s", "kill_gently": True})
    with pytest.raises(ProtocolError, match="store"):
        DumpArgs.from_dict({"pid": 1})
