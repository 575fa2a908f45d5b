# SPDX-License-Identifier: Apache-2.0
"""The directory: who may read it, what is refused, what is swept, what a listing shows."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from checkpointd.errors import (
    Busy,
    ImageDamaged,
    ImageNotFound,
    NotPermitted,
    StoreMissing,
    UsageError,
)
from checkpointd.image import files
from checkpointd.image.store import Store

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file to another user")


def commit(store, *, parent=None, fill=1, **meta):
    with store.begin(parent=parent) as builder:
        builder.add_pages(0, np.arange(5, dtype=np.uint64), np.full((5, 4096), fill, dtype=np.uint8))
        return builder.commit(meta=meta, state=b"")


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "deep" / "store", create=True)


def test_only_the_owner_may_read(tmp_path):
    old = os.umask(0)
    try:
        store = Store.open(tmp_path / "store", create=True)
        commit(store)
        builder = store.begin()
        builder.add_pages(0, np.arange(2, dtype=np.uint64), np.ones((2, 4096), dtype=np.uint8))
        for path, folders, names in os.walk(tmp_path / "store"):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
            for name in names:
                assert stat.S_IMODE(os.stat(f"{path}/{name}").st_mode) == 0o600, name
            for name in folders:
                assert stat.S_IMODE(os.stat(f"{path}/{name}").st_mode) == 0o700, name
        builder.abort()
    finally:
        os.umask(old)


@pytest.mark.parametrize("kind", ["directory", "link", "unreadable disk"])
def test_an_image_file_that_cannot_be_opened_is_listed_as_damaged(store, kind, monkeypatch):
    """The others can be used, and new ones made."""
    whole = commit(store)
    name = f"{'ab' * 32}.img"
    path = f"{store.path}/images/{name}"
    if kind == "directory":
        os.mkdir(path)
    elif kind == "link":
        os.symlink("elsewhere", path)
    else:
        with open(path, "wb"):
            pass
        real = files.open_file

        def fails(asked, dir_fd):
            if asked == name:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(asked, dir_fd)

        monkeypatch.setattr(files, "open_file", fails)
    listed = {info.id: info.damaged for info in store.images()}
    assert listed[whole.id] == ""
    assert "cannot be opened" in listed["ab" * 32] or "Is a directory" in listed["ab" * 32]
    assert store.load(whole.id).info == whole
    assert commit(store, fill=2).sequence == whole.sequence + 1


def test_a_store_without_its_configuration_is_not_made_anew(store):
    """Its images could not be verified with another seed."""
    commit(store)
    config = Path(store.path, "store.json").read_bytes()
    os.unlink(f"{store.path}/store.json")
    with pytest.raises(ImageDamaged, match=r"lost its store\.json"):
        Store.open(store.path, create=True)
    assert not os.path.exists(f"{store.path}/store.json")
    Path(store.path, "store.json").write_bytes(config)
    assert len(Store.open(store.path).images()) == 1


@pytest.mark.parametrize(
    "meta", [{"pid": 10**12}, {"pid": -1}, {"start_time": 1 << 70}, {"cmdline": "x" * 100_000}, {"pid": True}]
)
def test_what_a_meta_says_is_kept_within_bounds(store, meta):
    """It may come from anywhere: a listing must go on."""
    info = commit(store, **meta)
    assert (info.pid, info.start_time) == (0, 0)
    assert len(info.cmdline) <= 4096


def test_an_open_door_is_closed(store):
    os.chmod(store.path, 0o755)
    Store.open(store.path)
    assert stat.S_IMODE(os.stat(store.path).st_mode) == 0o700


@needs_root
def test_the_store_of_another_user_is_refused(store):
    os.chown(store.path, 12345, 12345)
    with pytest.raises(NotPermitted, match="12345"):
        Store.open(store.path)


def test_what_is_not_a_store(tmp_path):
    with pytest.raises(StoreMissing):
        Store.open(tmp_path / "nothing")
    with pytest.raises(StoreMissing):
        Store.open(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    for create in (False, True):
        with pytest.raises(StoreMissing):
            Store.open(file, create=create)
    with pytest.raises(StoreMissing, match="not empty"):
        Store.open(tmp_path, create=True)
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_opening_again_changes_nothing(store):
    info = commit(store)
    again = Store.open(store.path, create=True)
    assert (again.id, again.digest_seed) == (store.id, store.digest_seed)
    assert again.images() == [info]


def test_many_creators_make_one_store(tmp_path):
    stores = []
    barrier = threading.Barrier(6)

    def work():
        barrier.wait()
        stores.append(Store.open(tmp_path / "store", create=True))

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({(store.id, store.digest_seed) for store in stores}) == 1
    assert len(stores) == 6


def test_two_stores_have_two_seeds(tmp_path):
    one, two = (Store.open(tmp_path / name, create=True) for name in "ab")
    assert one.digest_seed != two.digest_seed
    parent = one.load(commit(one).id)
    with pytest.raises(ValueError, match="another store"):
        two.begin(parent=parent)


def test_a_store_without_its_folders_is_damaged(store):
    os.rmdir(f"{store.path}/tmp")
    with pytest.raises(ImageDamaged):
        Store.open(store.path)


def test_listing_is_in_the_order_of_commit_whatever_the_clock_says(store):
    created = ["2030-01-01T00:00:00Z", "1999-01-01T00:00:00Z", "2010-01-01T00:00:00Z"]
    ids = [
        commit(store, fill=n + 1, created=time, pid=n, comm="c", tag=f"t{n}").id
        for n, time in enumerate(created)
    ]
    infos = store.images()
    assert [info.id for info in infos] == ids
    assert [info.created for info in infos] == created
    assert [info.sequence for info in infos] == [1, 2, 3]
    assert store.resolve("latest") == ids[2]
    assert store.resolve("latest~1") == ids[1]
    assert store.resolve("tag:t0") == ids[0]
    assert store.resolve("pid:1") == ids[1]
    assert store.info(ids[1]) == infos[1]


def test_sizes_are_those_on_disk(store):
    info = commit(store, fill=3)
    on_disk = sum(
        os.path.getsize(f"{store.path}/{folder}/{name}")
        for folder in ("images", "packs")
        for name in os.listdir(f"{store.path}/{folder}")
    )
    assert info.bytes_stored == on_disk
    assert (info.bytes_raw, info.nr_pages) == (5 * 4096, 5)


@pytest.mark.parametrize("name", ["../x", "", "abcd", "A" * 64, "0" * 63 + "/", "0" * 64 + "\n"])
def test_only_full_ids_reach_the_files(store, name):
    for action in (store.load, store.remove, store.verify, store.info):
        with pytest.raises(UsageError):
            action(name)


def test_what_is_not_there(store):
    for action in (store.load, store.remove, store.verify, store.info):
        with pytest.raises(ImageNotFound):
            action("0" * 64)
    with pytest.raises(ImageNotFound):
        store.resolve("latest")


def test_a_symbolic_link_is_not_followed(store, tmp_path):
    info = commit(store)
    os.rename(f"{store.path}/images/{info.id}.img", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", f"{store.path}/images/{info.id}.img")
    with pytest.raises(NotPermitted):
        store.load(info.id)


def test_abort_and_leaving_leave_nothing(store):
    for leave in ("abort", "error", "nothing"):
        try:
            with store.begin() as builder:
                builder.add_pages(0, np.arange(300, dtype=np.uint64), np.ones((300, 4096), dtype=np.uint8))
                assert len(os.listdir(f"{store.path}/tmp")) == 1
                if leave == "abort":
                    builder.abort()
                if leave == "error":
                    raise RuntimeError
        except RuntimeError:
            pass
        assert os.listdir(f"{store.path}/tmp") == []
        assert os.listdir(f"{store.path}/packs") == []
        with pytest.raises(ValueError, match="already"):
            builder.commit(meta={}, state=b"")
    assert store.images() == []


def test_a_living_builder_is_not_swept(store):
    builder = store.begin()
    builder.add_pages(0, np.arange(5, dtype=np.uint64), np.ones((5, 4096), dtype=np.uint8))
    assert store.prune() == 0
    commit(store, fill=9)
    info = builder.commit(meta={}, state=b"")
    assert store.verify(info.id).ok


def test_rubbish_in_tmp_and_packs_is_swept(store):
    info = commit(store)
    os.mkdir(f"{store.path}/tmp/dead")
    for name in ("tmp/dead/0.pack", "tmp/file", "packs/" + "0" * 64 + ".pack"):
        with open(f"{store.path}/{name}", "w") as file:
            file.write("x")
    with store.begin():
        assert len(os.listdir(f"{store.path}/tmp")) == 1
    assert len(os.listdir(f"{store.path}/packs")) == 1
    assert store.verify(info.id).ok


def test_a_locked_store_is_busy(store, monkeypatch):
    commit(store)
    monkeypatch.setattr(files, "LOCK_TIMEOUT_S", 0.05)
    with open(f"{store.path}/lock", "r+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(Busy):
            store.begin()
        with pytest.raises(Busy):
            store.load(store.images()[0].id)
    store.load(store.images()[0].id)


def test_a_read_only_store_says_so(store, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(NotPermitted, match="Read-only"):
        store.begin()


def test_meta_must_be_json_and_of_sane_size(store):
    for meta in ({"x": float("nan")}, {"x": "y" * (2 << 20)}):
        with store.begin() as builder, pytest.raises(ValueError):
            builder.commit(meta=meta, state=b"")
    assert store.images() == []
    info = commit(store, cmdline=["a", "ü\n"], extra={"deep": [1, None]})
    assert store.load(info.id).meta["extra"] == {"deep": [1, None]}
    assert info.cmdline == "a ü\n"


BOOT = "0b7c4fbe-0000-4000-8000-000000000000"


def test_the_newest_image_of_a_process_or_the_one_it_was_restored_from(store):
    me = {"pid": 7, "start_time": 100, "boot_id": BOOT}
    assert store.latest_of(**me) == ""
    origin = commit(store, pid=7, start_time=50, boot_id=BOOT)
    assert store.latest_of(**me) == ""
    store.note_restored(**me, image_id=origin.id)
    assert Store.open(store.path).latest_of(**me) == origin.id
    assert store.latest_of(7, 101, BOOT) == store.latest_of(7, 100, BOOT.replace("b", "c")) == ""
    own = [commit(store, fill=fill, pid=7, start_time=100, boot_id=BOOT).id for fill in (2, 3)]
    commit(store, fill=4, pid=8, start_time=100, boot_id=BOOT)
    assert store.latest_of(**me) == own[-1]
    store.remove(own[-1])
    store.remove(own[0])
    assert store.latest_of(**me) == origin.id
    store.remove(origin.id)
    assert store.latest_of(**me) == ""


def test_notes_of_processes_that_cannot_be_any_more_go(store):
    image = commit(store).id
    folder = f"{store.path}/restored"
    store.note_restored(7, 100, "another-boot", image)
    store.note_restored(7, 100, BOOT, image)
    store.note_restored(70, 100, BOOT, image)
    store.note_restored(7, 200, BOOT, image)
    store.note_restored(7, 200, BOOT, image)  # told twice
    assert sorted(os.listdir(folder)) == [f"{BOOT}.7.200", f"{BOOT}.70.100"]
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


def test_a_note_that_names_no_image_is_nobody_s_parent(store):
    store.note_restored(7, 100, BOOT, "../../../etc/passwd")
    assert store.latest_of(7, 100, BOOT) == ""


READ_EVERYTHING = """
import sys
from checkpointd.image.store import Store
store = Store.open(sys.argv[1])
(info,) = store.images()
assert store.load(info.id).info == info
assert not store.verify(info.id).problems
try:
    store.remove(info.id)
except Exception as error:
    print(type(error).__name__)
"""


@needs_root
def test_a_store_that_is_mounted_read_only_can_be_read(store):
    commit(store)
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$0" -c "$2" "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, sys.executable, store.path, READ_EVERYTHING],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "NotPermitted\n"), done.stderr
    assert len(store.images()) == 1
