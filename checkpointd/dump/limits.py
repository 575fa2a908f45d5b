# SPDX-License-Identifier: Apache-2.0
"""When a dump must give up: cancelled, past its deadline, frozen for too long.

Raises Cancelled and FrozenTooLong; whoever conducts the dump lets the target go.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from checkpointd.dump.child import Heard
from checkpointd.dump.options import DumpOptions
from checkpointd.errors import Cancelled, FrozenTooLong
from checkpointd.memory import PAGE_SIZE
from checkpointd.target.freeze import Frozen

Report = Callable[[str, int, int], None]
"""(phase, done, total)"""

NO_BOUND = 1 << 62
_FREEZE_TIMEOUT_S = 5.0
_BYTES_PER_US = 4000  # 4 GB/s, on the careful side: docs/performance.md has 10 for two threads
_MORE = "allow more with --max-frozen, or dump incrementally so that less has to be copied"


class Limits:
    """Of one dump of one target."""

    def __init__(self, pid: int, options: DumpOptions, cancelled: Callable[[], bool]) -> None:
        self._pid, self._options, self._cancelled = pid, options, cancelled

    def freeze_timeout_s(self) -> float:
        """How long to try to stop the target."""
        if not self._options.deadline_ns:
            return _FREEZE_TIMEOUT_S
        left_s = (self._options.deadline_ns - time.monotonic_ns()) / 1e9
        if left_s <= 0:
            raise FrozenTooLong("the deadline passed before the freeze", pid=self._pid)
        return min(_FREEZE_TIMEOUT_S, left_s)

    def check_budget(self, frozen: Frozen, nr_pages: int) -> None:
        """Refuse to copy so many pages when that cannot be done in time: better now than half-way."""
        now = time.monotonic_ns()
        self.check_cancelled()
        self._check_deadline(now)
        allowed_us = self._options.max_frozen_us
        expected_us = (now - frozen.frozen_at_ns) // 1000 + nr_pages * PAGE_SIZE // _BYTES_PER_US
        if allowed_us and expected_us > allowed_us:
            raise FrozenTooLong(
                f"process {self._pid} would be frozen for about {expected_us // 1000} ms, "
                f"longer than the {_ms(allowed_us)} ms allowed; it runs on",
                hint=_MORE,
                pid=self._pid,
            )

    def most_pages(self) -> int:
        """How many can be copied in the time that is allowed in all."""
        allowed_us = self._options.max_frozen_us
        return allowed_us * _BYTES_PER_US // PAGE_SIZE if allowed_us else NO_BOUND

    def while_frozen(self, frozen: Frozen, report: Report) -> Heard:
        """Looks at every limit while the worker reads: the guess of `check_budget` may have been too good."""
        allowed_us = self._options.max_frozen_us

        def heard(done: int, total: int) -> None:
            now = time.monotonic_ns()
            self.check_cancelled()
            self._check_deadline(now)
            frozen_us = (now - frozen.frozen_at_ns) // 1000
            if allowed_us and frozen_us > allowed_us:
                raise FrozenTooLong(
                    f"process {self._pid} was frozen for {frozen_us // 1000} ms and only {done} of {total} pages "
                    f"were read, with {_ms(allowed_us)} ms allowed; it runs on",
                    hint=_MORE,
                    pid=self._pid,
                )
            report("copying", done * PAGE_SIZE, total * PAGE_SIZE)

        return heard

    def after_thaw(self, phase: str, report: Report) -> Heard:
        """Only a cancel ends what goes on beside the running target."""

        def heard(done: int, total: int) -> None:
            self.check_cancelled()
            report(phase, done * PAGE_SIZE, total * PAGE_SIZE)

        return heard

    def check_cancelled(self) -> None:
        if self._cancelled():
            raise Cancelled(
                f"the dump of process {self._pid} was cancelled; the process runs on", pid=self._pid
            )

    def _check_deadline(self, now_ns: int) -> None:
        if self._options.deadline_ns and now_ns > self._options.deadline_ns:
            raise FrozenTooLong(
                f"the deadline passed while process {self._pid} was frozen; it runs on",
                hint="allow it more time with --timeout",
                pid=self._pid,
            )


def _ms(us: int) -> str:
    return str(us // 1000) if us >= 1000 else f"{us / 1000:g}"
