# SPDX-License-Identifier: Apache-2.0
"""Where sockets and stores are looked for, and which directories are not trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpointd import location
from checkpointd.client.autostart import is_listening
from checkpointd.errors import NotPermitted, UsageError


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("h:1", "h", 1), ("127.0.0.1:65535", "127.0.0.1", 65535), ("[::1]:7777", "::1", 7777)],
)
def test_an_address_is_a_host_and_a_port(address, host, port):
    assert location.checked_address(address, "--connect") == (host, port)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "h",
        "h:",
        ":1",
        "h:0",
        "h:65536",
        "h:" + "9" * 5000,
        "h:x",
        "h:\u0661",
        "h:-1",
        "::1:7777",
        "::1",
        "[h]:1",
        "[::1]",
        "[::1:1",
    ],
)
def test_other_addresses_are_refused(address):
    with pytest.raises(UsageError):
        location.checked_address(address, "--connect")


def test_sockets_lie_in_the_user_s_runtime_directory():
    assert location.runtime_directory({"XDG_RUNTIME_DIR": "/run/user/7"}, uid=0) == Path("/run/checkpointd")
    assert location.runtime_directory({"XDG_RUNTIME_DIR": "/run/user/7"}, uid=7) == Path(
        "/run/user/7/checkpointd"
    )
    assert location.runtime_directory({}, uid=7) == Path("/tmp/checkpointd-7")
    assert location.runtime_directory({"XDG_RUNTIME_DIR": "relative"}, uid=7) == Path("/tmp/checkpointd-7")


def test_the_environment_names_socket_and_store():
    assert location.default_socket({"CHECKPOINT_SOCKET": "/a/b"}) == Path("/a/b")
    assert location.default_store({"CHECKPOINT_STORE": "/a/b"}) == Path("/a/b")
    assert location.default_store({}, uid=0) == Path("/var/lib/checkpointd")
    assert location.default_store({"XDG_STATE_HOME": "/st"}, uid=7) == Path("/st/checkpointd")


def test_too_long_a_socket_path_is_refused_with_its_length():
    with pytest.raises(UsageError, match="107"):
        location.checked_socket_path("/" + "x" * 200)


def test_a_directory_others_may_write_is_not_trusted(tmp_path):
    location.check_private_directory(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(NotPermitted, match="everybody may write"):
        location.check_private_directory(tmp_path)
    with pytest.raises(NotPermitted):
        is_listening(tmp_path / "s.sock")


def test_a_link_in_place_of_the_directory_is_not_trusted(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(NotPermitted, match="not a directory"):
        location.check_private_directory(tmp_path / "link")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a directory away")
def test_a_directory_of_another_user_is_not_trusted(tmp_path):
    mine = tmp_path / "theirs"
    mine.mkdir()
    os.chown(mine, 12345, 12345)
    with pytest.raises(NotPermitted, match="12345"):
        location.check_private_directory(mine)


def test_nobody_listens_where_nothing_is(tmp_path):
    assert not is_listening(tmp_path / "s.sock")
    assert not is_listening(tmp_path / "missing" / "s.sock")
