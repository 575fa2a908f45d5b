# SPDX-License-Identifier: Apache-2.0
"""`make study`: measure what is not measured yet, then write docs/savings.md.

    python -m benchmarks.study [NAME ...] [--where native,6.12-stock,...] [--repeats 2] [--render-only]

A record that is in benchmarks/study/records is not made again; remove one to have it made again.  The full records,
which `checkpoint report` shows with all mappings, stay under build/study.  The place "cost" is what tracking costs
programs natively: it waits for another time while the machine is busy, and pairs measured then do not count.  In guests
(emulated, so seconds mean nothing there) the data is smaller and there is one program a guest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.study import compact
from benchmarks.study.measure import end_in_order
from benchmarks.study.render import render
from benchmarks.study.seen import CALM, COST, NATIVE, RECORDS, all_busy
from benchmarks.study.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]
GUEST_EPOCHS, NATIVE_EPOCHS, NR_PAIRS = 3, 6, 8
GUEST_BACKENDS = {
    "6.12-stock": "soft-dirty,barrier-soft-dirty,uffd-wp",
    "6.12-precise": "precise-soft-dirty",
    "6.1-stock": "soft-dirty,barrier-soft-dirty",
    "6.1-precise": "precise-soft-dirty",
}
"""What a guest is for; 6.1 has no PAGEMAP_SCAN, hence no uffd-wp."""
TIME_IS_UP = 124


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--where", default=f"{NATIVE},{COST},6.12-stock,6.12-precise")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--guest-timeout", type=int, default=1800, metavar="SECONDS", help="for one program")
    parser.add_argument("--records", type=Path, default=RECORDS, help="the records that are kept")
    parser.add_argument("--full", type=Path, default=ROOT / "build" / "study", help="the full records")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "savings.md")
    parser.add_argument("--render-only", action="store_true")
    args = parser.parse_args()
    end_in_order()
    names = args.names or list(WORKLOADS)
    if unknown := set(names) - set(WORKLOADS):
        parser.error(f"no such program: {', '.join(sorted(unknown))}")
    places = args.where.split(",")
    if unknown := set(places) - {NATIVE, COST, *GUEST_BACKENDS}:
        parser.error(f"no such place: {', '.join(sorted(unknown))}")
    failed = []
    if not args.render_only:
        _install(names, places)
        for repeat in range(1, args.repeats + 1):
            for where in places:
                for name in names:
                    kept = args.records / where / f"{name}-{repeat}{compact.SUFFIX}"
                    if kept.exists() and not (where == COST and all_busy(kept)):
                        continue
                    if where == COST and os.getloadavg()[0] > CALM * (os.cpu_count() or 1):
                        print(f"{where}: {name} is left for later: others keep this machine busy", flush=True)
                        continue
                    full = (args.full / where / f"{name}-{repeat}.jsonl").resolve()
                    print(f"{where}: {name}, {repeat} of {args.repeats}", flush=True)
                    if not _keep(where, name, full, kept, args.guest_timeout):
                        failed.append(f"{where}/{name}-{repeat}")
    args.output.write_text(render(args.records), encoding="utf-8")
    print(f"{args.output} written")
    if failed:
        print("failed: " + ", ".join(failed), file=sys.stderr)
    return bool(failed)


def _install(names: list[str], places: list[str]) -> None:
    """Install what is missing and can be had; a program that lacks something is left out by name."""
    missing = sorted({package for name in names for _, package in WORKLOADS[name].missing()})
    if missing:
        subprocess.run([ROOT / "tools" / "apt-install", *missing], check=False)
    if set(places) & set(GUEST_BACKENDS):
        subprocess.run([ROOT / "tools" / "setup-lab"], check=True)


def _keep(where: str, name: str, full: Path, kept: Path, timeout_s: int) -> bool:
    """Measure unless a full record is there already, and keep it; False if there is nothing to keep."""
    if kept.exists():
        full.unlink(missing_ok=True)  # it is to be made again
    if not full.exists():
        full.parent.mkdir(parents=True, exist_ok=True)
        status = _measure(where, name, full, timeout_s)
        part = full.with_suffix(".part")
        if status == TIME_IS_UP and where in GUEST_BACKENDS and part.exists():
            why = f"the emulated machine was given {timeout_s / 60:.0f} minutes, which did not do"
            compact.write(compact.cut_short(part, why), kept)
            return True
    if full.exists():
        compact.keep(full, kept)
    return full.exists()


def _measure(where: str, name: str, out: Path, timeout_s: int) -> int:
    words = [sys.executable, "-m", "benchmarks.study.measure", name, str(out)]
    if where in (NATIVE, COST):
        words += (
            ["--epochs", str(NATIVE_EPOCHS)]
            if where == NATIVE
            else ["--pairs", str(NR_PAIRS), "--interval-ms", "2000"]
        )
        return _run(words)
    guest = [sys.executable, "-m", "vmtest", "run", where, "--timeout", str(timeout_s)]
    inside = ["env", "STUDY_SMALL=1", *words, "--epochs", str(GUEST_EPOCHS)]
    inside += ["--backends", GUEST_BACKENDS[where]]
    return _run(
        [*guest, "--share", str(out.parent), "--", *inside],
        env={**os.environ, "PYTHONPATH": str(ROOT / "kernel-shim")},
    )


def _run(words: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """As subprocess.run, which would kill: on SIGTERM it shall end the program it measures, the load and the guest."""
    with subprocess.Popen(words, cwd=ROOT, env=env) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            raise


if __name__ == "__main__":
    sys.exit(main())
