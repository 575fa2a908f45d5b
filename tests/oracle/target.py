# SPDX-License-Identifier: Apache-2.0
"""Build, start and drive tests/programs/oracle_target.c.

The FIFOs lie in the target's directory by name, so that a restored target finds them again; our ends stay open
for reading and writing, so that neither side ever sees the other hang up.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "programs" / "oracle_target.c"
NR_RELATIVES = 3
ANSWER_SECONDS = 20

_built: dict[str, Path] = {}


def build(directory: Path | None = None) -> Path:
    """The compiled target; built once per process."""
    if "" not in _built:
        where = directory or Path(tempfile.mkdtemp(prefix="oracle-build-"))
        program = where / "oracle_target"
        subprocess.run(
            ["gcc", "-O1", "-Wall", "-Wno-format-truncation", "-pthread", "-o", program, SOURCE], check=True
        )
        _built[""] = program
    return _built[""]


def forget_build() -> None:
    """Remove the compiled target."""
    program = _built.pop("", None)
    if program:
        shutil.rmtree(program.parent, ignore_errors=True)


class TargetDied(Exception):
    """The target did not answer."""


class OracleTarget:
    """One running target and its relatives."""

    def __init__(self, *, directory: Path | None = None) -> None:
        self.directory = directory or Path(tempfile.mkdtemp(prefix="oracle-", dir="/tmp"))
        self._tmpfs = Path(tempfile.mkdtemp(prefix="oracle-", dir="/dev/shm"))
        (self.directory / "tmpfs").symlink_to(self._tmpfs)
        self._fds: list[tuple[int, int]] = []
        for k in range(NR_RELATIVES + 1):
            ends = []
            for name in (f"cmd{k}", f"rep{k}"):
                os.mkfifo(self.directory / name, 0o600)
                ends.append(os.open(self.directory / name, os.O_RDWR | os.O_CLOEXEC))
            self._fds.append((ends[0], ends[1]))
        self.relatives: dict[int, int] = {}
        log = open(self.directory / "log", "wb")  # noqa: SIM115 (handed over)
        with log:
            self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [build(), str(self.directory)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # no rseq area: the kernel writes the number of the processor there whenever it likes
                env={"PATH": "/usr/bin:/bin", "GLIBC_TUNABLES": "glibc.pthread.rseq=0"},
            )
        self.pid = self.process.pid
        self.tell("ping")

    def tell(self, command: str, *, to: int = 0, seconds: float = ANSWER_SECONDS) -> int:
        """One command; its number, or -errno.

        Raises:
            TargetDied: no answer in time.
        """
        command_fd, answer_fd = self._fds[to]
        os.write(command_fd, command.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([answer_fd], [], [], 0.05 if self._is_dead(to) else min(seconds, 1.0))
            if not ready:
                seconds -= 1.0
                if self._is_dead(to) or seconds <= 0:
                    raise TargetDied(f"no answer to {command!r} ({self.state(to)})")
                continue
            answer += os.read(answer_fd, 1)
        word, _, number = answer.decode().strip().partition(" ")
        return int(number) if word == "ok" else -int(number)

    def play(self, command: str) -> int:
        """A command of a history, which may be meant for a relative ("@K command")."""
        to = 0
        if command.startswith("@"):
            head, _, command = command.partition(" ")
            to = int(head[1:])
            if to not in self.relatives:
                return -3
        if command.startswith("relate "):
            k = 1 + int(command.split()[1]) % NR_RELATIVES
            if to or k in self.relatives:
                return -17
            pid = self.tell(f"relate {k}")
            if pid > 0:
                self.relatives[k] = pid
            return pid
        return self.tell(command, to=to)

    def settle(self) -> None:
        """Wait until the target is blocked in read(2) again: the answer arrives a moment before that.

        Raises:
            TargetDied: it does not come to rest.
        """
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            try:
                # of the leader alone: io_uring's worker threads live among the tasks too
                if Path(f"/proc/{self.pid}/syscall").read_text().startswith("0 "):
                    return
            except OSError:
                break
            time.sleep(0.0002)
        raise TargetDied(f"the target does not come to rest ({self.state()})")

    def state(self, to: int = 0) -> str:
        """The state letter of /proc/PID/stat, with its meaning left to the reader; "gone" without one."""
        pid = self.pid if to == 0 else self.relatives.get(to, 0)
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"

    def _is_dead(self, to: int) -> bool:
        return self.state(to) in ("gone", "Z", "X")

    def kill(self) -> None:
        """SIGKILL the target itself (relatives stay) and reap it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        if self.process is not None:
            self.process.wait()
            self.process = None
        deadline = time.monotonic() + ANSWER_SECONDS
        while self.state() not in ("gone", "X") and time.monotonic() < deadline:
            try:
                os.waitpid(self.pid, os.WNOHANG)  # a restored one may be our child
            except ChildProcessError:
                if self.state() == "Z":
                    break
            time.sleep(0.002)

    def came_back(self, pid: int) -> None:
        """It was killed and restored as `pid`."""
        self.pid = pid

    def end_relatives(self) -> None:
        """Kill them: to a restored target they are strangers, and they hold on to its session."""
        for pid in self.relatives.values():
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, 9)
                os.waitpid(pid, 0)
        self.relatives.clear()

    def close(self) -> None:
        self.kill()
        self.end_relatives()
        for pair in self._fds:
            for fd in pair:
                os.close(fd)
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self._tmpfs, ignore_errors=True)

    def __enter__(self) -> OracleTarget:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
