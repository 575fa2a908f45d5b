# SPDX-License-Identifier: Apache-2.0
"""The long run: ``python -m tests.oracle --seconds 3600 --backend uffd-wp``.

Prints one line every ten seconds and one for each failure, with a shortened history kept in a file.  Exit code 1
when anything was wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

from tests.oracle import history
from tests.oracle.campaign import Verdict, play, shrink
from tests.oracle.engine import EngineFactory
from tests.oracle.planted import MISTAKES, NaiveEngine
from tests.oracle.target import forget_build


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.oracle", description="Compare dumps with the truth."
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--sequences", type=int, default=0, help="stop after so many histories")
    parser.add_argument(
        "--backend", default="uffd-wp", help="uffd-wp, content, auto, ...; naive needs no engine"
    )
    parser.add_argument("--read-mode", default="auto", choices=("auto", "stopped", "fork"))
    parser.add_argument("--seed", type=int, default=None, help="first seed (default: from the clock)")
    parser.add_argument("--freezes", type=int, default=6)
    parser.add_argument("--ops", type=int, default=30, help="commands between two freezes, on average")
    parser.add_argument("--restores", action="store_true", help="kill and restore in between")
    parser.add_argument("--without", default="", help="verbs to leave out, comma separated (ring,uffd)")
    parser.add_argument("--replay", type=Path, help="play this file instead")
    parser.add_argument("--plant", choices=sorted(MISTAKES), help="with --backend naive: make this mistake")
    parser.add_argument("--shrink-seconds", type=float, default=120)
    parser.add_argument(
        "--keep", type=Path, default=Path("oracle-failures"), help="where failing histories go"
    )
    args = parser.parse_args()
    make_engine = engine_factory(args.backend, args.read_mode, args.plant or "")
    try:
        if args.replay:
            verdict = play(history.load(args.replay), make_engine)
            print("\n".join(verdict.findings) or "all generations are true")
            return bool(verdict.findings)
        return _campaign(args, make_engine)
    finally:
        forget_build()


def engine_factory(backend: str, read_mode: str = "auto", mistake: str = "") -> EngineFactory:
    """Makers of engines by name."""
    if backend == "naive":
        return lambda: NaiveEngine(mistake)
    from tests.oracle.binding import CheckpointdEngine

    return lambda: CheckpointdEngine(backend, read_mode)


def _campaign(args: argparse.Namespace, make_engine: EngineFactory) -> int:
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 30)
    start = shown = time.monotonic()
    total, nr_histories, failures = Verdict(backends=Counter()), 0, 0
    print(f"first seed {seed}, backend {args.backend}", flush=True)
    left_out = set(args.without.split(","))
    while time.monotonic() - start < args.seconds and nr_histories != (args.sequences or -1):
        lines = history.generate(seed, nr_freezes=args.freezes, ops_per_freeze=args.ops)
        if args.restores:
            lines = history.with_restores(seed)
        lines = [line for line in lines if line.split()[0] not in left_out]
        try:
            verdict = play(lines, make_engine)
        except Exception as error:
            verdict = Verdict(findings=[f"{type(error).__name__}: {error}"])
        nr_histories += 1
        total.add(verdict)
        if verdict.findings:
            failures += 1
            _report(seed, lines, verdict, make_engine, args)
        seed += 1
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(_line(nr_histories, failures, total, shown - start), flush=True)
    print(_line(nr_histories, failures, total, time.monotonic() - start), flush=True)
    return bool(failures)


def _line(nr_histories: int, failures: int, total: Verdict, seconds: float) -> str:
    return (
        f"{seconds:.0f} s: {nr_histories} histories, {total.nr_generations} generations, "
        f"{total.nr_pages} pages compared, {total.nr_inherited} of them inherited, {total.nr_refused} refusals, "
        f"{total.nr_restores} restores, "
        f"backends {dict(total.backends)}, {failures} failures"
    )


def _report(
    seed: int, lines: list[str], verdict: Verdict, make_engine: EngineFactory, args: argparse.Namespace
) -> None:
    print(f"\nseed {seed} FAILED at line {verdict.at}:", file=sys.stderr)
    for finding in verdict.findings:
        print(f"  {finding}", file=sys.stderr)

    def fails(shorter: list[str]) -> bool:
        try:
            return bool(play(shorter, make_engine).findings)
        except Exception:
            return True

    short = shrink(lines, fails, seconds=args.shrink_seconds)
    args.keep.mkdir(exist_ok=True)
    path = args.keep / f"seed-{seed}.txt"
    history.save(path, short, f"seed {seed}, backend {args.backend}\n" + "\n".join(verdict.findings))
    print(f"  {len(short)} of {len(lines)} lines still fail: {path}\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
