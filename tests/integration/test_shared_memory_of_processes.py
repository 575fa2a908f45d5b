# SPDX-License-Identifier: Apache-2.0
"""Two processes in one address space (clone with CLONE_VM, without CLONE_THREAD): no freeze stops the other."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointd.dump.dump import Dumper, DumpOptions
from checkpointd.errors import Unsupported
from checkpointd.image.store import Store
from checkpointd.procfs import process

pytestmark = pytest.mark.needs("ptrace", "gcc")
_SOURCE = r"""
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <unistd.h>
static char stack[65536];
static int other(void *unused) { prctl(PR_SET_PDEATHSIG, SIGKILL); for (;;) pause(); }
int main(void)
{
	int pid = clone(other, stack + sizeof(stack), CLONE_VM | SIGCHLD, 0);
	printf("%d\n", pid);
	fflush(stdout);
	for (;;)
		pause();
}
"""


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[int, int]]:
    (tmp_path / "pair.c").write_text(_SOURCE)
    subprocess.run(["gcc", "-O1", "-o", tmp_path / "pair", tmp_path / "pair.c"], check=True)
    program = subprocess.Popen([tmp_path / "pair"], stdout=subprocess.PIPE)
    assert program.stdout is not None
    yield program.pid, int(program.stdout.readline())
    program.kill()
    program.wait()


def test_it_is_refused_from_either_side_and_runs_on(pair: tuple[int, int], tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    for pid, other in (pair, pair[::-1]):
        dumper = Dumper(pid)
        try:
            with pytest.raises(Unsupported, match=f"process {other} runs in the same memory"):
                dumper.dump(DumpOptions(store=str(tmp_path / "store")))
        finally:
            dumper.close()
        assert process.read_stat(pid).state == "S"
    assert store.images() == []
