# SPDX-License-Identifier: Apache-2.0
"""Which sleep a thread is in, when the kernel shows restart_syscall and not the call: never less than what is left."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkpointd import tracepoint
from checkpointd.linux import ptrace
from checkpointd.linux.arch import Nr
from checkpointd.target.freeze import freeze
from checkpointd.target.process import SleepMemory
from checkpointd.target.registers import NR_RESTART_SYSCALL, UserRegs, word
from checkpointd.target.threads import capture_threads, note_sleeps
from tests.programs.restore_harness import Captured, capture, kill_and_reap, restore

TIMEOUT_S = 20
INEXACT_S = 0.002
"""poll(2) counts milliseconds."""
PROGRAM = f"""
#include <poll.h>
#include <unistd.h>
int main(void)
{{
	struct pollfd in = {{ .fd = 0, .events = POLLIN }};
	char byte;

	for (;;) {{
		poll(&in, 1, {TIMEOUT_S * 1000});
		if (read(0, &byte, 1) != 1)
			return 0;
	}}
}}
"""


def wait_for_call(pid: int) -> None:
    """Until it is in poll, or in the rest of one."""
    deadline = time.monotonic() + 20
    calls = (f"{int(Nr.POLL)} ", f"{int(Nr.RESTART_SYSCALL)} ")
    while not Path(f"/proc/{pid}/syscall").read_text().startswith(calls):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@dataclass(frozen=True)
class Seen:
    """What a dump found: seconds left, None where it would begin anew; and between which times (time.monotonic())."""

    left_s: float | None
    before: float
    after: float

    def is_early(self, end: float) -> bool:
        """Would the sleep, restored, be over before its end?"""
        return self.left_s is not None and self.left_s < end - self.after - INEXACT_S


class Poller:
    """A program that polls its standard input again and again, each time with the same arguments."""

    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE)
        self.pid = self.process.pid
        self.memory = SleepMemory()
        self.wait_asleep()
        self.wake()  # from its second on all its polls leave the same registers

    def wait_asleep(self) -> None:
        wait_for_call(self.pid)

    def wake(self) -> float:
        """Let it poll anew; when it was woken (time.monotonic())."""
        assert self.process.stdin is not None
        switches = self._switches()
        at = time.monotonic()
        os.write(self.process.stdin.fileno(), b"x")
        while self._switches() == switches:
            time.sleep(0.001)
        self.wait_asleep()
        return at

    def stop_and_continue(self) -> None:
        """As Ctrl-Z and fg do."""
        os.kill(self.pid, signal.SIGSTOP)
        while "T" not in self._stat():
            time.sleep(0.001)
        os.kill(self.pid, signal.SIGCONT)
        self.wait_asleep()

    def seen(self) -> Seen:
        """What a dump takes its sleep for."""
        before = time.monotonic()
        captured = capture(self.pid, self.memory)
        after = time.monotonic()
        sleep = captured.state.process.threads[0].sleep
        self.wait_asleep()
        assert sleep is not None
        assert (sleep.nr, sleep.lost) == (Nr.POLL, False)
        return Seen(None if sleep.remaining_ns is None else sleep.remaining_ns / 1e9, before, after)

    def _stat(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def _switches(self) -> str:
        text = Path(f"/proc/{self.pid}/status").read_text()
        return next(line for line in text.splitlines() if line.startswith("voluntary_ctxt_switches"))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("poller") / "poller"
    subprocess.run(["gcc", "-O2", "-x", "c", "-o", made, "-"], input=PROGRAM, text=True, check=True)
    return made


@pytest.fixture
def poller(program: Path) -> Iterator[Poller]:
    made = Poller(program)
    yield made
    made.close()


def test_a_new_poll_that_somebody_else_stopped_is_not_taken_for_the_one_before(poller: Poller) -> None:
    poller.seen()
    time.sleep(1)
    end = poller.wake() + TIMEOUT_S
    for _ in range(2):
        poller.stop_and_continue()
        assert not poller.seen().is_early(end)


def test_a_poll_that_somebody_else_stops_while_it_is_frozen_is_not_lost(poller: Poller) -> None:
    """It shows as restart_syscall from then on, and looked like itself before: it begins anew, and does not end."""
    tracepoint.register("freeze.seize", lambda _: poller.stop_and_continue())
    try:
        assert poller.seen().left_s is None
    finally:
        tracepoint.clear()


def test_one_poll_gets_shorter_over_many_freezes(poller: Poller) -> None:
    first = poller.seen()
    assert first.left_s is not None
    assert first.left_s <= TIMEOUT_S
    for step in range(6):
        time.sleep(0.2)
        if step % 2:
            with freeze(poller.pid) as frozen:  # as `track` and `untrack` do
                note_sleeps(frozen, poller.memory)
            poller.wait_asleep()
        else:
            found = poller.seen()
            assert not found.is_early(first.before + first.left_s)
            assert found.left_s is not None
            assert found.left_s <= first.left_s - (found.before - first.after) + INEXACT_S


def test_one_poll_that_somebody_else_stopped_is_late_rather_than_early(poller: Poller) -> None:
    first = poller.seen()
    assert first.left_s is not None
    poller.stop_and_continue()
    assert not poller.seen().is_early(first.before + first.left_s)


CLOCKED = f"""
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
int main(int argc, char **argv)
{{
	struct pollfd in = {{ .fd = 0, .events = POLLIN }};
	struct timespec *began = mmap(0, sizeof(*began), PROT_READ | PROT_WRITE, MAP_SHARED, open(argv[1], O_RDWR), 0);
	char byte;

	for (;;) {{
		clock_gettime(CLOCK_MONOTONIC, began);
		if (poll(&in, 1, {TIMEOUT_S * 1000}) > 0 && read(0, &byte, 1) != 1)
			return 0;
	}}
}}
"""
NR_STORMY_FREEZES = 600


def test_no_poll_is_early_in_a_storm_of_wakes_and_stops(tmp_path: Path) -> None:
    """It tells the time at which each poll began, and somebody wakes, stops and continues it all the while."""
    program, told = tmp_path / "clocked", tmp_path / "told"
    subprocess.run(["gcc", "-O2", "-x", "c", "-o", program, "-"], input=CLOCKED, text=True, check=True)
    told.write_bytes(bytes(mmap.PAGESIZE))
    child = subprocess.Popen([program, told], stdin=subprocess.PIPE)
    dice, over, seen = random.Random(1), threading.Event(), Counter[str]()

    def storm() -> None:
        assert child.stdin is not None
        dice = random.Random(2)
        while not over.is_set():
            if dice.random() < 0.5:
                os.write(child.stdin.fileno(), b"x")
            else:
                os.kill(child.pid, signal.SIGSTOP)
                time.sleep(0.002 * dice.random())
                os.kill(child.pid, signal.SIGCONT)
            time.sleep(0.01 * dice.random() ** 2)

    blowing = threading.Thread(target=storm)
    try:
        wait_for_call(child.pid)
        blowing.start()
        memory = SleepMemory()
        for _ in range(NR_STORMY_FREEZES):
            with freeze(child.pid) as frozen, frozen.inject() as remote:
                (thread,), _ = capture_threads(frozen, remote, memory=memory)
                seconds, nanoseconds = struct.unpack("=qq", told.read_bytes()[:16])
                now_s = frozen.frozen_at_ns / 1e9
            sleep, end_s = thread.sleep, seconds + nanoseconds / 1e9 + TIMEOUT_S
            if sleep is None or sleep.lost:  # awake; or no freeze saw the call before somebody else's stop
                seen["nothing"] += 1
            elif sleep.remaining_ns is None:
                seen["anew"] += 1
            else:
                seen["known"] += 1
                assert not Seen(sleep.remaining_ns / 1e9, now_s, now_s).is_early(end_s)
            time.sleep(0.01 * dice.random() ** 2)
        assert seen["anew"]
        assert seen["known"]
    finally:
        over.set()
        if blowing.ident is not None:
            blowing.join()
        child.kill()
        child.communicate()


SLEEPER = """
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	int out = open(argv[argc - 1], O_WRONLY | O_APPEND);

	for (;;)
		if (poll(0, 0, 1000000) < 0 && write(out, errno == EINTR ? "i" : "?", 1) != 1)
			return 1;
}
"""


class Sleeper:
    """A program in one long poll, which tells when that is interrupted."""

    def __init__(self, directory: Path) -> None:
        program, self.out = directory / "sleeper", directory / "out"
        subprocess.run(["gcc", "-x", "c", "-o", program, "-"], input=SLEEPER, text=True, check=True)
        self.out.touch()
        nothing = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [program, self.out], stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
        )
        self.pid = self.process.pid
        self.is_restored = False
        wait_for_call(self.pid)

    def kill(self) -> None:
        kill_and_reap(self.pid if self.is_restored else self.process)

    def come_back(self, captured: Captured) -> None:
        self.kill()
        self.is_restored = True
        restore(captured)

    def stop_before_its_call_goes_on(self, orig_rax: int) -> None:
        """As a thread that is let go stands until it gets the CPU: about to make the call restart_syscall."""
        os.kill(self.pid, signal.SIGSTOP)
        self._wait_state("T")
        ptrace.seize(self.pid, 0)
        ptrace.interrupt(self.pid)
        assert ptrace.peek_wait(self.pid, block=True)
        ptrace.take_stop(self.pid)
        regs = UserRegs.from_bytes(ptrace.get_regs(self.pid))
        regs.rax, regs.orig_rax, regs.rip = NR_RESTART_SYSCALL, word(orig_rax), regs.rip - 2
        ptrace.set_regs(self.pid, regs.to_bytes())
        ptrace.detach(self.pid)
        self._wait_state("T")

    def go_on(self) -> None:
        self._wait_state("T")
        os.kill(self.pid, signal.SIGCONT)
        wait_for_call(self.pid)

    def _wait_state(self, wanted: str) -> None:
        deadline = time.monotonic() + 20
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != wanted:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def close(self) -> None:
        self.kill()


HOG = "import os, time; os.write(1, b'x'); end = time.monotonic() + 5\nwhile time.monotonic() < end: pass"


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Sleeper]:
    made = Sleeper(tmp_path)
    yield made
    made.close()


@pytest.mark.needs("root", "set_tid")
@pytest.mark.parametrize("orig_rax", [-1, int(Nr.POLL)], ids=["own code", "leaving the kernel"])
def test_sleep_goes_on_though_its_thread_was_caught_before_it_did(sleeper: Sleeper, orig_rax: int) -> None:
    """A thread that is let go and gets no CPU until the next freeze; the restart block is in the old process alone."""
    memory = SleepMemory()
    capture(sleeper.pid, memory)
    sleeper.stop_before_its_call_goes_on(orig_rax)
    captured = capture(sleeper.pid, memory)
    sleep = captured.state.process.threads[0].sleep
    assert sleep is not None
    assert (sleep.nr, sleep.lost) == (Nr.POLL, False)
    sleeper.go_on()  # what was captured goes on as well
    assert sleeper.out.read_text() == ""
    sleeper.come_back(captured)
    sleeper.go_on()
    assert sleeper.out.read_text() == ""


@pytest.mark.needs("root")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a processor beside the target's")
def test_sleep_of_a_thread_that_got_no_cpu_between_two_freezes_is_not_begun_anew(sleeper: Sleeper) -> None:
    """Let go, it has not even left the stop; a busy processor keeps it there until it is stopped again."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(sleeper.pid, {first})
    wait_for_call(sleeper.pid)
    hogs: list[subprocess.Popen[bytes]] = []

    def hog(_: str) -> None:
        words = ["taskset", "-c", str(first), "chrt", "-f", "1", sys.executable, "-c", HOG]
        hogs.append(subprocess.Popen(words, stdout=subprocess.PIPE))
        assert hogs[-1].stdout is not None
        hogs[-1].stdout.read(1)

    memory = SleepMemory()
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {second})
        time.sleep(0.3)
        tracepoint.register("thaw.begin", hog, at=1)
        before = capture(sleeper.pid, memory).state.process.threads[0].sleep
        tracepoint.register("freeze.interrupted", lambda _: hogs[0].kill(), at=1)
        after = capture(sleeper.pid, memory).state.process.threads[0].sleep
    finally:
        tracepoint.clear()
        os.sched_setaffinity(0, allowed)
        for one in hogs:
            one.kill()
            one.communicate()
    assert before is not None
    assert after is not None
    assert before.remaining_ns is not None
    assert after.remaining_ns is not None
    assert after.remaining_ns < before.remaining_ns < 1_000_000_000_000 - 250_000_000


@pytest.mark.needs("root", "set_tid")
def test_sleep_of_which_nothing_is_known_ends_with_eintr(
    sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel shows restart_syscall alone, and without root not the stack either."""
    capture(sleeper.pid)
    wait_for_call(sleeper.pid)
    monkeypatch.setattr("checkpointd.target.process.prepare_sleeps", lambda pid: {})
    captured = capture(sleeper.pid, kill=True)
    state = captured.state.process
    assert state.threads[0].sleep is not None
    assert state.threads[0].sleep.lost
    assert any("would end with EINTR" in warning for warning in state.warnings)
    assert sleeper.out.read_text() == ""
    sleeper.come_back(captured)
    wait_for_call(sleeper.pid)
    assert sleeper.out.read_text() == "i"
