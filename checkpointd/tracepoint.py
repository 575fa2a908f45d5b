# SPDX-License-Identifier: Apache-2.0
"""Named points of the code at which tests stage races, deaths and failures.

`hit(name)` costs one global look-up unless a test asked for something, by

* the environment: `CHECKPOINTD_TRACEPOINT="name=action[,name=action...]"`.  Actions: `kill` (SIGKILL to
  ourselves), `stop` (SIGSTOP to ourselves), `raise` (TracepointError), `sleep:MILLISECONDS`, `log` (the name to
  stderr).  `name` may end in `*`.  `name@N=action` acts at the N-th hit (from 1) that fits; without @N at every
  one.
* a callable: `register(name, function)`, called with the name at each fitting hit; `clear()` forgets all.

Names are `room.step`, e.g. `freeze.seized`, `inject.slot_written`, `image.committed`.  Names come and go with
the code: they are for tests, not an interface.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

ENVIRONMENT = "CHECKPOINTD_TRACEPOINT"


class TracepointError(Exception):
    """What the action `raise` raises: an error that no code expects."""


@dataclass
class _Rule:
    pattern: str
    action: Callable[[str], None]
    at: int = 0  # 0: at every hit
    nr_hits: int = 0

    def fits(self, name: str) -> bool:
        if self.pattern.endswith("*"):
            return name.startswith(self.pattern[:-1])
        return name == self.pattern


def _raise(name: str) -> None:
    raise TracepointError(name)


def _action(text: str) -> Callable[[str], None]:
    if text.startswith("sleep:"):
        seconds = int(text[6:]) / 1000
        return lambda name: time.sleep(seconds)
    known: dict[str, Callable[[str], None]] = {
        "kill": lambda name: os.kill(os.getpid(), signal.SIGKILL),
        "stop": lambda name: os.kill(os.getpid(), signal.SIGSTOP),
        "raise": _raise,
        "log": lambda name: print(name, file=sys.stderr, flush=True),
    }
    if text not in known:
        raise ValueError(f"{ENVIRONMENT}: no action {text!r} (kill, stop, raise, log, sleep:MS)")
    return known[text]


def parse(text: str) -> list[_Rule]:
    """The rules of an environment value.

    Raises:
        ValueError: an unknown action or a bad number: better loud than a test that tests nothing.
    """
    rules = []
    for part in filter(None, text.split(",")):
        where, sep, action = part.partition("=")
        if not sep:
            raise ValueError(f"{ENVIRONMENT}: {part!r} is not name=action")
        name, _, at = where.partition("@")
        rules.append(_Rule(name.strip(), _action(action.strip()), int(at or 0)))
    return rules


_rules: list[_Rule] = parse(os.environ.get(ENVIRONMENT, ""))


def hit(name: str) -> None:
    """The code reached the point `name`; does nothing in production."""
    if _rules:
        _run(name)


def _run(name: str) -> None:
    for rule in tuple(_rules):
        if rule.fits(name):
            rule.nr_hits += 1
            if rule.at in (0, rule.nr_hits):
                rule.action(name)


def register(name: str, function: Callable[[str], None], *, at: int = 0) -> None:
    """Call `function(point)` at each hit of `name` (which may end in `*`), or only at the `at`-th."""
    _rules.append(_Rule(name, function, at))


def clear() -> None:
    """Forget every rule, those of the environment too."""
    _rules.clear()
