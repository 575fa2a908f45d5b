# SPDX-License-Identifier: Apache-2.0
"""Run in a guest: `dump DIRECTORY` in one boot, `restore DIRECTORY` in another; the directory is what both share.

The programs are restore_python_program.py, which checks its own memory, threads and forks, and restore_clocks (built
into DIRECTORY), which checks that the clocks go on.  Prints one JSON document; what goes wrong ends it with a
traceback.  No numpy: QEMU 7.2 faults at masked vector loads that end beside unmapped memory.
"""

from __future__ import annotations

import faulthandler
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from checkpointd.procfs.process import boot_id, time_offsets
from checkpointd.restore.restorer import RestoreOptions
from checkpointd.state.files import FilesOptions
from tests.programs.restore_harness import capture, restore

PYTHON_PROGRAM = Path(__file__).with_name("restore_python_program.py")
PLACES = [Path("/dev/shm/python"), Path("/dev/shm/clocks")]  # only the guest's memory


def wait_rounds(path: Path, *counters: int) -> list[int]:
    """The numbers a program writes to `path`, once those at the places `counters` have grown."""
    first: list[int] = []
    deadline = time.monotonic() + 300
    while True:
        now = [int(word) for word in path.read_text().split()] if path.exists() else []
        if len(now) >= 3:
            first = first or now
            if all(now[at] > first[at] + 3 for at in counters):
                return now
        assert time.monotonic() < deadline, now
        time.sleep(0.1)


def main() -> None:
    faulthandler.dump_traceback_later(400, exit=True)
    phase, shared = sys.argv[1], Path(sys.argv[2])
    if phase == "dump":
        # a fresh boot has given away the low ones by the time of the restore; small kernels have no more than 4096
        Path("/proc/sys/kernel/ns_last_pid").write_text("3000")
        null = subprocess.DEVNULL
        children = [
            subprocess.Popen(words, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/")
            for words in ([sys.executable, PYTHON_PROGRAM, PLACES[0]], [shared / "clocks", PLACES[1], "1000"])
        ]
        wait_rounds(PLACES[0], 1, 2)
        wait_rounds(PLACES[1], 0, 1)
        found = [capture(child.pid, kill=True) for child in children]
        words = [path.read_bytes() for path in PLACES]
        (shared / "images").write_bytes(pickle.dumps((found, words)))
        answer = {
            "boot": boot_id(),
            "pids": [child.pid for child in children],
            "rounds": int(words[0].split()[1]),
            "monotonic_ns": found[1].state.process.host.monotonic_ns,
        }
    else:
        found, words = pickle.loads((shared / "images").read_bytes())
        for path, content in zip(PLACES, words, strict=True):
            path.write_bytes(content)
        own_ns = time.monotonic_ns()
        options = RestoreOptions(files=FilesOptions(changed="allow"))  # the files are new ones
        restored = [restore(one, options=options) for one in found]
        python, clocks = wait_rounds(PLACES[0], 1, 2), wait_rounds(PLACES[1], 0, 1)
        answer = {
            "boot": boot_id(),
            "pids": [one.pid for one in restored],
            "rounds": python[1],
            "monotonic_ns": clocks[2],
            "own_monotonic_ns": own_ns,
            "offsets": [list(time_offsets(one.pid)) for one in restored],
            "warnings": [one.warnings for one in restored],
        }
    print(json.dumps(answer))


main()
