# SPDX-License-Identifier: Apache-2.0
"""What `checkpoint check -p PID` says of a process: what a dump would refuse, and what it would warn of."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpointd.agent import check
from checkpointd.errors import Unsupported
from checkpointd.state.files import FilesOptions
from tests.programs.restore_harness import capture

pytestmark = pytest.mark.needs("root", "ptrace")


@contextlib.contextmanager
def program(code: str) -> Iterator[int]:
    """A Python program that has run `code`, and sleeps; its children die with it."""
    started = subprocess.Popen(
        [sys.executable, "-c", f"import os, time\n{code}\nprint('ready', flush=True)\ntime.sleep(600)"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        assert started.stdout is not None
        assert started.stdout.readline() == b"ready\n"
        yield started.pid
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.communicate()


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def said_of(pid: int) -> list[dict[str, Any]]:
    return [item for item in check.check(pid).items if item["name"] == f"process {pid}"]


def test_a_process_without_peculiarities_has_no_warnings() -> None:
    with program("") as pid:
        (item,) = said_of(pid)
    assert (item["ok"], item["detail"]) == (True, "can be dumped and restored")


def test_check_warns_of_what_a_dump_warns_of() -> None:
    sharing_parent = (
        "import mmap\narea = mmap.mmap(-1, 8192)\nif os.fork() == 0:\n    time.sleep(600)\n    os._exit(0)"
    )
    with program(sharing_parent) as pid:
        (child,) = children_of(pid)
        first, *warnings = said_of(pid)
        told = [f"warning: {warning}" for warning in capture(pid, with_files=False).state.process.warnings]
    assert first["detail"] == "can be dumped and restored, with 2 warnings:"
    assert all(item["ok"] and item["category"] == "target" for item in (first, *warnings))
    children, memory = (item["detail"] for item in warnings)
    assert f"1 child process(es) ({child})" in children
    assert f"with process {child} (" in memory
    assert {children, memory} <= set(told)


def test_what_a_dump_refuses_does_not_hide_what_it_would_warn_of() -> None:
    unsharing_parent = (
        "import ctypes\nif os.fork() == 0:\n    time.sleep(600)\n    os._exit(0)\n"
        "assert ctypes.CDLL(None).unshare(0x04000000) == 0"  # CLONE_NEWUTS
    )
    with program(unsharing_parent) as pid:
        refused, warned = said_of(pid)
    assert not refused["ok"]
    assert "uts namespace" in refused["detail"]
    assert warned["ok"]
    assert warned["detail"].startswith("warning: it has 1 child process(es)")


@pytest.mark.needs("memfd_secret")
@pytest.mark.parametrize("nr_mappings", [1, 2, 5])
def test_secret_memory_is_named_once_with_what_to_do(nr_mappings: int) -> None:
    code = (
        "import ctypes, mmap\nfd = ctypes.CDLL(None).syscall(447, 0)\nos.ftruncate(fd, 8192)\n"
        # every other mapping is read-only, so that neighbours do not become one
        f"maps = [mmap.mmap(fd, 8192, prot=1 + 2 * (i % 2)) for i in range({nr_mappings})]\nos.close(fd)"
    )
    with program(code) as pid:
        items = [item for item in said_of(pid) if "secret memory (memfd_secret)" in item["detail"]]
        with pytest.raises(Unsupported) as refused:
            check.refuse_blockers(pid, FilesOptions())
    assert len(items) == 1
    assert "have it unmap" in items[0]["detail"]
    assert refused.value.details["blockers"].count(items[0]["detail"]) == 1
    assert items[0]["detail"] in refused.value.message


def as_root_without(name: str, code: str) -> str:
    """What Python code prints as a root from whom a container withholds a capability."""
    done = subprocess.run(
        ["setpriv", f"--bounding-set=-{name}", f"--inh-caps=-{name}", sys.executable, "-c", code],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return done.stdout


def test_a_root_that_may_not_trace_is_told_why() -> None:
    code = (
        "from checkpointd.agent import check\nfrom checkpointd.errors import NotPermitted\n"
        "try: check.refuse_impossible({pid})\nexcept NotPermitted as error: print(error.message, error.hint)"
    )
    with program("") as pid:
        said = as_root_without("sys_ptrace", code.format(pid=pid))
    assert f"process {pid} (python" in said
    assert "may not be traced by this root" in said
    assert "CAP_SYS_PTRACE is withheld from this root" in said
    assert "as root" not in said


def test_a_root_without_a_capability_is_told_what_is_lost() -> None:
    said = as_root_without(
        "sys_resource",
        "from checkpointd.agent import check\n"
        "print([one['hint'] for one in check.check(None).items if one['name'] == 'CAP_SYS_RESOURCE'][0])",
    )
    assert "withheld from this root" in said
    assert "--cap-add SYS_RESOURCE" in said
    assert "hard limits" in said
    assert "run as root" not in said
