# SPDX-License-Identifier: Apache-2.0
"""For all tests: abilities in the head of the report, skips that name what is missing, no target left stopped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # `tests` is a package, wherever pytest was started

from tests import abilities


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*abilities): skipped, with their names, when any is missing")
    abilities.demanded_abilities()  # a typing error stops here


def pytest_report_header(config: pytest.Config) -> list[str]:
    return abilities.header()


def pytest_runtest_setup(item: pytest.Item) -> None:
    names = [name for mark in item.iter_markers("needs") for name in mark.args]
    if names:
        abilities.require(*names)


@pytest.fixture(scope="session", autouse=True)
def no_target_left_stopped() -> Iterator[None]:
    """After all tests no process that came from them is stopped or traced (a frozen target is harm)."""
    yield
    left = _stopped_descendants()
    assert not left, f"processes left stopped: {left}"


def _stopped_descendants() -> list[str]:
    """Stopped or traced processes which descend from us, or which were orphaned but run in our session."""
    states: dict[int, tuple[str, int, int, str]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                head, _, tail = Path("/proc", name, "stat").read_text(errors="replace").rpartition(")")
            except OSError:
                continue
            words = tail.split()
            states[int(name)] = (words[0], int(words[1]), int(words[3]), head.partition("(")[2])
    ours = {os.getpid()}
    grew = True
    while grew:
        children = {pid for pid, (_, parent, _, _) in states.items() if parent in ours and pid not in ours}
        ours |= children
        grew = bool(children)
    session = os.getsid(0)
    return [
        f"{pid} ({comm}) state {state}"
        for pid, (state, parent, sid, comm) in states.items()
        if state in "Tt" and (pid in ours or (sid == session and parent == 1))
    ]
