# SPDX-License-Identifier: Apache-2.0
"""Memory of hugetlb pools comes back; no dump takes a page from the pool, and no restore more than there were."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointd.dump.dump import Dumper, DumpOptions
from checkpointd.errors import RestoreConflict, Unsupported
from checkpointd.image.store import Store
from checkpointd.linux import sysv
from checkpointd.linux.hugetlb import MAP_HUGETLB
from checkpointd.memory import PAGE_SIZE
from checkpointd.procfs import process
from checkpointd.restore import restorer
from checkpointd.restore.restorer import Restored, RestoreOptions, restore_process
from checkpointd.restore.stub import StepFailedError, Stub
from checkpointd.state import codec
from checkpointd.state.process import ImageState
from checkpointd.stats import DumpStats
from demo.command import Checkpoint, CommandFailed
from tests.huge_pool import HUGE, HugeTarget, pages_for_tests, pool
from tests.programs.restore_harness import wait_gone

pytestmark = pytest.mark.needs("root", "ptrace", "set_tid")

POOL_PAGES = 20
PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2


class Lab:
    """A target, dumped by the backend of choice into a store of its own."""

    def __init__(self, directory: Path) -> None:
        self.store = Store.open(directory / "store", create=True)
        self.options = {"store": str(directory / "store")}
        self.target = HugeTarget(directory)
        self.dumper: Dumper | None = None
        self.numbers: dict[str, int] = {}

    def dump(self, **options: object) -> DumpStats:
        self.target("0")
        if self.dumper is None:
            self.dumper = Dumper(self.target.pid)
        stats = self.dumper.dump(DumpOptions(**{**self.options, **options}))  # type: ignore[arg-type]
        self.numbers[stats.image_id] = self.target.number
        return stats

    def kill(self) -> None:
        if self.dumper is not None:
            self.dumper.close()
            self.dumper = None
        self.target.kill()

    def restore(self, image_id: str) -> Restored:
        image = self.store.load(image_id)
        state = codec.decode(ImageState, json.loads(image.state))

        def arm(stub: Stub) -> None:
            self.dumper = Dumper(stub.pid)
            self.dumper.arm_restored(stub, image_id)

        self.target.goes_back(self.numbers[image_id])
        return restore_process(image, state, options=RestoreOptions(before_release=arm))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with pages_for_tests(POOL_PAGES):
        made = Lab(tmp_path)
        yield made
        made.kill()


@pytest.mark.parametrize("backend", ["auto", "content"])
def test_private_pages_come_back_generation_by_generation(lab: Lab, backend: str) -> None:
    target = lab.target
    target("hold('a', 8, PRIVATE)")
    for page, value in ((0, 1), (1, 2), (3, 3), (5, 0)):
        target(f"put('a', {page}, {value})")
    assert process.nr_pool_pages(target.pid) == 4 * HUGE // PAGE_SIZE
    first = lab.dump(backend=backend)
    then = [target(f"get('a', {page})") for page in (0, 1, 3, 5)]
    target("put('a', 1, 77, 9)")
    target("good(libc.madvise(at('a', 3), HUGE, 4))")  # MADV_DONTNEED
    target("put('a', 6, 6)")
    second = lab.dump(backend=backend, incremental=True)
    now = [target(f"get('a', {page})") for page in (0, 1, 5, 6)]
    assert second.pages_same >= 2 * HUGE // PAGE_SIZE - 1  # all of the first, all but 4 KiB of the second
    for stats, pages, want in ((second, {0, 1, 5, 6}, now), (first, {0, 1, 3, 5}, then)):
        lab.kill()
        assert lab.restore(stats.image_id).pid == target.pid
        assert target.present("a", 8) == pages
        assert [target(f"get('a', {page})") for page in sorted(pages)] == want
    target("put('a', 7, 9)")
    third = lab.dump(incremental=True)
    assert third.parent_id == first.image_id
    lab.kill()
    lab.restore(third.image_id)
    assert target.present("a", 8) == {0, 1, 3, 5, 7}
    assert [target(f"get('a', {page})") for page in (0, 1, 3, 5)] == then


@pytest.mark.parametrize("prot", [PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE])
def test_protection_and_missing_reservation_come_back(lab: Lab, prot: int) -> None:
    target = lab.target
    target("hold('a', 400, PRIVATE | NORESERVE)")  # far more than the pool has
    target("put('a', 399, 5)")
    target("put('a', 7, 0, 1)")
    shown = {0: "---p", 1: "r--p", 3: "rw-p"}[prot]
    want = target("get('a', 399)")
    target(f"good(libc.mprotect(at('a'), 400 * HUGE, {prot}))")
    stats = lab.dump()
    lab.kill()
    lab.restore(stats.image_id)
    assert target.present("a", 400) == {7, 399}
    lines = Path(f"/proc/{target.pid}/maps").read_text().splitlines()
    assert [line.split()[1] for line in lines if "anon_hugepage" in line] == [shown]
    assert target("good(libc.mprotect(at('a'), 400 * HUGE, 3)) or get('a', 399)") == want


def test_pieces_that_were_unmapped_and_moved(lab: Lab) -> None:
    target = lab.target
    target("hold('a', 6, PRIVATE)")
    for page in range(6):
        target(f"put('a', {page}, {page + 1})")
    want = [target(f"get('a', {page})") for page in range(6)]
    target("good(libc.munmap(ctypes.c_void_p(at('a', 2)), ctypes.c_size_t(HUGE)))")
    target("good(libc.mprotect(at('a', 4), HUGE, 1))")
    stats = lab.dump()
    lab.kill()
    lab.restore(stats.image_id)
    assert [target(f"get('a', {page})") for page in (0, 1, 3, 4, 5)] == [*want[:2], *want[3:]]


@pytest.mark.parametrize("read_mode", ["auto", "fork"])
def test_a_dump_takes_no_page_and_unshares_none(lab: Lab, read_mode: str) -> None:
    """Neither by a copy that is forked, nor by pinning what a relative maps too."""
    target = lab.target
    target("hold('a', 4, PRIVATE)")
    target("put('a', 1, 1)")
    child = target("family()")
    try:
        frames = target.frames("a", 4)
        stats = lab.dump(read_mode=read_mode)
        assert stats.read_mode == "stopped"
        assert target.frames("a", 4) == frames
        lab.dump(read_mode=read_mode, incremental=True)
        assert target.frames("a", 4) == frames
    finally:
        os.kill(child, 9)


MAKERS = {
    "anon": "hold('a', 8, SHARED)",
    "anon, nothing reserved": "hold('a', 8, SHARED | NORESERVE)",
    "memfd": "hold('a', 8, 1, fd=memfd(8))",
    "memfd, nothing reserved": "hold('a', 8, 1 | NORESERVE, fd=memfd(8))",
    "sysv": "libc.shmctl(segment('a', 8 * HUGE - 5000), 0, None)",  # IPC_RMID, once it is attached
}


@pytest.mark.parametrize("maker", list(MAKERS))
def test_shared_pages_come_back_and_holes_stay_holes(lab: Lab, maker: str) -> None:
    target = lab.target
    target(MAKERS[maker])
    for page, value in ((0, 1), (3, 3), (5, 0)):
        target(f"put('a', {page}, {value})")
    first = lab.dump()
    assert target("blocks('a', 8)") == 3  # reading took none
    then = [target(f"get('a', {page})") for page in (0, 3, 5)]
    target("put('a', 0, 77, 9)")
    target("good(libc.madvise(at('a', 3), HUGE, 9))")  # MADV_REMOVE
    target("put('a', 6, 6)")
    second = lab.dump(incremental=True)
    assert second.pages_same >= HUGE // PAGE_SIZE - 1
    now = [target(f"get('a', {page})") for page in (0, 5, 6)]
    for stats, pages, want in ((second, (0, 5, 6), now), (first, (0, 3, 5), then)):
        lab.kill()
        lab.restore(stats.image_id)
        assert target("blocks('a', 8)") == 3
        assert [target(f"get('a', {page})") for page in pages] == want
    child = target("family()")
    target("put('a', 1, 5)")
    os.kill(child, 9)
    third = lab.dump(incremental=True)
    assert third.pages_same >= 2 * HUGE // PAGE_SIZE


def test_what_the_target_has_not_mapped_itself_is_not_missed(lab: Lab) -> None:
    """Pages of a memfd that another process wrote, and of one that is held open only."""
    target = lab.target
    target("areas.update(fd=memfd(6), other=memfd(3)) or hold('a', 4, 1, fd=areas['fd'], offset=2 * HUGE)")
    target("put('a', 1, 4)")
    target("hold('b', 3, 1, fd=areas['other']) or put('b', 1, 8)")
    writer = "import mmap,os,sys; m = mmap.mmap(os.open(sys.argv[1], 2), 6 << 21); m[0] = m[5 << 21] = 9"
    path = target("f'/proc/{os.getpid()}/fd/' + str(areas['fd'])")
    subprocess.run([sys.executable, "-c", writer, path], check=True)
    want = target("get('a', 1)")
    target("good(libc.munmap(ctypes.c_void_p(at('b')), ctypes.c_size_t(3 * HUGE)))")
    stats = lab.dump(read_mode="fork")
    lab.kill()
    lab.restore(stats.image_id)
    assert target("get('a', 1)") == want
    assert target("os.pread(areas['fd'], 2, 0)[0], os.pread(areas['fd'], 2, 5 * HUGE)[0]") == [9, 9]
    assert target("os.pread(areas['other'], 3, HUGE) == bytes([8] * 3)")
    assert target("os.fstat(areas['fd']).st_blocks") == 3 * HUGE // 512
    assert target("os.fstat(areas['other']).st_blocks") == HUGE // 512
    assert target("os.readlink(f'/proc/self/fd/' + str(areas['fd']))").startswith("/memfd:huge")


def test_copies_on_write_of_a_memfd_are_kept_apart_from_it(lab: Lab) -> None:
    target = lab.target
    target("areas.update(fd=memfd(3)) or hold('s', 3, 1, fd=areas['fd']) or hold('p', 3, 2, fd=areas['fd'])")
    target("put('s', 0, 1) or put('s', 1, 2) or put('s', 2, 3)")
    target("put('p', 1, 7, 100) or get('p', 0)")  # a copy, and a look at the original
    target("put('p', 2, 0)")  # a copy of zeroes over what is not
    target("good(libc.mprotect(at('p'), 3 * HUGE, 1))")
    want = [target(f"get('{name}', {page})") for name in "sp" for page in range(3)]
    stats = lab.dump()
    lab.kill()
    lab.restore(stats.image_id)
    assert [target(f"get('{name}', {page})") for name in "sp" for page in range(3)] == want
    assert target("blocks('s', 3)") == 3
    target("put('s', 0, 99)")
    assert target("get('p', 0) == get('s', 0) and get('p', 1) != get('s', 1)")


@pytest.mark.parametrize("maker", ["memfd(2)", "os.memfd_create('small', 2)"])
def test_seals_come_back(lab: Lab, maker: str) -> None:
    target = lab.target
    target(f"areas.update(fd={maker}) or os.ftruncate(areas['fd'], 2 * HUGE)")
    target("hold('a', 2, 1, fd=areas['fd'])")
    target("put('a', 1, 6)")
    target("good(libc.munmap(ctypes.c_void_p(at('a')), ctypes.c_size_t(2 * HUGE)))")
    fcntl = "__import__('fcntl').fcntl(areas['fd'], {})"
    target(fcntl.format("1033, 1 | 2 | 4 | 8"))  # F_ADD_SEALS: SEAL, SHRINK, GROW, WRITE
    stats = lab.dump()
    lab.kill()
    lab.restore(stats.image_id)
    assert target(fcntl.format("1034")) & 15 == 15
    assert target("os.pread(areas['fd'], 3, HUGE) == bytes([6] * 3)")


def test_a_segment_that_outlives_its_process_is_filled_again(lab: Lab) -> None:
    target = lab.target
    shmid = target("segment('a', 4 * HUGE)")
    try:
        target("put('a', 1, 6)")
        target("good(libc.munmap(ctypes.c_void_p(at('a', 2)), ctypes.c_size_t(HUGE)))")
        want = target("get('a', 1)")
        stats = lab.dump()
        target("put('a', 1, 7)")
        target("put('a', 3, 7)")
        lab.kill()
        lab.restore(stats.image_id)
        assert target("get('a', 1)") == want
        assert target("blocks('a', 2)") == 1  # what was written since is gone, and takes no page
        assert target("get('a', 3) == hashlib.sha256(bytes(HUGE)).hexdigest()")
    finally:
        lab.kill()
        sysv.remove(shmid)


@pytest.fixture
def taken() -> Iterator[list[mmap.mmap]]:
    """Somebody else's mappings."""
    areas: list[mmap.mmap] = []
    yield areas
    for area in areas:
        area.close()


