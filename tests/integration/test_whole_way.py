# SPDX-License-Identifier: Apache-2.0
"""The whole way, as a user walks it: dump, dump --incremental, kill, restore, and on, by the command alone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "programs" / "whole_program.py"
COMMAND = Path(sys.executable).parent / "checkpoint"


@pytest.fixture
def run_checkpoint(tmp_path):
    """Run the command against a service and a store of this test alone."""
    if os.geteuid() != 0:
        pytest.skip("restoring with the same pid needs CAP_CHECKPOINT_RESTORE")
    environment = {
        **os.environ,
        # root's runtime directory is the same for everybody: other tests' services come and go there
        "CHECKPOINT_SOCKET": str(tmp_path / "run" / "s.sock"),
        "CHECKPOINT_STORE": str(tmp_path / "store"),
        "HOME": str(tmp_path),
    }

    def run(*args, check=True):
        done = subprocess.run(
            [COMMAND, *args, "--json"], capture_output=True, text=True, timeout=120, env=environment
        )
        if check:
            assert done.returncode == 0, done.stderr + done.stdout
        try:  # one document, or JSON lines of which the last is the summary
            return done, json.loads(done.stdout or "{}")
        except ValueError:
            return done, json.loads(done.stdout.splitlines()[-1])

    yield run
    subprocess.run([COMMAND, "serve", "--stop"], capture_output=True, timeout=60, env=environment)


class Program:
    def __init__(self, log: Path):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, log],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self.process.pid
        self.wait_for_steps(3)

    def steps(self):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        assert "broken" not in lines
        return len(lines)

    def wait_for_steps(self, more):
        goal, deadline = self.steps() + more, time.monotonic() + 30
        while self.steps() < goal:
            assert time.monotonic() < deadline, "the program does not go on"
            time.sleep(0.01)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            self.process.wait()


@pytest.fixture
def program(tmp_path):
    made = Program(tmp_path / "log")
    yield made
    made.end()


def blocked_signals(pid):
    """Of every thread; those that make a restored process have blocked some themselves."""
    found = [Path(f"/proc/{pid}/task/{tid}/status").read_text() for tid in os.listdir(f"/proc/{pid}/task")]
    return [line for text in found for line in text.splitlines() if line.startswith("SigBlk")]


def test_any_generation_comes_back_and_the_chain_goes_on(run_checkpoint, program):
    mask = blocked_signals(program.pid)
    _, first = run_checkpoint("dump", "-p", str(program.pid))
    assert first["incremental"] is False
    program.wait_for_steps(5)
    _, second = run_checkpoint("dump", "--incremental", "-p", str(program.pid))
    assert second["incremental"] is True
    assert second["parent_id"] == first["image_id"]
    assert second["pages_written"] < first["pages_written"]
    program.wait_for_steps(5)
    _, third = run_checkpoint("dump", "--incremental", "-p", str(program.pid))
    program.wait_for_steps(1)
    program.kill()

    _, restored = run_checkpoint("restore", third["image_id"])
    assert restored["pid"] == program.pid
    assert blocked_signals(program.pid) == mask
    program.wait_for_steps(5)
    _, fourth = run_checkpoint("dump", "--incremental", "-p", str(program.pid))
    assert fourth["incremental"] is True
    assert fourth["parent_id"] == third["image_id"]
    assert fourth["pages_skipped_parent"] > 0
    program.wait_for_steps(3)

    os.kill(program.pid, signal.SIGKILL)
    _, again = run_checkpoint("restore", first["image_id"])
    assert again["pid"] == program.pid
    program.wait_for_steps(5)


def test_generations_of_differences_come_back_and_the_chain_goes_on(run_checkpoint, program):
    """Five generations, the first one removed: the program, which checks its own memory, goes on from each."""
    ids = []
    for generation in range(5):
        delta = ["--incremental", "--delta"] if generation else []
        _, made = run_checkpoint("dump", "-p", str(program.pid), *delta)
        assert made["pages_delta"] > 0 if generation else made["pages_delta"] == 0
        assert made["pages_delta"] <= made["pages_written"]
        ids.append(made["image_id"])
        program.wait_for_steps(3)
    _, listed = run_checkpoint("ls")
    assert [image["format_version"] for image in listed["images"]] == [1, 2, 2, 2, 2]
    assert [image["pages_delta"] > 0 for image in listed["images"]] == [False, True, True, True, True]
    run_checkpoint("rm", ids[0])
    run_checkpoint("verify")
    program.kill()
    for image_id in (ids[4], ids[1], ids[3]):
        run_checkpoint("restore", image_id)
        program.wait_for_steps(3)
        _, made = run_checkpoint("dump", "--incremental", "--delta", "-p", str(program.pid))
        assert made["parent_id"] == image_id
        assert made["pages_skipped_parent"] > 0
        os.kill(program.pid, signal.SIGKILL)
    run_checkpoint("restore", made["image_id"])
    program.wait_for_steps(3)


def test_a_restored_process_has_its_parent_after_the_service_was_restarted(run_checkpoint, program):
    _, first = run_checkpoint("dump", "--kill", "-p", str(program.pid))
    program.process.wait(timeout=30)
    run_checkpoint("restore", first["image_id"])
    program.wait_for_steps(3)
    run_checkpoint("serve", "--stop")
    _, second = run_checkpoint("dump", "--incremental", "-p", str(program.pid))
    assert second["parent_id"] == first["image_id"]
    assert second["backend"] == "content"  # nobody tracked it since
    assert second["pages_same"] > 0
    assert not any("first generation" in warning for warning in second["warnings"])
    program.wait_for_steps(3)
    run_checkpoint("serve", "--stop")
    _, third = run_checkpoint("dump", "--incremental", "-p", str(program.pid))
    assert third["parent_id"] == second["image_id"]  # its own image comes before the one it was restored from

    os.kill(program.pid, signal.SIGKILL)
    run_checkpoint("restore", second["image_id"])  # which proves by itself that its memory is right
    program.wait_for_steps(5)


def test_dump_kill_ends_the_target_only_after_the_image_is_safe(run_checkpoint, program):
    _, made = run_checkpoint("dump", "--kill", "-p", str(program.pid))
    assert program.process.wait(timeout=30) == -signal.SIGKILL
    run_checkpoint("verify", made["image_id"])
    run_checkpoint("restore", "latest")
    program.wait_for_steps(5)


def test_exported_image_restores_from_another_store(run_checkpoint, program, tmp_path):
    run_checkpoint("dump", "-p", str(program.pid))
    _, second = run_checkpoint("dump", "--incremental", "-p", str(program.pid))
    portable = tmp_path / "image.ckpt"
    run_checkpoint("export", second["image_id"], "-o", str(portable))
    for image in ("latest", "latest"):
        run_checkpoint("rm", image)
    program.kill()
    run_checkpoint("import", str(portable))
    run_checkpoint("restore", "latest")
    program.wait_for_steps(5)


def test_max_frozen_refuses_and_the_target_runs_on(run_checkpoint, program):
    done, _ = run_checkpoint("dump", "--max-frozen", "1us", "-p", str(program.pid), check=False)
    assert done.returncode == 14, done.stderr
    program.wait_for_steps(3)
    _, made = run_checkpoint("dump", "-p", str(program.pid))
    assert made["pages_written"] > 0
