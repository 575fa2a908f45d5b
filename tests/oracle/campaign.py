# SPDX-License-Identifier: Apache-2.0
"""Play a history against an engine, judge every generation, and shrink a history that fails."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from tests.oracle import truth
from tests.oracle.engine import PRIVATE, Engine, EngineFactory, Generation, Pages, Refused
from tests.oracle.judge import judge, same_memory
from tests.oracle.target import OracleTarget, TargetDied
from tests.oracle.truth import PAGE

RUNNING_STATES = "RSD"
T = TypeVar("T")


@dataclass
class Verdict:
    """What came of one history.

    Attributes:
        findings: what is wrong; empty when nothing is.
        at: index of the line after which it was seen.
        nr_generations, nr_pages: what was compared.
        backends: how often each backend ran.
    """

    findings: list[str] = field(default_factory=list)
    at: int = -1
    nr_generations: int = 0
    nr_pages: int = 0
    nr_inherited: int = 0
    nr_refused: int = 0
    nr_restores: int = 0
    backends: Counter[str] = field(default_factory=Counter)

    def add(self, other: Verdict) -> None:
        self.nr_generations += other.nr_generations
        self.nr_pages += other.nr_pages
        self.nr_inherited += other.nr_inherited
        self.nr_refused += other.nr_refused
        self.nr_restores += other.nr_restores
        self.backends += other.backends


def play(lines: list[str], make_engine: EngineFactory) -> Verdict:
    """Play all lines with a fresh target and a fresh engine; stops at the first generation that is wrong.

    At the end every generation is judged once more: a later dump must not change an earlier image.
    """
    verdict = Verdict()
    kept: list[tuple[truth.Truth, truth.Truth, Generation]] = []
    with OracleTarget() as target:
        engine = make_engine()
        try:
            for n, line in enumerate(lines):
                verdict.at = n
                word = line.split()[0]
                if word in ("freeze", "fullfreeze"):
                    incremental = word == "freeze" and bool(kept)
                    kept.append(_freeze(target, engine, incremental, verdict))
                elif word == "failfreeze":
                    if kept:
                        _refusing(target, verdict, lambda: engine.fail(target.pid))
                elif word == "restore":
                    if kept:
                        before, _, image = kept[-1 - int(line.split()[1]) % len(kept)]
                        target.kill()
                        target.end_relatives()
                        target.came_back(engine.restore(image))
                        target.settle()
                        verdict.findings += same_memory(before, truth.take(target.pid))
                        verdict.nr_restores += 1
                elif word in ("stormfreeze", "directfreeze"):
                    _storm(target, engine, line, bool(kept), verdict)
                elif word == "exec":
                    target.tell("exec 0")
                else:
                    target.play(line)
                if verdict.findings:
                    return verdict
            verdict.at = len(lines)
            for k, (before, after, image) in enumerate(kept):
                for finding in judge(before, after, image):
                    verdict.findings.append(f"generation {k}, read again at the end: {finding}")
        except TargetDied as error:
            verdict.findings.append(str(error))
        finally:
            engine.close()
    return verdict


def _freeze(
    target: OracleTarget, engine: Engine, incremental: bool, verdict: Verdict
) -> tuple[truth.Truth, truth.Truth, Generation]:
    target.settle()
    before = truth.take(target.pid)
    state = target.state()

    def dump() -> Generation:
        nonlocal before
        target.settle()
        before = truth.take(target.pid)
        return engine.dump(target.pid, incremental=incremental)

    image = _refusing(target, verdict, dump)
    target.settle()
    after = truth.take(target.pid)
    target.tell("ping")
    if target.state() not in RUNNING_STATES:
        verdict.findings.append(f"the target was in state {state}, after the dump in {target.state()}")
    verdict.findings += judge(before, after, image)
    verdict.nr_generations += 1
    verdict.nr_pages += len(before.private.pages) + sum(len(c.pages) for _, c in before.shared.values())
    verdict.nr_inherited += int(image.stats.get("pages_skipped_parent", 0))
    verdict.backends[image.backend] += 1
    return before, after, image


def _refusing(target: OracleTarget, verdict: Verdict, dump: Callable[[], T]) -> T:
    """A dump; what may be refused (an open io_uring, a userfaultfd of the target's own) is closed and it goes on."""
    try:
        return dump()
    except Refused:
        verdict.nr_refused += 1
        target.tell("ring 0 close")
        try:
            return dump()
        except Refused:
            target.tell("uffd 0 off")
            return dump()


def _storm(target: OracleTarget, engine: Engine, line: str, has_parent: bool, verdict: Verdict) -> None:
    word, slot, pages = line.split()
    nr_pages = int(pages)
    is_direct = word == "directfreeze"
    at = target.tell(f"storm {slot} {'direct' if is_direct else 'start'} 0 {nr_pages}")
    if at < 0:
        return
    image = _refusing(target, verdict, lambda: engine.dump(target.pid, incremental=has_parent))
    target.tell(f"storm {slot} stop")
    numbers = np.arange(at // PAGE, at // PAGE + nr_pages, dtype=np.uint64)
    if not np.isin(numbers, image.pages(PRIVATE)).all():
        verdict.findings.append("storm: pages that were written are not in the image")
        return
    if is_direct:
        _judge_direct(target, image.read(PRIVATE, numbers), verdict)
        return
    words = image.read(PRIVATE, numbers).reshape(-1, PAGE)[:, :8].copy().view(np.uint64).reshape(-1)
    steps = np.diff(words.astype(np.int64))
    drops = np.flatnonzero(steps)
    if len(drops) > 1 or (len(drops) == 1 and steps[drops[0]] != -1):
        verdict.findings.append(f"storm: the image is no single instant: rounds {words.tolist()}")


def _judge_direct(target: OracleTarget, held: Pages, verdict: Verdict) -> None:
    """Each page is zero (not written yet) or a whole page of the file: the disk was not caught half-way."""
    source = np.fromfile(target.directory / "disk.storm", dtype=np.uint8).reshape(-1, PAGE)
    known = {page.tobytes() for page in source} | {bytes(PAGE)}
    torn = [n for n, page in enumerate(held.reshape(-1, PAGE)) if page.tobytes() not in known]
    if torn:
        verdict.findings.append(f"directfreeze: pages {torn} are none that the disk had")


def shrink(lines: list[str], fails: Callable[[list[str]], bool], *, seconds: float = 120) -> list[str]:
    """A shorter history that still fails: halves, quarters, ... single lines are left out while it does."""
    deadline = time.monotonic() + seconds
    size = max(1, len(lines) // 2)
    while size >= 1:
        start = 0
        while start < len(lines):
            if time.monotonic() > deadline:
                return lines
            shorter = lines[:start] + lines[start + size :]
            if shorter and fails(shorter):
                lines = shorter
            else:
                start += size
        size //= 2
    return lines
