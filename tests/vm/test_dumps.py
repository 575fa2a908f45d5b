# SPDX-License-Identifier: Apache-2.0
"""Whole dumps, incremental dumps and restores on kernels of the lab, judged by the oracle, for each backend.

The same histories and the same judge as tests/integration/test_oracle.py, fewer and shorter: these guests are emulated.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import abilities
from tests.oracle import history, truth
from tests.oracle.binding import CheckpointdEngine
from tests.oracle.campaign import play
from tests.oracle.judge import judge
from tests.oracle.target import OracleTarget

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("CHECKPOINTD_VM_KERNEL"),
        reason="needs a kernel of the lab: run it with python -m tests.vm",
    ),
    pytest.mark.needs("root", "ptrace", "gcc"),
]
NEEDED = {
    "soft-dirty": ("soft_dirty",),
    "precise-soft-dirty": ("soft_dirty", "precise"),
    "barrier-soft-dirty": ("soft_dirty", "merge_barrier"),
    "content": (),
}
KSM = Path("/sys/kernel/mm/ksm")


def _engine(backend: str) -> CheckpointdEngine:
    abilities.require(*NEEDED[backend])
    if backend == "precise-soft-dirty" and not os.environ["CHECKPOINTD_VM_KERNEL"].endswith("-precise"):
        pytest.skip("needs the patch")
    return CheckpointdEngine(backend, "stopped")


@pytest.mark.parametrize("backend", list(NEEDED))
@pytest.mark.parametrize("seed", [1000])
def test_every_generation_is_true(backend: str, seed: int) -> None:
    lines = history.generate(seed, nr_freezes=4, ops_per_freeze=12)
    verdict = play(lines, lambda: _engine(backend))
    assert not verdict.findings, "\n".join([f"seed {seed}, line {verdict.at}:", *verdict.findings])
    assert verdict.nr_generations >= 4
    # the first may be anything; what follows was tracked unless the history itself made us lose it
    assert verdict.backends[backend] >= 1, verdict.backends


@pytest.fixture
def target() -> Iterator[OracleTarget]:
    with OracleTarget() as made:
        for line in ("map 0 anon 0 60", "write 0 fill 0 60 100", "map 1 anon 0 40", "write 1 fill 0 40 500"):
            assert made.play(line) >= 0, line
        yield made


def _freeze(target: OracleTarget, engine: CheckpointdEngine, *, incremental: bool) -> dict[str, int]:
    target.settle()
    before = truth.take(target.pid)
    image = engine.dump(target.pid, incremental=incremental)
    target.settle()
    assert judge(before, truth.take(target.pid), image) == []
    assert image.backend == ("content" if image.stats["backend"] == "content" else engine.name.split("/")[0])
    return image.stats


@pytest.mark.parametrize("backend", ["precise-soft-dirty", "barrier-soft-dirty"])
def test_exact_backends_read_what_was_written_and_inherit_the_rest(
    target: OracleTarget, backend: str
) -> None:
    engine = _engine(backend)
    try:
        _freeze(target, engine, incremental=False)
        _freeze(target, engine, incremental=True)
        target.play("write 0 fill 10 5 3000")
        target.play("next 2 anon 0 30 0 0")
        target.play("write 2 fill 0 30 70")
        stats = _freeze(target, engine, incremental=True)
        # five pages and thirty new ones, and the few a program touches by running
        assert stats["pages_written"] <= 35 + 12
        assert stats["pages_skipped_parent"] >= 95 - 12
    finally:
        engine.close()


@pytest.mark.parametrize("backend", ["soft-dirty", "precise-soft-dirty", "barrier-soft-dirty"])
def test_foreign_clear_costs_a_content_pass_and_no_data(target: OracleTarget, backend: str) -> None:
    engine = _engine(backend)
    try:
        _freeze(target, engine, incremental=False)
        target.play("write 0 fill 10 5 3000")
        Path(f"/proc/{target.pid}/clear_refs").write_text("4")
        stats = _freeze(target, engine, incremental=True)
        assert stats["backend"] == "content"
        assert any("somebody else cleared" in warning for warning in stats["warnings"])
        assert 5 <= stats["pages_written"] <= 5 + 12
        target.play("write 1 fill 3 2 900")
        assert _freeze(target, engine, incremental=True)["backend"] == backend
    finally:
        engine.close()


@pytest.mark.parametrize("backend", ["precise-soft-dirty", "barrier-soft-dirty"])
def test_real_criu_between_two_dumps_is_noticed(target: OracleTarget, backend: str, tmp_path: Path) -> None:
    """`criu pre-dump` clears soft-dirty bits: what was written before it must still be in our next image."""
    abilities.require("criu")
    criu = shutil.which("criu", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    assert criu is not None
    engine = _engine(backend)
    try:
        _freeze(target, engine, incremental=False)
        target.play("write 0 fill 10 5 3000")
        done = subprocess.run(
            [criu, "pre-dump", "--track-mem", "-t", str(target.pid), "-D", str(tmp_path), "--shell-job"],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        complaint = (done.stderr or done.stdout).strip()[-300:]
        if done.returncode and not os.environ["CHECKPOINTD_VM_KERNEL"].startswith("6.1-"):
            pytest.skip(f"Debian's criu is known to run on 6.1; here it says: {complaint}")
        assert done.returncode == 0, complaint
        target.settle()
        stats = _freeze(target, engine, incremental=True)
        assert stats["backend"] == "content", stats["backend_reason"]
    finally:
        engine.close()


@pytest.mark.parametrize("backend", ["precise-soft-dirty", "barrier-soft-dirty", "content"])
@pytest.mark.needs("set_tid")
def test_generation_comes_back_and_is_tracked_on(backend: str) -> None:
    lines = [
        "map 0 anon 0 60", "write 0 fill 0 60 100", "freeze", "write 0 fill 4 9 700", "freeze", "restore 0",
        "write 0 fill 30 3 900", "freeze", "restore 1", "freeze",
    ]  # fmt: skip
    verdict = play(lines, lambda: _engine(backend))
    assert not verdict.findings, "\n".join([f"line {verdict.at}:", *verdict.findings])
    assert verdict.nr_restores == 2
