# SPDX-License-Identifier: Apache-2.0
"""Targets that check themselves, a zygote of agents to kill, and the judge who looks at the target afterwards."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "programs"
_READY, _PROGRESS, _ERRORS, _TEXT, _QUIT = 0, 8, 16, 24, 280
_SETTLE_S = 60.0  # a busy machine may starve anybody for seconds
_ANONYMOUS_CODE = re.compile(r"^\S+ r-xp 00000000 00:00 0 *$", re.MULTILINE)
_VOLATILE = re.compile(r"^\S+ (\S+) \S+ \S+ \S+ +\[(?:stack|heap)\]$", re.MULTILINE)

C_MODES = (
    *(
        "regs",
        "nanosleep",
        "clock-nanosleep",
        "poll",
        "ppoll",
        "futex",
        "epoll-timeout",
        "read",
        "epoll",
        "semop",
    ),
    *("sigwait", "signals", "altstack", "clock", "rseq", "threads9", "threads64", "births", "forks"),
    *("nanosleep-long", "clock-nanosleep-long", "poll-long", "futex-long", "select-long", "epoll-long"),
)
# what changes by itself in a mode, and is therefore not compared
MOVING_MAPS = {"births", "go", "execs", "thread-execs"}
MOVING_THREADS = {"births", "go", "execs", "thread-execs"}
MOVING_MASKS = {"births", "ppoll", "altstack", "signals", "go", "forks", "execs", "thread-execs"}


def build(where: Path) -> dict[str, Path]:
    """Compile the targets; name to program.  `go` is missing where there is no Go."""
    programs = {name: where / name for name in ("dynamic", "static", "nolibc")}
    source = PROGRAMS / "inject_target.c"
    subprocess.run(["gcc", "-O1", "-pthread", source, "-o", programs["dynamic"]], check=True)
    subprocess.run(["gcc", "-O1", "-static", "-pthread", source, "-o", programs["static"]], check=True)
    bare = ["-nostdlib", "-static", "-fno-stack-protector"]
    subprocess.run(["gcc", "-O1", *bare, PROGRAMS / "inject_nolibc.c", "-o", programs["nolibc"]], check=True)
    if shutil.which("go"):
        env = {**os.environ, "HOME": str(where), "GOCACHE": str(where / "gocache"), "GO111MODULE": "off"}
        go = where / "go"
        built = subprocess.run(["go", "build", "-o", go, PROGRAMS / "inject_go.go"], env=env, check=False)
        if built.returncode == 0:
            programs["go"] = go
    return programs


class Harmed(AssertionError):
    """The target is not as it was."""


@dataclass
class Picture:
    """What of a process must look the same before and after."""

    fds: dict[str, str]
    maps: str
    masks: dict[str, str]
    children: set[int]


class Target:
    """One running program of tests/programs, found by what it writes into its shared file."""

    def __init__(
        self,
        programs: dict[str, Path],
        kind: str,
        mode: str,
        where: Path,
        *,
        tolerant: bool = True,
        extra: tuple[str, ...] = (),
    ) -> None:
        self.name = f"{kind}-{mode}" if mode else kind
        self.mode = mode or kind
        path = where / f"shm-{self.name}-{time.monotonic_ns()}"
        path.write_bytes(bytes(4096))
        with path.open("r+b") as file:
            self._shm = mmap.mmap(file.fileno(), 4096)
        command = [
            programs[kind],
            *([mode] if mode else []),
            path,
            *(["tolerant"] if tolerant else []),
            *extra,
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.pid = self.process.pid
        try:
            self._begin(mode)
        except BaseException:
            self.kill()
            raise

    def _begin(self, mode: str) -> None:
        enough = 0 if mode in ("execs", "thread-execs", "vfork") or mode.endswith("-long") else 5
        self._wait(lambda: self._word(_READY) and self.progress > enough, "to begin")
        self.before = self._picture()
        if mode in ("threads9", "threads64"):
            # threads just born have every signal blocked for a moment
            self._wait(self._is_settled, "its threads to settle")

    def _is_settled(self) -> bool:
        before, self.before = self.before, self._picture()
        return (
            all(not mask.startswith("fffffff") for mask in self.before.masks.values())
            and before == self.before
        )

    def _word(self, at: int) -> int:
        return struct.unpack_from("=Q", self._shm, at)[0]

    @property
    def progress(self) -> int:
        return self._word(_PROGRESS)

    def wait_step(self) -> None:
        """Wait for its next step: what it does in turns has just begun anew."""
        before = self.progress
        self._wait(lambda: self.progress != before, "its next step")

    def _wait(self, condition, what: str, timeout_s: float = _SETTLE_S) -> None:
        until = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None:
                raise Harmed(f"{self.name}: died with {self.process.returncode} while waited for {what}")
            if time.monotonic() > until:
                raise Harmed(f"{self.name}: waited too long for {what}; {self._state()}")
            time.sleep(0.0005)

    def _state(self) -> str:
        lines = []
        for tid in sorted(os.listdir(f"/proc/{self.pid}/task"), key=int)[:5]:
            text = Path(f"/proc/{self.pid}/task/{tid}/status").read_text()
            keep = ("State", "TracerPid", "SigPnd", "SigBlk", "SigIgn")
            lines.append(
                " ".join(line.replace("\t", "") for line in text.splitlines() if line.startswith(keep))
            )
        return "; ".join(lines)

    def _threads(self) -> dict[str, dict[str, str]]:
        found = {}
        for tid in os.listdir(f"/proc/{self.pid}/task"):
            try:
                text = Path(f"/proc/{self.pid}/task/{tid}/status").read_text()
            except OSError:
                continue
            found[tid] = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        return found

    def _picture(self) -> Picture:
        fds = {}
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                fds[fd] = os.readlink(f"/proc/{self.pid}/fd/{fd}")
            except OSError:
                continue
        threads = self._threads()
        if self.mode in MOVING_THREADS:
            threads = {tid: status for tid, status in threads.items() if tid == str(self.pid)}
        masks = {}
        for tid, status in threads.items():
            # inside ppoll or a handler the mask is another one: only "nearly everything blocked" is ours
            masks[tid] = f"{status['SigBlk']} {status['SigIgn']} {status['SigCgt']}"
        maps = _VOLATILE.sub(r"\1", Path(f"/proc/{self.pid}/maps").read_text())
        children: set[int] = set()
        for tid in threads:
            try:
                children.update(map(int, Path(f"/proc/{self.pid}/task/{tid}/children").read_text().split()))
            except OSError:
                continue
        return Picture(fds, maps, masks, children)

    def _difference(self) -> str:
        """What is not as before; empty when all is well."""
        for tid, status in self._threads().items():
            if status["State"][0] in "tTZ" and self.mode not in MOVING_THREADS:
                return f"thread {tid} is {status['State']}"
            if status["TracerPid"] != "0":
                return f"thread {tid} is traced by {status['TracerPid']}"
        now = self._picture()
        if now.fds != self.before.fds and self.mode not in ("go", "forks"):
            return f"descriptors {self.before.fds} became {now.fds}"
        if _ANONYMOUS_CODE.search(now.maps):
            return "an executable mapping of ours is left: " + _ANONYMOUS_CODE.findall(now.maps)[0]
        if self.mode not in MOVING_MAPS and now.maps != self.before.maps:
            gone = set(self.before.maps.splitlines()) ^ set(now.maps.splitlines())
            return f"mappings differ: {sorted(gone)}"
        if now.masks != self.before.masks and self.mode not in MOVING_MASKS:
            return f"signal masks {self.before.masks} became {now.masks}"
        if self.mode != "forks":
            for child in now.children - self.before.children:
                try:
                    state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
                except OSError:
                    continue
                if state != "Z":
                    return f"child {child} lives ({state})"
        return ""

    def nr_zombies(self) -> int:
        return len(self._picture().children - self.before.children) if self.mode != "forks" else 0

    def judge(self, *, progress: bool = True) -> None:
        """Raise `Harmed` unless the target is well: alive, going on, nothing of ours left in it."""
        last = [""]

        def well() -> bool:
            last[0] = self._difference()
            return not last[0]

        try:
            self._wait(well, "to look as before")
        except Harmed as error:
            raise Harmed(f"{error}: {last[0]}") from None
        start = self.progress
        if progress:
            self._wait(lambda: self.progress >= start + 2, "progress")
        self.check_errors()

    def check_errors(self) -> None:
        if self._word(_ERRORS):
            text = bytes(self._shm[_TEXT:_QUIT]).split(b"\0")[0].decode()
            raise Harmed(f"{self.name}: {self._word(_ERRORS)} errors, the first: {text}")

    def tracked_mappings(self) -> int:
        """How many mappings are registered with a userfaultfd?"""
        flags = re.findall(r"^VmFlags:(.*)$", Path(f"/proc/{self.pid}/smaps").read_text(), re.MULTILINE)
        return sum(1 for line in flags if {"uw", "um"} & set(line.split()))

    def leftover_slots(self) -> bool:
        """Is there a slot in any executable mapping?"""
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            if line.split()[1] == "r-xp":
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as mem:
                    if b"CKPTslt1" in os.pread(mem.fileno(), end - start, start):
                        return True
        return False

    def stop(self) -> None:
        """Ask it to end; its own verdict counts."""
        self._shm[_QUIT : _QUIT + 8] = struct.pack("=Q", 1)
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return
        if code:
            raise Harmed(f"{self.name}: ended with {code}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Zygote:
    """See zygote.py."""

    def __init__(self, stores: Path | None = None) -> None:
        env = dict(os.environ)
        if stores is not None:
            stores.mkdir(exist_ok=True)
            env["SOAK_STORES"] = str(stores)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.zygote"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, session: str, pid: int, *, at: int = 0, delay_us: int = -1, repeat: int = 1, **how: bool
    ) -> dict:
        request = {"session": session, "pid": pid, "at": at, "delay_us": delay_us, "repeat": repeat, **how}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the zygote died")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


@dataclass
class Tally:
    """What a campaign did."""

    kills: int = 0
    sessions: int = 0
    failures: list[str] = field(default_factory=list)
    points: dict[str, int] = field(default_factory=dict)


def dry_run(zygote: Zygote, target: Target, session: str, **how: bool) -> list[str]:
    """One undisturbed session; the names of its trace points in order."""
    answer = zygote.run(session, target.pid, **how)
    if answer["error"]:
        raise Harmed(f"{target.name}/{session}: {answer['error']}")
    target.judge()
    return answer["names"]


def kill_at(
    zygote: Zygote, target: Target, session: str, at: int, tally: Tally, name: str, **how: bool
) -> None:
    """Kill an agent at its `at`-th trace point; the target must be well afterwards."""
    answer = zygote.run(session, target.pid, at=at, **how)
    _count(target, session, answer, tally, f"at {at} ({name})")
    tally.points[name] = tally.points.get(name, 0) + 1


def kill_after(
    zygote: Zygote, target: Target, session: str, delay_us: int, tally: Tally, **how: bool
) -> None:
    """Kill an agent after some microseconds."""
    answer = zygote.run(session, target.pid, delay_us=delay_us, repeat=1000, **how)
    _count(target, session, answer, tally, f"after {delay_us} us")
    tally.points["random instant"] = tally.points.get("random instant", 0) + 1


def _count(target: Target, session: str, answer: dict, tally: Tally, when: str) -> None:
    tally.sessions += 1
    if answer["killed"]:
        tally.kills += 1
    if answer["error"]:
        raise Harmed(f"{target.name}/{session} {when}: {answer['error']}")
    try:
        # a long sleep is met by many kills before its end is waited for
        target.judge(progress=not target.mode.endswith("-long") or tally.sessions % 20 == 0)
    except Harmed as error:
        raise Harmed(f"{target.name}/{session} killed {when}: {error}") from None


def finish(zygote: Zygote, target: Target, **how: bool) -> None:
    """After all kills: a whole session cleans up what dead agents may have left (zombies, an unused slot)."""
    answer = zygote.run("clean", target.pid, **how)
    if answer["error"]:
        raise Harmed(f"{target.name}: {answer['error']}")
    target.judge()
    if target.nr_zombies():
        raise Harmed(f"{target.name}: {target.nr_zombies()} zombies left")
    if (
        target.mode != "go" and target.leftover_slots()
    ):  # Go keeps stacks on its heap: old words may point there
        raise Harmed(f"{target.name}: a slot is left")
