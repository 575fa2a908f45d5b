# SPDX-License-Identifier: Apache-2.0
"""The command, the service and the real agent on a real process."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from checkpointd import errors
from checkpointd.agent.protocol import RestoreArgs
from checkpointd.agent.restoring import restore
from tests.service_harness import House, house_of_real_agents, is_gone, wait_until

PROGRAM = f"""  # of test run {os.getpid()}
import sys
data = bytearray(4 << 20)
for at in range(0, len(data), 4096):
    data[at] = 1 + at // 4096 % 255
print("ready", flush=True)
for line in sys.stdin:
    page = int(line)
    data[page * 4096 + 7] += 1
    print(sum(data), flush=True)
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with house_of_real_agents(tmp_path_factory.mktemp("house")) as found:
        yield found


class Target:
    """A program that answers each line with the sum of its memory."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"
        self.pid = self.process.pid

    def touch(self, page: int) -> int:
        self.process.stdin.write(f"{page}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture
def target():
    found = Target()
    yield found
    found.process.stdin.close()
    assert found.process.wait(30) == 0  # unharmed to its end
    found.process.stdout.close()


def summary_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def agent_pid(house, pid):
    targets = {found["pid"]: found for found in house.checkpoint_json("status")["targets"]}
    assert targets[pid]["agent_pid"] > 0  # 0, that there is none, means all of us to kill(2)
    return targets[pid]["agent_pid"]


def running_programs():
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
            if PROGRAM.encode() in words:
                found.add(int(name))
    return found


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_full_and_an_incremental_dump(house, target):
    before = target.touch(0)
    full = summary_of(house.checkpoint("dump", "-p", str(target.pid), "--json"))
    assert full["parent_id"] == ""
    assert full["pages_scanned"] >= 1024
    assert target.touch(5) == before + 1
    small = summary_of(house.checkpoint("dump", "-p", str(target.pid), "--incremental", "--json"))
    assert small["parent_id"] == full["image_id"]
    assert 1 <= small["pages_written"] < full["pages_written"] / 4
    assert small["pages_scanned"] == (
        small["pages_skipped_parent"] + small["pages_same"] + small["pages_zero"] + small["pages_written"]
    )
    assert "1 image whole" in house.checkpoint("verify", "latest").stdout
    assert f"pid {target.pid}" in house.checkpoint("untrack", "-p", str(target.pid)).stdout
    assert target.touch(6) == before + 2


def test_precise_says_which_way_or_why_not(house, target):
    """On this kernel and any other: patched, emulated, or refused with the reason `check` gives."""
    answer = house.checkpoint("check", "--json")
    [item] = [found for found in json.loads(answer.stdout)["items"] if found["name"] == "precise soft-dirty"]
    done = house.checkpoint("track", "--precise", "-p", str(target.pid))
    if item["ok"]:
        assert done.returncode == 0, done.stderr
        assert ("precise-soft-dirty" if "patched" in item["detail"] else "barrier-soft-dirty") in done.stdout
    else:
        assert done.returncode == 6
        assert item["detail"].removeprefix("neither: ") in done.stderr


def test_the_program_runs_on_when_its_agent_and_its_service_are_killed(house, target):
    before = target.touch(0)
    house.checkpoint_json("track", "-p", str(target.pid))
    agent = agent_pid(house, target.pid)
    os.kill(agent, signal.SIGKILL)
    assert target.touch(1) == before + 1
    wait_until(lambda: is_gone(agent), "the agent's end")
    assert house.checkpoint("dump", "-p", str(target.pid), "-q").returncode == 0
    agent = agent_pid(house, target.pid)
    house.service.kill()
    house.service.wait()
    wait_until(lambda: is_gone(agent), "the agent's end")
    assert target.touch(2) == before + 2
    assert state_of(target.pid) in "SR"
    house.serve()
    # tracking was lost with the service: the next image is right all the same, and says how
    again = summary_of(house.checkpoint("dump", "-p", str(target.pid), "--incremental", "--json"))
    assert again["pid"] == target.pid
    assert again["backend_reason"]
    assert target.touch(3) == before + 3


def test_a_page_worker_that_somebody_stopped_ends_with_its_agent(house, target):
    assert house.checkpoint("dump", "-p", str(target.pid), "-q").returncode == 0
    agent = agent_pid(house, target.pid)
    workers = [
        int(pid)
        for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        if b"checkpointd.dump.page_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    os.kill(agent, signal.SIGKILL)
    for worker in workers:
        wait_until(lambda worker=worker: is_gone(worker), "the page worker's end")
    assert len(workers) == 1
    target.touch(1)


def test_an_agent_that_hangs_when_its_service_dies_lets_its_target_go(target, tmp_path):
    house = House(tmp_path / "own")
    house.directory.mkdir()
    code = "import checkpointd.agent.__main__ as agent; agent._LEAVE_TIMEOUT_S = 1; agent.main()"
    command = shlex.join([sys.executable, "-c", code])
    house.serve(CHECKPOINTD_AGENT=command, CHECKPOINTD_TRACEPOINT="dump.collected=sleep:3600000")
    with house.begin("dump", "-p", str(target.pid)) as dumping:
        wait_until(lambda: state_of(target.pid) == "t", "the freeze")
        (agent,) = [t["agent_pid"] for t in house.checkpoint_json("status")["targets"]]
        house.service.kill()
        house.service.wait()
        wait_until(lambda: is_gone(agent), "the agent's end")
        dumping.communicate()
    target.touch(1)


@pytest.mark.parametrize(
    ("what", "status", "words"),
    [("kernel thread", 7, "kernel thread"), ("zombie", 4, "exited"), ("service", 2, "checkpointd itself")],
)
def test_what_cannot_be_a_target(house, what, status, words):
    zombie = None
    if what == "kernel thread":
        pid = 2
        if Path("/proc/2/comm").exists() is False or Path("/proc/2/comm").read_text() != "kthreadd\n":
            pytest.skip("no kernel threads are visible here")
    elif what == "zombie":
        zombie = subprocess.Popen(["true"])
        wait_until(lambda: state_of(zombie.pid) == "Z", "the zombie")
        pid = zombie.pid
    else:
        pid = house.service.pid
    done = house.checkpoint("dump", "-p", str(pid))
    assert (done.returncode, words in done.stderr) == (status, True), done.stderr
    if zombie is not None:
        zombie.wait()


def test_a_process_under_a_debugger_is_left_to_it(house, target):
    code = (
        "import ctypes, sys\n"
        f"assert ctypes.CDLL(None, use_errno=True).ptrace(0x4206, {target.pid}, None, None) == 0\n"
        "print('seized', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stdout.readline() == "seized\n"
        done = house.checkpoint("dump", "-p", str(target.pid))
        assert done.returncode == 11
        assert str(tracer.pid) in done.stderr
        tracer.stdin.close()


@pytest.mark.parametrize("phase", ["checking", "memory", "rebuilding"])
def test_a_restore_that_is_stopped_leaves_no_process(house, target, phase):
    made = summary_of(house.checkpoint("dump", "-p", str(target.pid), "--json"))
    assert running_programs() == {target.pid}
    heard = []

    def report(word, done, total):
        heard.append(word)
        if word == phase:
            raise errors.Cancelled("enough")

    args = RestoreArgs(store=str(house.store), image=made["image_id"], new_pid=True)
    with pytest.raises(errors.Cancelled, match="enough"):
        restore(args, report)
    assert heard[-1] == phase
    assert running_programs() == {target.pid}
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    assert set(map(int, children)) <= {target.pid, house.service.pid}
