# SPDX-License-Identifier: Apache-2.0
"""Processes whose files are saved and brought back without a tracer: a driven target and a driven stub."""

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

from checkpointd.restore.files import FilesContext, restore_files
from checkpointd.state.codec import decode, encode
from checkpointd.state.files import FilesOptions, FilesState
from checkpointd.target.files import capture_files, prepare_files
from checkpointd.target.remote import Call, Result

PROGRAM = Path(__file__).parent / "programs" / "files_stub_program.py"


class Driven:
    """A process that runs what it is told; it provides `Remote`."""

    def __init__(self, *, empty=False, cwd=None, **popen):
        ours, theirs = socket.socketpair()
        words = [sys.executable, str(PROGRAM), str(theirs.fileno())] + (["empty"] if empty else [])
        self.process = subprocess.Popen(words, pass_fds=[theirs.fileno()], cwd=cwd, **popen)
        theirs.close()
        self._link = ours
        self.pid = self.process.pid
        self._arena, self._size = self._ask("arena")
        self._used = 0

    def _ask(self, *request):
        raw = pickle.dumps(request)
        self._link.sendall(struct.pack("I", len(raw)) + raw)
        head = self._link.recv(4, socket.MSG_WAITALL)
        assert len(head) == 4, "the process died"
        good, value = pickle.loads(self._link.recv(struct.unpack("I", head)[0], socket.MSG_WAITALL))
        if not good:
            raise AssertionError(value)
        return value

    def do(self, source):
        """Execute statements."""
        self._ask("exec", source)

    def get(self, expression):
        """Value of an expression."""
        return self._ask("eval", expression)

    # Remote
    def batch(self, calls, *, undo=(), tid=None):
        words = [
            (call.nr, tuple(("result", arg.index) if isinstance(arg, Result) else arg for arg in call.args))
            for call in calls
        ]
        return self._ask("batch", words)

    def call(self, nr, *args):
        (result,) = self.batch([Call(nr, args)])
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def put(self, data):
        address = self.alloc(len(data))
        self._ask("write", address, data)
        return address

    def alloc(self, size_bytes):
        address = self._arena + self._used
        self._used += (size_bytes + 15) & ~15
        assert self._used <= self._size
        return address

    def read(self, address, size_bytes):
        return self._ask("read", address, size_bytes)

    def reset(self):
        self._used = 0

    def stop(self):
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def go(self):
        os.kill(self.pid, signal.SIGCONT)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._link.close()


def without_control(state: FilesState) -> FilesState:
    """Leave out the control socket, whose number is the highest."""
    return dataclasses.replace(
        state, descriptions=state.descriptions[:-1], descriptors=state.descriptors[:-1]
    )


def save(target, options=None, objects=None):
    """Captured files of a stopped target, its state gone through JSON; content that is kept apart as bytes."""
    draft = prepare_files(target.pid, options)
    target.stop()
    captured = capture_files(target, objects, options=options, draft=draft)
    contents = {}
    for extra in captured.extra_objects:
        contents[extra.description] = extra.read(0, extra.size_bytes)
        extra.close()
    state = decode(FilesState, json.loads(json.dumps(encode(captured.state))))
    assert state == captured.state
    return without_control(state), contents, captured.warnings


@contextlib.contextmanager
def driven(**keywords):
    process = Driven(**keywords)
    try:
        yield process
    finally:
        process.kill()


@contextlib.contextmanager
def restored(state, contents=None, options=None, same_boot=True, object_fds=None):
    """A stub that has the files of `state`, and the warnings."""
    context = FilesContext(
        options=options or FilesOptions(),
        content=lambda index: [
            contents[index][at : at + 65536] for at in range(0, len(contents[index]), 65536)
        ],
        same_boot=same_boot,
        object_fds=object_fds or {},
    )
    with driven(empty=True) as stub:
        before = sorted(os.listdir("/proc/self/fd"))
        warnings = restore_files(stub, state, context)
        assert sorted(os.listdir("/proc/self/fd")) == before, "descriptors left behind"
        yield stub, warnings


@contextlib.contextmanager
def moved(setup, *, cwd=None, options=None, **popen):
    """Set a target up, save, kill, restore: the stub and all warnings."""
    popen.setdefault("stdin", subprocess.DEVNULL)
    popen.setdefault("stdout", subprocess.DEVNULL)
    popen.setdefault("stderr", subprocess.DEVNULL)
    with driven(cwd=cwd, **popen) as target:
        target.do(setup)
        state, contents, warnings = save(target, options)
        target.kill()
        with restored(state, contents, options) as (stub, more):
            stub.state = state
            yield stub, warnings + more
