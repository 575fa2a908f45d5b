# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.vm [KERNEL...]``: the tests that need a kernel of the lab, in one guest for each kernel.

What a kernel must be able to do is demanded there (CHECKPOINTD_REQUIRE), so that nothing is skipped by mistake.  A
kernel is built as its turn comes, unless it is there.  A guest that is lost or runs out of time gets one second try,
and its outcome says so; a test that failed never does.

With --minutes all of it, builds too, ends by then: what no time is left for is named as "not run" or "not finished",
which is no failure.  Exit code 1 when a test failed, a guest was lost twice, a kernel could not be built, or nothing
passed at all.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from vmtest import kbuild, vm

# in this order, so that the patched kernels have been tested when the time is short
KERNELS = ("6.12-precise", "6.1-precise", "6.12-stock", "6.1-stock")
TESTS = (
    "tests/vm/test_kernel_behaviour.py",
    "tests/vm/test_kernel_emulation.py",
    "tests/contract/test_trackers.py",
    "tests/vm/test_dumps.py",
    "tests/vm/test_kernel_measure.py",
    "tests/vm/test_precise_command.py",
    "tests/integration/test_restore_fresh.py",
)
# two of the six seeds: the others run natively for the trackers that work there, and here with --all
SELECTION = "not (inherited_pages and (-2] or -3] or -4] or -5]))"
EVERYWHERE = ("root", "ptrace", "gcc", "set_tid", "soft_dirty", "merge_barrier", "ksm", "hugetlb")

# on two cores that have nothing else to do: 8 minutes for a guest, 5 for a kernel
GUEST_SECONDS = 8 * 60.0
BUILD_SECONDS = 5 * 60.0
NOT_RUN = "not run: time was up"
NOT_FINISHED = "not finished: time was up"

# lines of pytest -v: the name when a test begins, the rest when it has ended
NODE = re.compile(r"tests/\S+\.py::\S+")
ENDED = re.compile(r" (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def required(name: str) -> list[str]:
    """The abilities this kernel has to have."""
    base, flavour = name.split("-", 1)
    more = ["pagemap_scan", "uffd_wp"] if base == "6.12" else []
    return [*EVERYWHERE, *more, *(["precise"] if flavour.startswith("precise") else [])]


@dataclass
class Watch:
    """Passes a guest's output on and reads pytest's lines (-v) in it.

    Attributes:
        failed: names of tests that failed, as far as they were told.
        nr_passed: how many passed.
        running: the test that was begun last and has not ended; "" for none.
    """

    failed: list[str] = field(default_factory=list)
    nr_passed: int = 0
    running: str = ""
    _line: bytes = b""

    def write(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._read(line.decode(errors="replace"))
        if name := NODE.match(self._line.decode(errors="replace")):
            self.running = name[0]

    def _read(self, line: str) -> None:
        """One whole line: the name of a test, and how it ended."""
        name, end = NODE.match(line), ENDED.search(line)
        if not name or not end:
            return
        self.running = ""
        self.nr_passed += end[1] == "PASSED"
        if end[1] in ("FAILED", "ERROR"):
            self.failed.append(name[0])

    def flush(self) -> None:
        sys.stdout.buffer.flush()


class Guests:
    """Guests one after another, and what became of each.

    Args:
        deadline: time.monotonic() when all must be over; infinite for none.
        guest_seconds: a guest that takes longer is given up.
    """

    def __init__(self, command: str, deadline: float = inf, guest_seconds: float = 1500) -> None:
        self.outcomes: dict[str, str] = {}
        self._command, self._deadline, self._guest_seconds = command, deadline, guest_seconds

    @property
    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def run(self, name: str) -> None:
        """Build the kernel, run its guest, note the outcome."""
        began = time.monotonic()
        print(f"\n== {name}", flush=True)
        self.outcomes[name] = f"{self._outcome(name)}, {time.monotonic() - began:.0f} s"

    def _outcome(self, name: str) -> str:
        needed = GUEST_SECONDS if kbuild.cached_image(name) else GUEST_SECONDS + BUILD_SECONDS
        if self._left < needed:
            return NOT_RUN
        try:
            image = kbuild.build(name, timeout_seconds=self._left - GUEST_SECONDS)
        except kbuild.BuildTimeout as error:
            return f"{NOT_RUN} ({error})"
        except kbuild.BuildError as error:
            return f"FAILED: {error}"
        outcome, again = self._guest(name, image)
        if again and self._left < GUEST_SECONDS:
            return f"{outcome}; no time for a second try"
        if again:
            print(f"\n== {name}, second try: {outcome}", flush=True)
            second, _ = self._guest(name, image)
            return f"{second} (at the second try; the first: {outcome.splitlines()[0]})"
        return outcome

    def _guest(self, name: str, image: Path) -> tuple[str, bool]:
        """One guest: the outcome, and whether to try once more."""
        demanded = os.environ.get("CHECKPOINTD_REQUIRE", ",".join(required(name)))
        watch = Watch()
        timeout = min(self._guest_seconds, self._left)
        try:
            status = vm.run(
                image, ["sh", "-c", self._command], name=name, stdout=watch, stderr=sys.stderr.buffer,
                timeout_seconds=timeout, environment={"CHECKPOINTD_REQUIRE": demanded},
            )  # fmt: skip
        except vm.LostGuest as error:
            at = f" in {watch.running}" if watch.running else ""
            if watch.failed:
                return f"FAILED: {' '.join(watch.failed)}; then the guest ended{at}: {error}", False
            if not isinstance(error, vm.GuestTimeout):
                return f"GUEST LOST{at}: {error}", True
            if timeout < self._guest_seconds:
                return f"{NOT_FINISHED}{at}, {watch.nr_passed} passed", False
            return f"TIME WAS UP{at}: {error}", True
        except vm.VmError as error:
            return f"FAILED: {error}", False
        if status == 0:
            return f"passed, {watch.nr_passed} tests", False
        return f"FAILED (pytest's status {status}): {' '.join(watch.failed)}", False

    @property
    def status(self) -> int:
        """Exit code."""
        fine = [one.startswith(("passed", NOT_RUN, NOT_FINISHED)) for one in self.outcomes.values()]
        return int(not all(fine) or not any(one.startswith("passed") for one in self.outcomes.values()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"default: {' '.join(KERNELS)}")
    parser.add_argument("--timeout", type=float, default=1500, help="seconds for each guest")
    parser.add_argument("--minutes", type=float, default=inf, help="for all guests and builds together")
    parser.add_argument("--all", action="store_true", help="also what the everyday selection leaves out")
    parser.add_argument("--pytest", default="", help="more words for pytest, such as '-k oracle'")
    args = parser.parse_args()
    selection = "" if args.all else f"-k '{SELECTION}'"
    guests = Guests(
        "echo 8 >/proc/sys/vm/nr_hugepages; exec python -m pytest -v -p no:cacheprovider --timeout=600 "
        f"-m 'not slow' {selection} {' '.join(TESTS)} {args.pytest}",
        time.monotonic() + args.minutes * 60,
        args.timeout,
    )
    for name in args.kernels or KERNELS:
        guests.run(name)
    print()
    for name, outcome in guests.outcomes.items():
        print(f"{name:14} {outcome}")
    return guests.status


if __name__ == "__main__":
    sys.exit(main())
