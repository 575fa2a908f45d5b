# SPDX-License-Identifier: Apache-2.0
"""The kill campaign: agents and services die at every trace point and at random instants, targets must not notice.

    python -m tests.soak.run --kills 10000 --seed 1 --output soak.json

Writes FILE.json and FILE.md after every target and goes on from there when it is started again with the same FILE
(`--anew` begins anew).  Ends with status 1 when a target was harmed: it is recorded with what was done to it,
replaced, and the campaign goes on.

Most kills are of agents forked from a warm process (`zygote`); about one in fifty is of a real service, its agent or
its page worker (`service`), which takes a hundred times as long.
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
from typing import Any

from tests.soak import lab, service
from tests.soak.sessions import ALL

SERVICE_KILLS = 2  # in a round of at most 100 kills of one target
SESSION_WEIGHTS = {"plain": 1, "inject": 4, "twice": 2, "copy": 3, "fail": 1, "dump": 3}
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
        self.nr_scenarios = 0
        self.seconds_before = 0.0
        self.kernels = {platform.release()}
        self.days: set[str] = set()

    def go_on_from(self, result: dict[str, Any], seed: int) -> None:
        """Take over what an interrupted campaign has done."""
        self.tally.kills = result["kills"]
        self.tally.sessions = result["sessions"]
        self.tally.failures = list(result["harmed"])
        self.tally.points = dict(result["by_point"])
        self.by_target = Counter(result["by_target"])
        self.by_session = Counter(result["by_session"])
        self.nr_scenarios = result["scenarios"]
        self.seconds_before = result["seconds"]
        self.kernels |= set(result["kernels"])
        self.days = set(result["days"])
        self.random = random.Random(
            f"{seed} {self.nr_scenarios}"
        )  # other dice than before, the same every time

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
                        at = self._pick(points[session])
                        lab.kill_at(
                            zygote, target, session, at + 1, self.tally, points[session][at], sig0=sig0
                        )
                    else:
                        delay_us = self.random.randrange(MAX_RANDOM_DELAY_US.get(session, 12_000))
                        lab.kill_after(zygote, target, session, delay_us, self.tally, sig0=sig0)
                    self.by_session[session] += 1
                # the sessions above leave the target as it was; the service's are judged the same way
                for _ in range(0 if sig0 else max(1, nr_kills * SERVICE_KILLS // 100)):
                    service.kill_in_service(target, self.where, self.random, self.tally)
                    self.by_session["service"] += 1
                lab.finish(zygote, target)
                target.stop()
            except lab.Harmed as error:
                self.tally.failures.append(f"{name}: {error}")
                target.kill()
            except BaseException:
                target.kill()
                raise
        self.by_target[name] += self.tally.kills - start
        self.nr_scenarios += 1
        self.days.add(time.strftime("%Y-%m-%d", time.gmtime()))

    def _pick(self, names: list[str]) -> int:
        """A point: any of the names first, then any of its hits, so that rare ones get their share."""
        name = self.random.choice(sorted(set(names)))
        return self.random.choice([at for at, other in enumerate(names) if other == name])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("soak-result.json"))
    parser.add_argument("--anew", action="store_true", help="forget what the output file says")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave no target behind
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        programs = lab.build(where)
        campaign = Campaign(programs, where, args.seed)
        if args.output.exists() and not args.anew:
            campaign.go_on_from(json.loads(args.output.read_text()), args.seed)
        chosen = list(scenarios(programs))
        while campaign.tally.kills < args.kills:
            for number, (program, mode, sig0) in enumerate(chosen):
                if number < campaign.nr_scenarios % len(chosen):
                    continue
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
        "kernels": sorted(campaign.kernels),
        "days": sorted(campaign.days),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "seed": args.seed,
        "seconds": round(campaign.seconds_before + time.time() - began),
        "scenarios": campaign.nr_scenarios,
        "kills": tally.kills,
        "sessions": tally.sessions,
        "harmed": tally.failures,
        "by_target": dict(campaign.by_target),
        "by_session": dict(campaign.by_session),
        "by_point": dict(sorted(tally.points.items(), key=lambda item: -item[1])),
    }
    fresh = args.output.with_suffix(".new")
    fresh.write_text(json.dumps(result, indent=1) + "\n")
    fresh.replace(args.output)  # a campaign that is killed must not lose what it knows
    lines = [
        f"{tally.kills} agents, page workers and services killed, {len(tally.failures)} targets harmed "
        f"({', '.join(result['days'])}, kernel {', '.join(result['kernels'])}, seed {args.seed}, "
        f"{result['seconds']} s)",
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
