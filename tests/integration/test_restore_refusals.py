# SPDX-License-Identifier: Apache-2.0
"""What a restore refuses, and that one which fails or is killed leaves nothing half made."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointd.errors import CheckpointError, ImageDamaged, RestoreConflict, TargetGone, Unsupported
from checkpointd.linux import capability as cap
from checkpointd.restore.restorer import RestoreOptions
from checkpointd.restore.stub import Stub
from checkpointd.state.files import FilesOptions
from checkpointd.tracepoint import clear, register
from tests.programs.python_program import Program
from tests.programs.restore_harness import Captured, capture, kill_and_reap, restore, wait_gone

pytestmark = pytest.mark.skipif(
    not cap.has(cap.effective(), cap.CAP_CHECKPOINT_RESTORE) or os.geteuid() != 0,
    reason="choosing process ids needs root",
)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A C program of one's own file, which maps another one."""
    source = tmp_path / "small.c"
    source.write_text(
        "#include <fcntl.h>\n#include <sys/mman.h>\n#include <unistd.h>\n#include <sys/stat.h>\n"
        "int main(int c, char **v) { mkdir(v[2], 0700); if (chdir(v[2])) return 1; int fd = open(v[1], O_RDONLY);\n"
        "  volatile char *p = mmap(0, 4096, PROT_READ, MAP_PRIVATE, fd, 0); close(fd); (void)*p;\n"
        '  if (write(1, "r", 1) != 1) return 2; for (;;) usleep(10000); }\n'
    )
    binary, mapped = tmp_path / "small", tmp_path / "mapped"
    subprocess.run(["gcc", "-O1", "-o", binary, source], check=True)
    mapped.write_bytes(b"x" * 5000)
    child = subprocess.Popen(
        [binary, mapped, tmp_path / "cwd"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stdout.read(1) == b"r"
    child.stdout.close()
    yield child
    child.kill()
    child.wait()
    if Path(f"/proc/{child.pid}").exists():
        kill_and_reap(child.pid)


@pytest.mark.parametrize("how", ["gone", "longer", "newer"])
def test_changed_files_are_named(small: subprocess.Popen[bytes], tmp_path: Path, how: str) -> None:
    captured = capture(small.pid, kill=True, with_files=False)
    kill_and_reap(small)
    mapped = tmp_path / "mapped"
    if how == "gone":
        mapped.unlink()
    elif how == "longer":
        stat = mapped.stat()
        mapped.write_bytes(b"x" * 6000)
        os.utime(mapped, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        os.utime(mapped)
    with pytest.raises(RestoreConflict, match=str(mapped)) as caught:
        restore(captured)
    assert caught.value.hint
    assert not Path(f"/proc/{small.pid}").exists()


def test_all_conflicts_are_named_at_once(small: subprocess.Popen[bytes], tmp_path: Path) -> None:
    captured = capture(small.pid, kill=True, with_files=False)
    kill_and_reap(small)
    (tmp_path / "cwd").rmdir()
    os.utime(tmp_path / "mapped")
    with pytest.raises(RestoreConflict) as caught:
        restore(captured)
    text = " ".join(caught.value.details["conflicts"])
    assert "cwd" in text
    assert "mapped" in text


def test_a_port_in_use_is_not_called_missing_or_changed() -> None:
    code = (
        "s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); time.sleep(600)"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", "import socket, time; " + code],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        assert started.stdout is not None
        port = int(started.stdout.readline())
        captured = capture(started.pid, kill=True)
    finally:
        kill_and_reap(started)
    options = RestoreOptions(files=FilesOptions(external="null"))
    with socket.create_server(("127.0.0.1", port)), pytest.raises(RestoreConflict) as caught:
        restore(captured, options=options)
    assert f"127.0.0.1:{port} is in use by process {os.getpid()}" in caught.value.message
    assert "; stop that process" in caught.value.message
    assert caught.value.hint == "that done, restore again; nothing was changed so far"


def test_another_kernel_s_vdso_is_refused(killed: Captured) -> None:
    space = dataclasses.replace(killed.state.address_space, vdso=b"\x90" * 8192)
    other = dataclasses.replace(killed, state=dataclasses.replace(killed.state, address_space=space))
    with pytest.raises(Unsupported, match="vdso"):
        restore(other)


def test_a_cpu_with_less_is_refused(killed: Captured) -> None:
    cpu = killed.state.process.cpu
    more = dataclasses.replace(cpu, flags=cpu.flags | {"avx9999"})
    with pytest.raises(Unsupported, match="avx9999"):
        restore(killed.changed(cpu=more))
    more = dataclasses.replace(cpu, xfeatures=cpu.xfeatures | 1 << 40)
    with pytest.raises(Unsupported, match="register components"):
        restore(killed.changed(cpu=more))
    wait_gone(killed.state.process.pid)


@pytest.mark.parametrize(
    ("at", "words"), [(512, "components .* that its CPU did not have"), (520, "are malformed")]
)
def test_damaged_registers_leave_nothing(killed: Captured, at: int, words: str) -> None:
    """Of what components they are (AMX, where there is none), and how they are laid out."""
    leader, *others = killed.state.process.threads
    xstate = leader.xstate.ljust(576, b"\0")
    bad = dataclasses.replace(leader, xstate=xstate[:at] + b"\xff" * 8 + xstate[at + 8 :])
    with pytest.raises(ImageDamaged, match=words):
        restore(killed.changed(threads=(bad, *others)))
    wait_gone(killed.state.process.pid)


def test_pages_outside_of_mappings_are_refused(killed: Captured) -> None:
    killed.image.content[0][0x10] = b"x" * 4096
    with pytest.raises(ImageDamaged):
        restore(killed)
    wait_gone(killed.state.process.pid)


# ---- what is left when it fails


PHASES = ["check", "spawn", "map", "memory", "finish", "files", "threads", "release"]


@pytest.mark.parametrize("phase", PHASES[:-1])
def test_failure_at_every_phase_leaves_nothing_and_the_next_try_works(
    killed: Captured, program: Program, phase: str
) -> None:
    def fail(name: str) -> None:
        raise RuntimeError(name)

    fds = len(os.listdir("/proc/self/fd"))
    register(f"restore.{phase}", fail)
    try:
        with pytest.raises(RuntimeError):
            restore(killed)
    finally:
        clear()
    wait_gone(killed.state.process.pid)
    assert len(os.listdir("/proc/self/fd")) == fds
    restore(killed)
    program.wait_rounds(3)


@pytest.mark.parametrize("phase", [*PHASES[1:-1], "release"])
def test_restorer_killed_at_every_phase_leaves_nothing_half_made(
    killed: Captured, program: Program, phase: str
) -> None:
    before = program.read()
    child = os.fork()
    if child == 0:
        register(f"restore.{phase}", lambda name: os.kill(os.getpid(), signal.SIGKILL), at=1)
        try:
            restore(killed)
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    if phase == "release":  # the last thread had been let go
        program.wait_rounds(3)
        return
    wait_gone(program.pid)
    assert program.read() == before  # it never ran


def test_process_killed_while_it_is_rebuilt(killed: Captured, program: Program) -> None:
    def kill_it(stub: Stub) -> None:
        os.kill(stub.pid, signal.SIGKILL)

    with pytest.raises((TargetGone, CheckpointError)):
        restore(killed, options=RestoreOptions(wait_for_ids_s=20, before_release=kill_it))
    wait_gone(program.pid)


# ---- what cannot be saved


def test_state_without_a_leader_is_refused(killed: Captured) -> None:
    with pytest.raises(CheckpointError, match="main thread"):
        restore(killed.changed(threads=()))


# ---- sessions, and users without privileges
