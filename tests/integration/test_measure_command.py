# SPDX-License-Identifier: Apache-2.0
"""`checkpoint measure` and `checkpoint report`, with the real service and agent on a real process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointd.report import record
from tests.service_harness import House, is_gone, wait_until

pytestmark = pytest.mark.needs("ptrace", "pagemap_scan")

RECORD = Path(__file__).parents[1] / "data" / "measurement-v1.jsonl"
PROGRAM = """
import os, sys, time
data = bytearray(4 << 20)
for at in range(0, len(data), 4096):
    data[at] = 1 + at // 4096 % 255
n = 0
while True:
    n += 1
    data[(n % 64) * 4096 + 5] = n % 256
    with open(sys.argv[1] + ".new", "w") as file:
        file.write(str(n))
    os.replace(sys.argv[1] + ".new", sys.argv[1])
    time.sleep(0.005)
"""


@pytest.fixture
def house(tmp_path):
    found = House(tmp_path)
    del found.environ["CHECKPOINTD_AGENT"]
    found.serve()
    yield found
    found.close()


class Target:
    def __init__(self, counter):
        self.counter = counter
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(counter)])
        self.pid = self.process.pid
        wait_until(lambda: counter.exists() and counter.read_text(), "the target")

    def state(self):
        status = Path(f"/proc/{self.pid}/status").read_text()
        return status.split("State:")[1].split()[0], int(status.split("TracerPid:")[1].split()[0])

    def runs_on(self):
        """It does more than it had done, stopped by nobody and traced by nobody."""
        before = self.counter.read_text()
        wait_until(lambda: (now := self.counter.read_text()) and now != before, "the target to go on")
        state, tracer = self.state()
        return state in "RSD" and tracer == 0


@pytest.fixture
def target(tmp_path):
    made = Target(tmp_path / "counter")
    yield made
    made.process.kill()
    made.process.wait()


def agents(house):
    found = [t["agent_pid"] for t in json.loads(house.checkpoint("status", "--json").stdout)["targets"]]
    return [pid for pid in found if pid]  # 0 while it starts: kill(2) would take that for all of us


def test_a_measurement_is_recorded_shown_and_reported(house, target, tmp_path):
    out = tmp_path / "record.jsonl"
    done = house.checkpoint(
        *("measure", "-p", str(target.pid), "--interval", "300ms", "--epochs", "3", "--baseline", "300ms"),
        *("--probe", f"cat {target.counter}", "-o", str(out)),
    )
    assert done.returncode == 0, done.stderr
    assert "pages per epoch" in done.stdout
    found = record.load(out)
    assert found.end["reason"] == "done"
    assert found.end["epochs"] == 3
    (run,) = found.runs
    assert sorted(run.epochs) == [0, 1, 2, 3]
    for number in (1, 2, 3):
        assert run.backends["content"][number]["pages_missed"] == 0
        assert run.epochs[number]["pages_changed"] >= 1
        assert run.epochs[number]["frozen_us"] >= run.epochs[number]["truth_us"]
        assert run.epochs[number]["running_us"] >= 300_000
    assert {(0, "begin"), (0, "end"), (3, "end")} <= set(run.probes)
    assert out.stat().st_mode & 0o777 == 0o600
    assert target.runs_on()
    assert agents(house) == []

    shown = house.checkpoint("report", str(out))
    assert shown.stdout == done.stdout
    page = tmp_path / "page.html"
    assert house.checkpoint("report", str(out), "-o", str(page)).returncode == 0
    assert page.read_text().startswith("<!doctype html>")
    assert house.checkpoint("report", str(out), "-o", str(page)).returncode == 2  # it exists
    assert house.checkpoint("report", str(out), "--format", "csv").stdout.startswith("run,epoch,backend")
    assert house.checkpoint("report", str(out), "--format", "jsonl").stdout == out.read_text()
    assert json.loads(house.checkpoint("report", str(out), "--json").stdout)["backends"]


def test_a_command_is_started_and_ended(house, tmp_path):
    counter = tmp_path / "counter"
    done = house.checkpoint(
        *(
            "measure",
            "--epochs",
            "2",
            "--interval",
            "200ms",
            "--baseline",
            "0",
            "--warmup",
            "500ms",
            "--json",
        ),
        *("--backends", "content", "--", sys.executable, "-c", PROGRAM, str(counter)),
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["message_type"] == "started"
    assert events[-1]["message_type"] == "summary"
    kinds = [e["type"] for e in events if e["message_type"] == "record"]
    assert kinds == ["header", "run", "epoch", "epoch", "backend", "epoch", "backend"]
    pid = next(e["pid"] for e in events if e.get("type") == "header")
    assert is_gone(pid)


def test_a_command_that_ends_by_itself_ends_the_measurement(house):
    done = house.checkpoint(
        *("measure", "--epochs", "9999", "--interval", "200ms", "--baseline", "0", "--backends", "content"),
        *("--", sys.executable, "-c", "import time; time.sleep(25)"),
    )
    assert done.returncode == 0, done.stderr
    assert "it ended early: target gone" in done.stdout
    gone = house.checkpoint("measure", "--warmup", "2s", "--", "true")
    assert gone.returncode == 4
    assert "before it could be measured" in gone.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_what_was_measured(house, target, tmp_path, number, status):
    out = tmp_path / "record.jsonl"
    command = house.command(
        *("measure", "-p", str(target.pid), "--interval", "200ms", "--epochs", "9999", "-o", str(out))
    )
    process = subprocess.Popen(
        [*command, "--baseline", "0"],
        env=house.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: out.exists() and '"type":"backend"' in out.read_text(), "the first epoch")
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == status, stderr
    assert "it ended early: interrupted" in stdout
    found = record.load(out)
    assert found.end["reason"] == "interrupted"
    assert found.end["epochs"] == max(found.runs[0].epochs) >= 1
    assert target.runs_on()
    wait_until(lambda: agents(house) == [], "the agent to end")


def test_killing_the_agent_at_any_time_leaves_the_target_running(house, target, tmp_path):
    for round_ in range(3):
        out = tmp_path / f"record-{round_}.jsonl"
        command = house.command(
            *("measure", "-p", str(target.pid), "--interval", "20ms", "--epochs", "9999", "-o", str(out))
        )
        process = subprocess.Popen(
            [*command, "--baseline", "0"],
            env=house.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        (agent,) = wait_until(lambda: agents(house), "the agent")
        wait_until(lambda out=out: out.exists() and '"epoch":2' in out.read_text(), "an epoch")
        os.kill(agent, signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "killed by SIGKILL" in stderr
        assert "it ended early: failed" in stdout
        assert target.runs_on()


def test_a_client_that_dies_leaves_an_operation_that_can_be_cancelled(house, target, tmp_path):
    out = tmp_path / "record.jsonl"
    command = house.command(
        "measure", "-p", str(target.pid), "--interval", "200ms", "--epochs", "9999", "-o", str(out)
    )
    process = subprocess.Popen(
        command, env=house.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: agents(house), "the agent")
    process.kill()
    process.wait()

    def running():
        status = json.loads(house.checkpoint("status", "--json").stdout)
        return [o["id"] for o in status["operations"] if o["state"] == "running"]

    wait_until(lambda: not running(), "the service to end what nobody listens to")
    assert target.runs_on()


def test_a_freeze_that_takes_too_long_ends_the_measurement(house, target):
    done = house.checkpoint("measure", "-p", str(target.pid), "--baseline", "0", "--max-frozen", "1us")
    assert done.returncode == 14
    assert "--max-frozen" in done.stderr
    assert target.runs_on()


def test_a_tracked_process_is_not_measured(house, target):
    assert house.checkpoint("track", "-p", str(target.pid), "--backend", "content").returncode == 0
    done = house.checkpoint("measure", "-p", str(target.pid), "--epochs", "1")
    assert done.returncode == 11
    assert "checkpoint untrack" in done.stderr
    tracked = json.loads(house.checkpoint("status", "--json").stdout)["targets"]
    assert [t["pid"] for t in tracked] == [target.pid]


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (("measure",), 2, "give either -p PID or -- CMD"),
        (("measure", "-p", "1", "--", "true"), 2, "give either -p PID or -- CMD"),
        (("measure", "-p", "999999999"), 4, "no process"),
        (("measure", "-p", "{pid}", "--backends", "magic"), 2, "no backend named 'magic'"),
        (("measure", "-p", "{pid}", "--interval", "1ms"), 2, "10 ms"),
        (("measure", "-p", "{pid}", "-o", "{existing}"), 2, "exists already"),
        (("measure", "--", "/no/such/program"), 2, "cannot run"),
        (("report", "/no/such/file"), 2, "cannot read"),
        (("report", "{existing}"), 2, "no record"),
    ],
)
def test_each_mistake_has_its_sentence(house, target, tmp_path, words, status, sentence):
    existing = tmp_path / "existing"
    existing.write_text("{}\n")
    done = house.checkpoint(*(word.format(pid=target.pid, existing=existing) for word in words))
    assert done.returncode == status, done.stderr
    assert sentence in done.stderr
    assert existing.read_text() == "{}\n"


def test_missed_pages_are_named_and_fail_the_command(tmp_path, target):
    """With an agent that sends a record in which a page was missed."""
    lines = RECORD.read_text().splitlines()
    lost = json.loads(next(line for line in lines if '"backend":"uffd-wp"' in line and '"epoch":1' in line))
    where = "7e0000002000 in 7e0000000000-7e00007d0000 rw-p"
    lost |= {"pages_missed": 1, "missed": [{"page": where, "why": "it is gone"}]}
    broken = tmp_path / "broken.jsonl"
    # what is only advice is no miss of a backend's, and not what is named
    advice = lost | {"backend": "soft-dirty bit", "advisory": True, "pages_missed": 7}
    kept = [*lines[:2], *lines[4:6], record.line(advice), record.line(lost)]
    broken.write_text("\n".join(kept) + "\n")
    found = House(tmp_path / "house")
    found.directory.mkdir()
    try:
        found.serve(FAKE_AGENT_RECORD=str(broken))
        taken = tmp_path / "taken.jsonl"
        done = found.checkpoint("measure", "-p", str(target.pid), "-o", str(taken))
        assert done.returncode == 16
        assert json.loads(taken.read_text().splitlines()[-1])["pages_missed"] == 1
        assert "MISSED PAGES" in done.stdout
        assert "uffd-wp did not report 1 pages in epoch 1" in done.stderr
        assert where in done.stderr
    finally:
        found.close()
