# SPDX-License-Identifier: Apache-2.0
"""Root restores a user's process: the user gets nothing by it that he could not have had himself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpointd.errors import RestoreConflict
from checkpointd.restore.reopen import Opener, as_process, has_more_rights
from checkpointd.restore.restorer import RestoreOptions
from checkpointd.state.files import FilesOptions
from checkpointd.state.memory import FileIdentity
from checkpointd.state.threads import Credentials
from checkpointd.tracepoint import clear, register
from tests.programs.restore_harness import Captured, capture, kill_and_reap, restore, wait_gone

pytestmark = pytest.mark.needs("root", "ptrace", "set_tid")
UID = 65534
SECRET = b"only root may read this\n"
PROGRAM = """
import os, sys, time
os.chdir(sys.argv[1])
log = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
data = os.open("data", os.O_RDONLY)
out = os.open("out", os.O_WRONLY | os.O_CREAT, 0o644)
inner = os.open("inner", os.O_RDONLY | os.O_DIRECTORY)
while True:
    os.write(log, b"tick\\n")
    seen = os.pread(data, 100, 0)
    os.ftruncate(out, 0)
    os.pwrite(out, seen + " ".join(os.listdir(inner)).encode(), 0)
    time.sleep(0.02)
"""


def _python() -> str:
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        try:
            subprocess.run([path, "-c", "1"], user=UID, group=UID, extra_groups=[], check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return path
    pytest.skip("no Python that another user may run")


class Home:
    """A directory of the user's, and one of root's with a secret in it."""

    def __init__(self, top: Path) -> None:
        self.user, self.root = top / "user", top / "root"
        self.user.mkdir()
        self.root.mkdir(mode=0o700)
        (self.user / "inner").mkdir()
        (self.user / "data").write_bytes(b"harmless")
        self.secret = self.root / "secret"
        self.secret.write_bytes(SECRET)
        self.secret.chmod(0o600)
        for path in (self.user, self.user / "inner", self.user / "data"):
            os.chown(path, UID, UID)

    def replace(self, name: str, content: bytes, *, owner: int, mode: int) -> None:
        """Another file of that name, with the times of the old one."""
        path = self.user / name
        old, new = path.stat(), path.with_name("new")
        new.write_bytes(content)
        os.chown(new, owner, owner)
        new.chmod(mode)
        os.utime(new, ns=(old.st_atime_ns, old.st_mtime_ns))
        new.rename(path)
        assert path.stat().st_ino != old.st_ino


@pytest.fixture
def home() -> Iterator[Home]:
    top = Path(tempfile.mkdtemp(prefix="restore-rights-"))
    top.chmod(0o755)
    yield Home(top)
    shutil.rmtree(top)


@pytest.fixture
def killed(home: Home) -> Iterator[Captured]:
    """The state of a program of the user's that is dead now."""
    child = subprocess.Popen(
        [_python(), "-c", PROGRAM, home.user], user=UID, group=UID, extra_groups=[], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: read(home.user / "out") == b"harmless")
        captured = capture(child.pid, kill=True)
        kill_and_reap(child)
        yield captured
    finally:
        kill_and_reap(child if child.poll() is None else child.pid)


def read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_refused(captured: Captured, *words: str, changed: str = "allow") -> None:
    options = RestoreOptions(files=FilesOptions(changed=changed), wait_for_ids_s=20)  # type: ignore[arg-type]
    with pytest.raises(RestoreConflict) as refusal:
        restore(captured, options=options)
    text = "; ".join(refusal.value.details["conflicts"])
    for word in words:
        assert word in text
    assert not os.path.exists(f"/proc/{captured.state.process.pid}")


def assert_works(captured: Captured, home: Home, content: bytes, **options: str) -> None:
    before = (home.user / "log").stat().st_size
    allowed = RestoreOptions(files=FilesOptions(**options), wait_for_ids_s=20)  # type: ignore[arg-type]
    restore(captured, options=allowed)
    wait_for(lambda: (home.user / "log").stat().st_size > before and read(home.user / "out") == content)


def test_it_comes_back(killed: Captured, home: Home) -> None:
    assert_works(killed, home, b"harmless")


@pytest.mark.parametrize("name", ["log", "data"])
def test_a_link_to_a_file_of_roots_is_refused(killed: Captured, home: Home, name: str) -> None:
    (home.user / name).unlink()
    (home.user / name).symlink_to(home.secret)
    assert_refused(killed, f"{home.user}/{name} leads through a symbolic link")
    assert home.secret.read_bytes() == SECRET


def test_a_linked_directory_on_the_way_is_refused(killed: Captured, home: Home) -> None:
    for name in ("log", "data", "out"):
        (home.root / name).write_bytes(SECRET)
        (home.root / name).chmod(0o600)
    (home.root / "inner").mkdir()
    home.user.rename(home.user.with_name("moved"))
    home.user.symlink_to(home.root)
    assert_refused(
        killed, f"{home.user} leads through", "log leads through", "data leads through", "out leads through"
    )
    assert (home.root / "log").read_bytes() == SECRET


def test_a_directory_made_a_link_after_the_check_is_refused(killed: Captured, home: Home) -> None:
    """The last moment: everything is open, and the process goes to its working directory."""

    def late(name: str) -> None:
        home.user.rename(home.user.with_name("moved"))
        home.user.symlink_to(home.root)

    register("restore.memory", late)
    try:
        with pytest.raises(RestoreConflict, match=f"{home.user} leads to {home.root} now"):
            restore(killed)
    finally:
        clear()
    wait_gone(killed.state.process.pid)


