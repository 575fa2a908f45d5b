# SPDX-License-Identifier: Apache-2.0
"""What connected UNIX sockets say of their peers after a whole restore, when root restores a user's process."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointd.restore.restorer import RestoreOptions
from tests.integration.test_restore_rights import UID, _python, read, wait_for
from tests.programs.restore_harness import capture, kill_and_reap, restore

pytestmark = pytest.mark.needs("root", "ptrace", "set_tid")
PROGRAM = """
import os, socket, struct, sys, time
os.chdir(sys.argv[1])
pair = socket.socketpair()
here = os.getcwd() + "/server"
listener = socket.socket(socket.AF_UNIX); listener.bind(here); listener.listen()
client = socket.socket(socket.AF_UNIX); client.bind(b"\\0restore-peers-%d" % os.getpid()); client.connect(here)
accepted, _ = listener.accept()
removed = os.getcwd() + "/removed"
second = socket.socket(socket.AF_UNIX); second.bind(removed); second.listen()
clients = [socket.socket(socket.AF_UNIX)]; clients[0].connect(removed); clients.append(second.accept()[0])
second.close(); os.unlink(removed)
alone, gone = socket.socketpair()
gone.close()
while True:
    for sock in (*pair, client, accepted, *clients, alone):
        creds = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        print(creds, sock.getsockname(), sock.getpeername(), file=open("next", "a"))
    dumpable = os.stat("/proc/self/stat").st_uid
    print(os.getresuid(), os.getresgid(), os.getgroups(), dumpable, file=open("next", "a"))
    os.rename("next", "out")
    time.sleep(0.02)
"""


@pytest.fixture
def home() -> Iterator[Path]:
    top = Path(tempfile.mkdtemp(prefix="restore-peers-"))
    os.chown(top, UID, UID)
    yield top
    shutil.rmtree(top)


def test_peers_show_names_and_the_users_credentials(home: Path) -> None:
    child = subprocess.Popen(
        [_python(), "-c", PROGRAM, home], user=UID, group=UID, extra_groups=[], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: read(home / "out") != b"")
        captured = capture(child.pid, kill=True)
        kill_and_reap(child)
        before = read(home / "out")
        assert before.count(b"(%d, %d, %d)" % (child.pid, UID, UID)) == 7
        (home / "out").unlink()
        for left in home.glob("next"):
            left.unlink()
        restore(captured, options=RestoreOptions(wait_for_ids_s=20))
        wait_for(lambda: read(home / "out").count(b"\n") == before.count(b"\n"))
        assert read(home / "out") == before
    finally:
        kill_and_reap(child if child.poll() is None else child.pid)
