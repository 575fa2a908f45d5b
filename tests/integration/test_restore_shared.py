# SPDX-License-Identifier: Apache-2.0
"""Shared memory that outlives its process by name: judged like files, and changed by no refused restore."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointd.errors import RestoreConflict
from checkpointd.linux import sysv
from checkpointd.restore.restorer import RestoreOptions
from checkpointd.state.files import FilesOptions
from tests.integration.test_restore_rights import SECRET, UID, _python, wait_for
from tests.programs.restore_harness import Captured, capture, kill_and_reap, restore

pytestmark = pytest.mark.needs("root", "ptrace", "set_tid")
SIZE = 8192
PROGRAM = """
import ctypes, mmap, os, struct, sys, time
os.chdir("/")
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o640)
os.fchmod(fd, 0o640)
os.ftruncate(fd, 8192)
shared = mmap.mmap(fd, 8192)
os.close(fd)
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(int(sys.argv[2]), 4096, 0o1640)
at = libc.shmat(segment, None, 0)
data = os.open(sys.argv[3], os.O_RDONLY)
public = os.open(os.path.dirname(sys.argv[3]) + "/public", os.O_RDONLY)
shown = mmap.mmap(public, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
shared[4096:4100] = b"deep"
number = 0
while True:
    number += 1
    shared[:8] = struct.pack("q", number)
    ctypes.memmove(at, struct.pack("q", number), 8)
    time.sleep(0.01)
"""


class Lab:
    """A directory of the user's on a tmpfs, and one of root's beside it."""

    def __init__(self, top: Path, key: int) -> None:
        self.user, self.root, self.key = top / "user", top / "root", key
        self.user.mkdir()
        self.root.mkdir(mode=0o700)
        self.data = self.user / "data"
        self.data.write_bytes(b"harmless")
        self.file = self.user / "file"
        self.public = self.user / "public"  # of root's, for all to read
        self.public.write_bytes(b"then".ljust(4096))
        for path in (self.user, self.data):
            os.chown(path, UID, UID)

    def number(self) -> int:
        if not self.file.exists() or self.file.stat().st_size < 8:
            return 0
        with self.file.open("rb") as file:
            found: int = struct.unpack("q", file.read(8))[0]
        return found


@pytest.fixture
def lab() -> Iterator[Lab]:
    top = Path(tempfile.mkdtemp(prefix="restore-shared-", dir="/dev/shm"))
    top.chmod(0o755)
    key = 0x5EC0_0000 | os.getpid() & 0xFFFF
    yield Lab(top, key)
    shutil.rmtree(top)
    for shmid, segment in sysv.segments().items():
        if segment.key == key:
            sysv.remove(shmid)


@pytest.fixture
def killed(lab: Lab) -> Iterator[Captured]:
    child = subprocess.Popen(
        [_python(), "-c", PROGRAM, lab.file, str(lab.key), lab.data],
        user=UID, group=UID, extra_groups=[], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: lab.number() > 2)
        captured = capture(child.pid, kill=True)
        kill_and_reap(child)
        yield captured
    finally:
        kill_and_reap(child if child.poll() is None else child.pid)


def refused(captured: Captured, *, changed: str = "refuse") -> str:
    options = RestoreOptions(files=FilesOptions(changed=changed), wait_for_ids_s=20)  # type: ignore[arg-type]
    with pytest.raises(RestoreConflict) as refusal:
        restore(captured, options=options)
    assert not os.path.exists(f"/proc/{captured.state.process.pid}")
    return "; ".join(refusal.value.details["conflicts"])


def comes_back(captured: Captured, lab: Lab, **files: str) -> list[str]:
    """Warnings."""
    before = lab.number()
    options = RestoreOptions(files=FilesOptions(**files), wait_for_ids_s=20)  # type: ignore[arg-type]
    found = restore(captured, options=options)
    first = lab.number()
    wait_for(lambda: lab.number() > max(first, before) + 2)
    kill_and_reap(found.pid)
    return found.warnings


def test_what_the_program_wrote_later_is_not_lost_unasked(killed: Captured, lab: Lab) -> None:
    comes_back(killed, lab)
    number = lab.number()
    assert "was written since the dump" in refused(killed)
    assert lab.number() == number
    comes_back(killed, lab, changed="allow")
    assert lab.file.read_bytes()[4096:4100] == b"deep"


def test_what_a_restore_wrote_is_no_change(killed: Captured, lab: Lab) -> None:
    """A program that comes back stopped writes nothing itself."""
    stopped = dataclasses.replace(killed.state.process, stopped=True)
    captured = dataclasses.replace(killed, state=dataclasses.replace(killed.state, process=stopped))
    for _ in range(2):
        found = restore(captured)
        kill_and_reap(found.pid)


def test_a_link_is_refused_and_what_it_leads_to_is_whole(killed: Captured, lab: Lab) -> None:
    target = lab.root / "file"
    target.write_bytes(SECRET)
    lab.user.rename(lab.user.with_name("moved"))
    lab.user.symlink_to(lab.root)
    assert "file leads through a symbolic link" in refused(killed, changed="allow")
    assert target.read_bytes() == SECRET


def test_a_file_of_roots_is_refused_and_whole(killed: Captured, lab: Lab) -> None:
    lab.file.unlink()
    lab.file.write_bytes(SECRET)
    lab.file.chmod(0o600)
    assert "may not open" in refused(killed, changed="allow")
    assert lab.file.read_bytes() == SECRET


@pytest.mark.parametrize("size", [5, SIZE * 2])
def test_a_changed_file_is_refused_and_whole(killed: Captured, lab: Lab, size: int) -> None:
    with lab.file.open("r+b") as file:
        file.truncate(size)
    content = lab.file.read_bytes()
    assert f"has {size} bytes instead of {SIZE}" in refused(killed)
    assert lab.file.read_bytes() == content
    assert any("overwritten from the image" in one for one in comes_back(killed, lab, changed="allow"))
    assert lab.file.read_bytes()[4096:4100] == b"deep"


def test_a_written_file_is_refused_and_whole(killed: Captured, lab: Lab) -> None:
    with lab.file.open("r+b") as file:
        file.seek(100)
        file.write(b"new")
    content = lab.file.read_bytes()
    assert "was written since the dump" in refused(killed)
    assert lab.file.read_bytes() == content


def test_another_conflict_leaves_it_as_it_is(killed: Captured, lab: Lab) -> None:
    """Also where changes are allowed: nothing is touched before all is known."""
    lab.data.unlink()
    with lab.file.open("r+b") as file:
        file.truncate(5)
    before = lab.file.read_bytes(), lab.file.stat().st_mtime_ns
    assert "data is gone" in refused(killed, changed="allow")
    assert (lab.file.read_bytes(), lab.file.stat().st_mtime_ns) == before
    lab.file.unlink()
    refused(killed, changed="allow")
    assert not lab.file.exists()


def test_a_file_made_again_has_its_owner_and_permissions(killed: Captured, lab: Lab) -> None:
    lab.file.unlink()
    assert any("made again" in one for one in comes_back(killed, lab))
    there = lab.file.stat()
    assert (there.st_uid, there.st_gid, there.st_mode & 0o7777) == (UID, UID, 0o640)
    assert lab.file.read_bytes()[4096:4100] == b"deep"


def test_a_file_it_can_only_read_is_never_written(killed: Captured, lab: Lab) -> None:
    with lab.public.open("r+b") as file:
        file.write(b"now.")
    assert "public was written since the dump" in refused(killed)
    assert any("public was written since the dump; left as it is" in one for one in comes_back(
        killed, lab, changed="allow"
    ))  # fmt: skip
    assert lab.public.read_bytes() == b"now.".ljust(4096)
    assert lab.public.stat().st_uid == 0


def test_a_directory_on_another_file_system_is_refused(killed: Captured, lab: Lab) -> None:
    other = Path(tempfile.mkdtemp(prefix="restore-shared-"))
    try:
        if subprocess.run(["mount", "--bind", other, lab.user], check=False, capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        if subprocess.run(["stat", "-fc", "%T", other], capture_output=True, text=True).stdout == "tmpfs\n":
            pytest.skip("the directory for temporary files is on a tmpfs")
        try:
            found = refused(killed, changed="allow")
            assert f"{lab.user}, where shared memory was, is on no tmpfs any more" in found
            assert not lab.file.exists()
            lab.file.write_bytes(SECRET)
            os.chown(lab.file, UID, UID)
            lab.file.chmod(0o640)
            assert "on no tmpfs any more" in refused(killed, changed="allow")
            assert lab.file.read_bytes() == SECRET
        finally:
            subprocess.run(["umount", lab.user], check=True)
    finally:
        shutil.rmtree(other)


def _segment(lab: Lab) -> int:
    return next(shmid for shmid, one in sysv.segments().items() if one.key == lab.key)


def _first_bytes(shmid: int) -> bytes:
    at = sysv.attach(shmid)
    try:
        return ctypes.string_at(at, 8)
    finally:
        sysv.detach(at)


def test_a_segment_that_is_roots_now_is_refused_and_whole(killed: Captured, lab: Lab) -> None:
    shmid = _segment(lab)
    sysv.set_owner(shmid, 0, 0, 0o600)
    before = _first_bytes(shmid)
    assert "has another owner" in refused(killed, changed="allow")
    assert _first_bytes(shmid) == before


def test_a_segment_of_another_size_under_its_key_is_refused(killed: Captured, lab: Lab) -> None:
    sysv.remove(_segment(lab))
    other = sysv.create(lab.key, 12288, 0o600, 0)
    assert f"belongs to segment {other}" in refused(killed, changed="allow")
    assert sysv.segments()[other].size_bytes == 12288


def test_a_segment_made_again_has_its_owner_and_permissions(killed: Captured, lab: Lab) -> None:
    sysv.remove(_segment(lab))
    comes_back(killed, lab)
    found = sysv.segments()[_segment(lab)]
    assert (found.uid, found.gid, found.mode & 0o777) == (UID, UID, 0o640)