def take_all(areas: list[mmap.mmap], left: int = 0) -> None:
    now = pool()
    areas.append(
        mmap.mmap(
            -1,
            (now.free - now.reserved - left) * HUGE,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB,
        )
    )


def test_restore_is_refused_while_the_pool_is_empty(tmp_path: Path, taken: list[mmap.mmap]) -> None:
    command = Checkpoint(tmp_path)
    with pages_for_tests(POOL_PAGES):
        target = HugeTarget(tmp_path)
        try:
            target("hold('a', 4, PRIVATE)")
            target("put('a', 1, 1)")
            want = target("get('a', 1)")
            image = command.dump(target.pid)["image_id"]
            target.kill()
            take_all(taken, left=1)
            before = pool()
            with pytest.raises(CommandFailed) as refusal:
                command.restore(image)
            assert refusal.value.code == 8
            words = "huge pages of 2048 KiB are missing: the process needs 4, and the pool can give"
            assert words in str(refusal.value)
            assert f"> {before.control}`" in str(refusal.value)
            wait_gone(target.pid)
            taken.pop().close()
            assert command.restore(image)["pid"] == target.pid
            assert target("get('a', 1)") == want
        finally:
            command.close()
            target.kill()


@pytest.mark.parametrize("flags", ["PRIVATE", "PRIVATE | NORESERVE", "SHARED", "SHARED | NORESERVE"])
def test_a_pool_that_runs_empty_in_the_middle_leaves_nothing(
    lab: Lab, taken: list[mmap.mmap], flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = lab.target
    target(f"hold('a', 4, {flags})")
    for page in range(4):
        target(f"put('a', {page}, 1)")
    image = lab.dump().image_id
    lab.kill()
    roomy = {HUGE: pool()}
    take_all(taken, left=2)
    monkeypatch.setattr(restorer, "read_pools", lambda: roomy)
    with pytest.raises((RestoreConflict, StepFailedError)) as refusal:
        lab.restore(image)
    words = "has become empty" if "NORESERVE" in flags else "Cannot allocate memory"
    assert words in refusal.value.message
    wait_gone(target.pid)


def test_pages_of_one_gigabyte(tmp_path: Path) -> None:
    size = 1 << 30
    with pages_for_tests(1, size):
        lab = Lab(tmp_path)
        try:
            target = lab.target
            target("hold('a', 1, PRIVATE | 30 << 26, size=1 << 30)")
            target("put('a', 300, 5, 4096)")
            stats = lab.dump()
            lab.kill()
            before = pool(size)
            lab.restore(stats.image_id)
            assert pool(size).free == before.free - 1
            assert target("ctypes.string_at(at('a', 300), 4097)[-2:] == bytes([5, 0])")
        finally:
            lab.kill()


def test_a_file_on_a_hugetlbfs_is_refused_in_one_sentence(lab: Lab, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "hugetlbfs", "none", mount], check=False).returncode:
        pytest.skip("no hugetlbfs can be mounted")
    try:
        lab.target(f"hold('a', 1, 1, fd=os.open({str(mount / 'file')!r}, os.O_RDWR | os.O_CREAT))")
        with pytest.raises(Unsupported, match=r"is of a file on a mounted hugetlbfs, which is not saved"):
            lab.dump()
    finally:
        lab.kill()
        subprocess.run(["umount", mount], check=True)
