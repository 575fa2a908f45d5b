# SPDX-License-Identifier: Apache-2.0
"""`make study`: measure what is not measured yet, then write docs/savings.md.

    python -m benchmarks.study [NAME ...] [--where native,6.12-stock,6.12-precise] [--repeats 3] [--render-only]

Records: build/study/WHERE/NAME-REPEAT.jsonl; remove one to have it made again.  In guests (emulated, so seconds mean
nothing there) the data is smaller and there is one program a guest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.study.render import render
from benchmarks.study.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]
NATIVE = "native"
GUEST_TIMEOUT_S = 1800
GUEST_EPOCHS, NATIVE_EPOCHS = 3, 6
GUEST_BACKENDS = {"6.12-precise": "precise-soft-dirty"}
DEFAULT_GUEST_BACKENDS = "soft-dirty,barrier-soft-dirty,uffd-wp"
"""What a guest is for."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--where", default=f"{NATIVE},6.12-stock,6.12-precise")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--guest-backends", default="", metavar="LIST", help="instead of what a guest is for")
    parser.add_argument("--records", type=Path, default=ROOT / "build" / "study")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "savings.md")
    parser.add_argument("--render-only", action="store_true")
    args = parser.parse_args()
    names = args.names or list(WORKLOADS)
    if unknown := set(names) - set(WORKLOADS):
        parser.error(f"no such program: {', '.join(sorted(unknown))}")
    failed = []
    if not args.render_only:
        for where in args.where.split(","):
            for repeat in range(1, args.repeats + 1):
                for name in names:
                    out = (args.records / where / f"{name}-{repeat}.jsonl").resolve()
                    if out.exists():
                        continue
                    print(f"{where}: {name}, {repeat} of {args.repeats}", flush=True)
                    if _measure(where, name, out, args.guest_backends) != 0:
                        failed.append(f"{where}/{out.name}")
    args.output.write_text(render(args.records), encoding="utf-8")
    print(f"{args.output} written")
    if failed:
        print("not measured: " + ", ".join(failed), file=sys.stderr)
    return bool(failed)


def _measure(where: str, name: str, out: Path, backends: str) -> int:
    out.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "benchmarks.study.measure", name, str(out)]
    if where == NATIVE:
        done = subprocess.run([*words, "--epochs", str(NATIVE_EPOCHS)], cwd=ROOT, check=False)
    else:
        guest = [sys.executable, "-m", "vmtest", "run", where, "--timeout", str(GUEST_TIMEOUT_S)]
        inside = ["env", "STUDY_SMALL=1", *words, "--epochs", str(GUEST_EPOCHS), "--baseline-ms", "0"]
        inside += ["--backends", backends or GUEST_BACKENDS.get(where, DEFAULT_GUEST_BACKENDS)]
        done = subprocess.run(
            [*guest, "--share", str(out.parent), "--", *inside],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "kernel-shim")},
            check=False,
        )
    return 0 if done.returncode == 3 else done.returncode


if __name__ == "__main__":
    sys.exit(main())
