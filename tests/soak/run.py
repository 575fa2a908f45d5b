# SPDX-License-Identifier: Apache-2.0
"""The kill campaign: agents are killed at every trace point and at random instants, targets must not notice.

    python -m tests.soak.run --kills 10000 --seed 1 --output soak.json

Writes FILE.json and FILE.md; ends with status 1 when a target was harmed.  A harmed target is recorded with
what was done to it, replaced, and the campaign goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.soak import lab
from tests.soak.sessions import ALL

SESSION_WEIGHTS = {"plain": 1, "inject": 4, "twice": 2, "copy": 3, "fail": 1, "dump": 2}
MAX_RANDOM_DELAY_US = {"dump": 400_000}  # other sessions: 12 ms


def scenarios(programs: dict[str, Path]) -> Iterator[tuple[str, str, bool]]:
    """(program, mode, without a rendezvous signal?)"""
    for mode in lab.C_MODES:
        yield "dynamic", mode, False
    for mode in ("regs", "nanosleep", "futex", "rseq", "threads9"):
        yield "static", mode, False
    for mode in ("regs", "nanosleep", "read", "signals", "altstack"):
        yield "dynamic", mode, True
    for program in ("nolibc", "go"):
        if program in programs:
            yield program, "", False
            yield program, "", True


class Campaign:
    def __init__(self, programs: dict[str, Path], where: Path, seed: int) -> None:
        self.programs, self.where = programs, where
        self.random = random.Random(seed)
        self.tally = lab.Tally()
        self.by_target: Counter[str] = Counter()
        self.by_session: Counter[str] = Counter()

    def run_scenario(self, program: str, mode: str, sig0: bool, nr_kills: int) -> None:
        """About `nr_kills` kills on one fresh target: half at trace points, half at random instants."""
        name = f"{program} {mode}".strip() + (" (no signal)" if sig0 else "")
        start = self.tally.kills
        with lab.Zygote(self.where / "stores") as zygote:
            target = lab.Target(self.programs, program, mode, self.where)
            try:
                points = {s: lab.dry_run(zygote, target, s, sig0=sig0) for s in ALL}
                sessions = self.random.choices(list(ALL), [SESSION_WEIGHTS[s] for s in ALL], k=nr_kills)
                for number, session in enumerate(sessions):
                    if number % 2:
                        at = self.random.randrange(len(points[session]))
                        lab.kill_at(
                            zygote, target, session, at + 1, self.tally, points[session][at], sig0=sig0
                        )
                    else:
                        delay_us = self.random.randrange(MAX_RANDOM_DELAY_US.get(session, 12_000))
                        lab.kill_after(zygote, target, session, delay_us, self.tally, sig0=sig0)
                    self.by_session[session] += 1
                lab.finish(zygote, target)
                target.stop()
            except lab.Harmed as error:
                self.tally.failures.append(f"{name}: {error}")
                target.kill()
            except BaseException:
                target.kill()
                raise
        self.by_target[name] += self.tally.kills - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("soak-result.json"))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave no target behind
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        programs = lab.build(where)
        campaign = Campaign(programs, where, args.seed)
        chosen = list(scenarios(programs))
        while campaign.tally.kills < args.kills:
            for number, (program, mode, sig0) in enumerate(chosen):
                missing = args.kills - campaign.tally.kills
                if missing <= 0:
                    break
                # rounds of at most 100 a target, so that an interrupted campaign has seen them all
                share = min(100, max(5, -(-missing // (len(chosen) - number))))
                campaign.run_scenario(program, mode, sig0, share)
                print(
                    f"{campaign.tally.kills} kills, {len(campaign.tally.failures)} failures, "
                    f"{time.time() - began:.0f} s: {program} {mode}{' (no signal)' if sig0 else ''}",
                    file=sys.stderr,
                    flush=True,
                )
                write(args, campaign, began)
    return 1 if campaign.tally.failures else 0


def write(args: argparse.Namespace, campaign: Campaign, began: float) -> None:
    """The result so far, as JSON and as a table."""
    tally = campaign.tally
    result = {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "seed": args.seed,
        "seconds": round(time.time() - began),
        "kills": tally.kills,
        "sessions_finished_before_the_kill": tally.sessions - tally.kills,
        "harmed": tally.failures,
        "by_target": dict(campaign.by_target),
        "by_session": dict(campaign.by_session),
        "by_point": dict(sorted(tally.points.items(), key=lambda item: -item[1])),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"{tally.kills} agents killed, {len(tally.failures)} targets harmed "
        f"(kernel {result['kernel']}, seed {args.seed}, {result['seconds']} s)",
        "",
        "| target | kills |",
        "|---|---|",
        *(f"| {name} | {nr} |" for name, nr in campaign.by_target.items()),
        "",
        "| killed at | times |",
        "|---|---|",
        *(f"| {name} | {nr} |" for name, nr in result["by_point"].items()),
        *(["", "Harmed:", "", *(f"* {text}" for text in tally.failures)] if tally.failures else []),
    ]
    args.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
