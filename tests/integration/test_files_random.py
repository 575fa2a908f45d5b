# SPDX-License-Identifier: Apache-2.0
"""Random tables of descriptors: what is saved after a restore equals what was saved before it."""

import dataclasses
import random
import subprocess

import pytest

from checkpointd.state import files as state_of
from tests.files_lab import driven, moved, save

QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

MAKERS = [
    "flags = os.O_RDWR | os.O_CREAT | rng.choice([0, os.O_APPEND, os.O_SYNC]);"
    "put(os.open(f'file{n}', flags)); os.write(fds[-1], b'x' * n)",
    "put(os.open(f'gone{n}', os.O_RDWR | os.O_CREAT)); os.write(fds[-1], b'y' * n * 10); os.unlink(f'gone{n}')",
    "mode = rng.choice([os.O_RDONLY, os.O_RDWR]);"
    "put(os.open(f'/proc/self/fd/{rng.choice(files)}', mode)) if files else 0",
    "[put(fd) for fd in os.pipe2(rng.choice([0, os.O_NONBLOCK]))]; os.write(fds[-1], b'z' * n)",
    "put(os.eventfd(n, rng.choice([0, os.EFD_SEMAPHORE])))",
    "put(os.memfd_create(f'm{n}')); os.ftruncate(fds[-1], n * 1000); os.lseek(fds[-1], n, 0)",
    "put(os.open('.', os.O_RDONLY))",
    "put(os.open('/dev/null', rng.choice([os.O_RDONLY, os.O_WRONLY, os.O_RDWR])))",
    "[put(s.detach()) for s in socket.socketpair(1, rng.choice([1, 5]))]; os.write(fds[-1], b'q' * n)",
    "s = socket.create_server(('127.0.0.1', 0), backlog=n + 1); put(s.detach())",
    "s = socket.socket(2, 2); s.bind(('127.0.0.1', 0)); put(s.detach())",
    "put(libc.timerfd_create(rng.choice([0, 1, 7]), 0))",
    "put(libc.inotify_init1(0)); libc.inotify_add_watch(fds[-1], b'.', 0x200 + n)",
    "e = select.epoll(); [e.register(w) for w in watchable[-3:]]; put(os.dup(e.fileno())); e.close()",
    "a = rng.choice(fds); put(os.dup(a)) if a else 0",
    "a = rng.choice(fds); number = rng.randrange(100, 900); keep = rng.random() < 0.5;"
    "number in fds or fds.append(os.dup2(a, number, inheritable=keep))",
]  # fmt: skip

SETUP = """
import random
rng = random.Random({seed}); fds = [0]; files = []; watchable = []
def put(fd):
    fds.append(fd)
    kind = os.readlink(f'/proc/self/fd/{{fd}}')
    if '/file' in kind: files.append(fd)
    if kind.startswith(('pipe:', 'socket:', 'anon_inode:[eventfd]', 'anon_inode:[timerfd]')): watchable.append(fd)
"""

# what must differ: numbers the kernel gives, and time that passed
VARYING = {"unread_bytes", "inode", "captured_ns", "value_ns", "pid", "dev", "mtime_ns"}


def same(value):
    """The state without what may differ."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, state_of.RegularFile) and value.deleted:
            fields["file"] = value.file.size_bytes  # its name was never to be kept
            fields["flags"] &= 0o3
        if isinstance(value, state_of.PipeEnd):
            fields["flags"] &= ~0o100000
        return {name: same(item) for name, item in fields.items() if name not in VARYING}
    if isinstance(value, tuple):
        items = [same(item) for item in value]
        if value and isinstance(value[0], state_of.EpollWatch):
            items.sort(key=repr)  # the kernel keeps them by address
        if value and isinstance(value[0], state_of.SocketOption):
            items = [item for item in items if (item["level"], item["name"]) != (1, 2)]
        return items
    return value


@pytest.mark.parametrize("seed", range(12))
def test_saved_again_is_the_same(tmp_path, seed):
    rng = random.Random(seed)
    lines = [f"n = {rng.randrange(1, 200)}; {rng.choice(MAKERS)}" for _ in range(40)]
    setup = "\n".join([SETUP.format(seed=seed), *lines])
    with moved(setup, cwd=tmp_path, **QUIET) as (stub, warnings):
        again, _, more = save(stub)
        stub.go()
        for one, other in zip(stub.state.descriptions, again.descriptions, strict=True):
            assert same(other) == same(one)
        assert same(again) == same(stub.state)
        assert [
            text
            for text in warnings + more
            if "unread events" not in text and "waiting to be read" not in text
        ] == []


def test_saving_changes_nothing_in_a_random_table(tmp_path):
    rng = random.Random(99)
    lines = [f"n = {rng.randrange(1, 200)}; {rng.choice(MAKERS)}" for _ in range(60)]
    look = "[(n, os.readlink(f'/proc/self/fd/{n}'), open(f'/proc/self/fdinfo/{n}').read()) for n in sorted(set(fds))]"
    with driven(cwd=tmp_path, **QUIET) as target:
        target.do("\n".join([SETUP.format(seed=99), *lines]))
        before = target.get(look)
        save(target)
        target.go()
        assert target.get(look) == before
