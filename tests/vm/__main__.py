# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.vm [KERNEL...]``: the tests that need a kernel of the lab, in one guest for each kernel.

What a kernel must be able to do is demanded there (CHECKPOINTD_REQUIRE), so that nothing is skipped by mistake.  A
guest that is lost or runs out of time is said to be that, and the others run all the same.  Exit code 1 when anything
was not as it should be.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from vmtest import kbuild, vm

KERNELS = ("6.12-stock", "6.12-precise", "6.1-stock", "6.1-precise")
TESTS = (
    "tests/vm/test_kernel_behaviour.py",
    "tests/vm/test_kernel_emulation.py",
    "tests/contract/test_trackers.py",
    "tests/vm/test_dumps.py",
    "tests/vm/test_kernel_measure.py",
)
# two of the six seeds: the others run natively for the trackers that work there, and here with --all
SELECTION = "not (inherited_pages and (-2] or -3] or -4] or -5]))"
EVERYWHERE = ("root", "ptrace", "gcc", "set_tid", "soft_dirty", "merge_barrier", "ksm", "hugetlb")


def required(name: str) -> list[str]:
    """The abilities this kernel has to have."""
    base, flavour = name.split("-", 1)
    more = ["pagemap_scan", "uffd_wp"] if base == "6.12" else []
    return [*EVERYWHERE, *more, *(["precise"] if flavour.startswith("precise") else [])]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"default: {' '.join(KERNELS)}")
    parser.add_argument("--timeout", type=float, default=1500, help="seconds for each guest")
    parser.add_argument("--all", action="store_true", help="also what the everyday selection leaves out")
    parser.add_argument("--pytest", default="", help="more words for pytest, such as '-k oracle'")
    args = parser.parse_args()
    outcomes = {}
    for name in args.kernels or KERNELS:
        image = kbuild.build(name)
        print(f"\n== {name}", flush=True)
        selection = "" if args.all else f"-k '{SELECTION}'"
        command = (
            "echo 8 >/proc/sys/vm/nr_hugepages; exec python -m pytest -q -p no:cacheprovider --timeout=600 "
            f"-m 'not slow' {selection} {' '.join(TESTS)} {args.pytest}"
        )
        demanded = os.environ.get("CHECKPOINTD_REQUIRE", ",".join(required(name)))
        began = time.monotonic()
        try:
            status = vm.run(
                image, ["sh", "-c", command], name=name, stdout=sys.stdout.buffer, stderr=sys.stderr.buffer,
                timeout_seconds=args.timeout, environment={"CHECKPOINTD_REQUIRE": demanded},
            )  # fmt: skip
            outcome = "passed" if status == 0 else f"FAILED (pytest's status {status})"
        except vm.GuestTimeout as error:
            outcome = f"TIME WAS UP: {error}"
        except vm.LostGuest as error:
            outcome = f"GUEST LOST: {error}"
        outcomes[name] = f"{outcome}, {time.monotonic() - began:.0f} s"
    print()
    for name, outcome in outcomes.items():
        print(f"{name:14} {outcome}")
    return int(any(not outcome.startswith("passed") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