@pytest.mark.parametrize("name", ["log", "data"])
def test_a_file_of_roots_in_its_place_is_refused(killed: Captured, home: Home, name: str) -> None:
    """As a hard link would, or a file of root's that was moved there; with the size and time of the dump."""
    size = (home.user / name).stat().st_size
    home.replace(name, b"s" * size, owner=0, mode=0o600)
    assert_refused(killed, name, f"user {UID}) may not open")
    assert (home.user / name).read_bytes() == b"s" * size


def test_an_inode_number_used_again_by_root_is_refused(killed: Captured, home: Home) -> None:
    os.chown(home.user / "data", 0, 0)
    (home.user / "data").chmod(0o600)
    assert_refused(killed, "data", "may not open")


def test_a_directory_of_roots_in_its_place_is_refused(killed: Captured, home: Home) -> None:
    (home.user / "inner").rename(home.user / "old")
    (home.user / "inner").mkdir(mode=0o700)
    (home.user / "inner" / "name").touch()
    assert_refused(killed, "inner", "may not open")


def test_a_fifo_in_its_place_is_never_opened(killed: Captured, home: Home) -> None:
    (home.user / "log").unlink()
    os.mkfifo(home.user / "log")
    assert_refused(killed, "log is no regular file")


def test_a_log_rotated_by_its_owner_works(killed: Captured, home: Home) -> None:
    home.replace("log", b"", owner=UID, mode=0o644)
    assert_works(killed, home, b"harmless")


def test_a_file_of_roots_that_anybody_may_read_works(killed: Captured, home: Home) -> None:
    home.replace("data", b"public!!", owner=0, mode=0o444)
    assert_works(killed, home, b"public!!")


def test_its_own_file_that_nobody_may_open_is_still_its_own(killed: Captured, home: Home) -> None:
    (home.user / "data").chmod(0)
    assert_works(killed, home, b"harmless")


def test_all_reasons_come_together(killed: Captured, home: Home) -> None:
    home.replace("log", b"", owner=0, mode=0o600)
    (home.user / "data").unlink()
    (home.user / "out").unlink()
    (home.user / "out").symlink_to(home.secret)
    assert_refused(killed, "log", "may not open", "data is gone", "out leads through a symbolic link")


# ---- by itself

ROOT = Credentials(0, 0, 0, 0, 0, 0, 0, 0, (), 0, (1 << 41) - 1, (1 << 41) - 1, (1 << 41) - 1, 0)
USER = Credentials(UID, UID, UID, UID, UID, UID, UID, UID, (), 0, 0, 0, 0, 0)


def test_a_thread_takes_the_place_of_the_process_and_nobody_else_does(home: Home) -> None:
    def look() -> tuple[bool, str, str]:
        with open("/proc/thread-self/status") as status:
            lines = dict(line.rstrip("\n").split(":\t", 1) for line in status)
        try:
            home.secret.read_bytes()
        except PermissionError:
            return False, lines["Uid"], lines["CapEff"]
        return True, lines["Uid"], lines["CapEff"]

    before = os.stat("/proc/self").st_uid
    assert as_process(USER, ROOT, look) == (False, f"0\t0\t0\t{UID}", "0" * 16)
    assert home.secret.read_bytes() == SECRET
    assert os.stat("/proc/self").st_uid == before


def test_groups_open_files(home: Home) -> None:
    shared = home.user / "shared"
    shared.write_bytes(b"x")
    shared.chmod(0o040)
    os.chown(shared, 0, 4711)
    member = Credentials(UID, UID, UID, UID, UID, UID, UID, UID, (4711,), 0, 0, 0, 0, 0)
    wanted = {"kind": 0o100000, "recorded": None, "what": "it"}
    os.close(Opener(theirs=member, ours=ROOT).open(str(shared), os.O_RDONLY, **wanted))
    with pytest.raises(RestoreConflict, match="may not open this one by itself"):
        Opener(theirs=USER, ours=ROOT).open(str(shared), os.O_RDONLY, **wanted)


def test_links_within_another_root_are_refused_and_cannot_leave_it(home: Home) -> None:
    (home.user / "link").symlink_to("data")
    opener = Opener(root=str(home.user))
    with pytest.raises(RestoreConflict, match="symbolic link"):
        opener.look(str(home.user / "link"))
    found = opener.stat(f"{home.user}/../../data")
    assert found is None or found.st_ino == (home.user / "data").stat().st_ino


def test_who_has_more_rights() -> None:
    assert has_more_rights(ROOT, USER)
    assert not has_more_rights(ROOT, ROOT)
    assert not has_more_rights(USER, USER)
    assert not has_more_rights(USER, ROOT) or USER.fsuid != ROOT.fsuid


def test_images_of_before_say_no_owner(home: Home) -> None:
    there = (home.user / "data").stat()
    identity = FileIdentity.of(str(home.user / "data"), there)
    assert identity.uid == UID and identity.mode == 0o644
    old = FileIdentity("/f", identity.dev, identity.inode, 8, 0)
    assert old.uid is None
    os.close(Opener(theirs=USER, ours=ROOT).open(
        str(home.user / "data"), os.O_RDONLY, kind=0o100000, recorded=old, what="it"
    ))  # fmt: skip
