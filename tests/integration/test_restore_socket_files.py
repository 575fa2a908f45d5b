# SPDX-License-Identifier: Apache-2.0
"""Names of UNIX sockets in directories of other users: what root makes there for a process, and what it touches."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from checkpointd.errors import RestoreConflict
from checkpointd.restore import unix_sockets
from checkpointd.restore.files_check import check_files
from checkpointd.restore.reopen import Opener
from checkpointd.state.files import FilesOptions, UnixSocket
from tests.files_lab import driven, restored, save
from tests.integration.test_restore_rights import ROOT, UID, USER

pytestmark = pytest.mark.needs("root", "ptrace")
QUIET = {"stdin": -3, "stdout": -3, "stderr": -3}


@pytest.fixture
def home() -> Iterator[Path]:
    top = Path(tempfile.mkdtemp(prefix="restore-sockets-"))
    top.chmod(0o755)
    (top / "user").mkdir()
    (top / "root").mkdir(mode=0o700)
    os.chown(top / "user", UID, UID)
    yield top
    shutil.rmtree(top)


def saved(home: Path, path: str) -> object:
    """Files of a process that listens at `path`."""
    with driven(cwd=home, **QUIET) as target:
        target.do(f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({path!r}); s.listen()")
        target.do(f"os.chmod({path!r}, 0o620); os.chown({path!r}, {UID}, {UID})")
        state, _, _ = save(target)
    return state


def test_owner_and_permissions_come_back(home: Path) -> None:
    state = saved(home, str(home / "user/socket"))
    with restored(state):
        there = (home / "user/socket").lstat()
        assert stat.S_ISSOCK(there.st_mode)
        assert (there.st_uid, there.st_gid, stat.S_IMODE(there.st_mode)) == (UID, UID, 0o620)


def test_links_in_its_name_that_were_there_at_the_dump_are_fine(home: Path) -> None:
    (home / "run").symlink_to("user")
    state = saved(home, str(home / "run/socket"))
    assert check_files(state) == []  # type: ignore[arg-type]
    with restored(state):
        assert stat.S_ISSOCK((home / "user/socket").lstat().st_mode)


def test_a_directory_that_leads_elsewhere_now_is_refused(home: Path) -> None:
    state = saved(home, str(home / "user/socket"))
    (home / "user").rename(home / "moved")
    (home / "user").symlink_to("root")
    assert any("symbolic link" in one for one in check_files(state))  # type: ignore[arg-type]
    with pytest.raises(RestoreConflict), restored(state):
        pass
    assert os.listdir(home / "root") == []


@pytest.mark.parametrize("how", ["symbolic link", "hard link", "another socket"])
def test_a_name_taken_over_while_it_is_bound_keeps_its_owner(
    home: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Between bind and chmod the owner of the directory puts something of root's there."""
    state = saved(home, str(home / "user/socket"))
    secret, name = home / "root" / "secret", home / "user" / "socket"
    if how == "another socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(secret))
    else:
        secret.write_text("only root may read this")
    secret.chmod(0o600)
    own_file: Callable[..., None] = unix_sockets._own_file

    def late(*args: object) -> None:
        name.unlink()
        if how == "symbolic link":
            name.symlink_to(secret)
        else:
            name.hardlink_to(secret)
        own_file(*args)

    monkeypatch.setattr(unix_sockets, "_own_file", late)
    with pytest.raises(RestoreConflict, match="was replaced while it was being bound"), restored(state):
        pass
    there = secret.lstat()
    assert (there.st_uid, stat.S_IMODE(there.st_mode)) == (0, 0o600)


def test_a_socket_of_roots_is_not_connected_for_a_user(home: Path) -> None:
    name = home / "root" / "socket"
    one = UnixSocket(
        flags=os.O_RDWR, family=socket.AF_UNIX, type=socket.SOCK_DGRAM, protocol=0,
        state="connected", peer_name=os.fsencode(name),
    )  # fmt: skip
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(name))
        for opener, is_connected in ((Opener(), True), (Opener(theirs=USER, ours=ROOT), False)):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
                warnings: list[str] = []
                maker = SimpleNamespace(
                    local={0: client.fileno()}, warnings=warnings, opener=opener, name=lambda index: "fd 0",
                    options=FilesOptions(),
                )  # fmt: skip
                unix_sockets.connect_unix(maker, 0, one)  # type: ignore[arg-type]
                assert bool(warnings) != is_connected
                if is_connected:
                    assert client.getpeername() == str(name)
                else:
                    with pytest.raises(OSError):
                        client.getpeername()
