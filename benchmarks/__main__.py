# SPDX-License-Identifier: Apache-2.0
"""`make bench`: all cases, or those named; writes benchmarks.json and benchmarks.md to --output.

    python -m benchmarks [CASE ...] [--megabytes 1024] [--rounds 7] [--directory /dev/shm] [--output DIR]

On a machine that does other work `chrt -r 1 python -m benchmarks ...` (root) keeps that work from being measured.

Exit status 1 with --strict when a goal was missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.report import Report, machine

CASES = ("small", "incremental", "full", "restore", "depth", "delta", "cost", "memory")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure beside the limits.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where images go (a tmpfs)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--strict", action="store_true")
    args = parser.parse_args()
    cases = args.cases or list(CASES)
    if unknown := set(cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    report = Report(facts={**machine(), "target": f"{args.megabytes} MiB", "rounds": args.rounds})
    directory = Path(tempfile.mkdtemp(prefix="checkpointd-bench-", dir=args.directory))
    bench = None
    try:
        bench = Bench(directory, args.megabytes, args.rounds, report)
        for case in cases:
            getattr(bench, case)()
    finally:
        if bench is not None:
            bench.close()
        shutil.rmtree(directory, ignore_errors=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "benchmarks.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    (args.output / "benchmarks.md").write_text(report.markdown())
    print(f"\n{report.markdown()}\nalso in {args.output}/benchmarks.json and .md")
    missed = [row.case for row in report.rows if row.verdict.startswith("MISSED")]
    return bool(missed) if args.strict else 0


if __name__ == "__main__":
    sys.exit(main())
