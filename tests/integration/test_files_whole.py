# SPDX-License-Identifier: Apache-2.0
"""A program with every kind of file open: dumped for real, killed, restored, and checking itself."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpointd.dump.dump import Dumper, DumpOptions
from checkpointd.image.store import Store
from checkpointd.memory import FILE_CONTENT_OBJECTS, PAGE_SIZE
from checkpointd.restore.restorer import RestoreOptions, restore_process
from checkpointd.state.codec import decode
from checkpointd.state.files import RegularFile
from checkpointd.state.process import ImageState
from checkpointd.target.files import file_blockers

PROGRAM = Path(__file__).parent.parent / "programs" / "files_everything_program.py"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the same pid needs CAP_CHECKPOINT_RESTORE")


class Program:
    def __init__(self, where):
        for name in ("commands", "answers"):
            os.mkfifo(where / name)
        # both ways open, so that nothing in a FIFO is lost while the program is dead
        self.commands, self.answers = (os.open(where / name, os.O_RDWR) for name in ("commands", "answers"))
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, PROGRAM, where], start_new_session=True, **quiet)
        self.pid = self.process.pid
        assert self.answer() == "ready"

    def answer(self):
        ready, _, _ = select.select([self.answers], [], [], 60)
        assert ready, "no answer"
        return os.read(self.answers, 65536).decode().strip()

    def ask(self, word):
        os.write(self.commands, word.encode() + b"\n")
        return self.answer()

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            self.process.wait()

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            self.kill()
        os.close(self.commands)
        os.close(self.answers)


@pytest.fixture
def program(tmp_path):
    where = tmp_path / "program"
    where.mkdir()
    one = Program(where)
    yield one
    one.close()


def dump(pid, store):
    Store.open(store, create=True)
    with contextlib.closing(Dumper(pid)) as dumper:
        return dumper.dump(DumpOptions(store=str(store), backend="content"))


def restore(store_path, image_id):
    image = Store.open(store_path).load(image_id)
    state = decode(ImageState, json.loads(image.state))

    def content(index):
        description = state.files.descriptions[index]
        assert isinstance(description, RegularFile)
        obj = FILE_CONTENT_OBJECTS + index
        held = image.pages(obj)
        for page in range(-(-description.file.size_bytes // PAGE_SIZE)):
            there = bool(np.isin(page, held)) and not bool(np.isin(page, image.zero_pages(obj)))
            yield image.read(obj, np.array([page], np.uint64)).tobytes() if there else bytes(PAGE_SIZE)

    return restore_process(image, state, options=RestoreOptions(file_content=content))


def test_nothing_stands_in_the_way(program):
    assert file_blockers(program.pid) == []


def test_the_program_itself_without_us(program):
    assert program.ask("check") == "fine"


def test_a_dump_harms_no_file(program, tmp_path):
    dump(program.pid, tmp_path / "store")
    assert program.ask("check") == "fine"


@pytest.mark.parametrize("rounds", [1, 3])
def test_everything_works_after_restore(program, tmp_path, rounds):
    for _ in range(rounds):
        done = dump(program.pid, tmp_path / "store")
        program.kill()
        restored = restore(tmp_path / "store", done.image_id)
        assert restored.pid == program.pid
        assert program.ask("ping") == f"pong {program.pid}"
    assert program.ask("check") == "fine"
