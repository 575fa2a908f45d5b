# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.vm` without a guest: the time that is allowed, second tries, what counts as a failure."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vmtest import kbuild, vm

from tests.vm import __main__ as command

PASSES = b"tests/a.py::test_one PASSED [ 50%]\ntests/a.py::test_two[x y] SKIPPED (none) [100%]\n"


class Lab:
    """Guests and builds that only take time; `guests` and `builds` say what happens, one after another."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.guests: list[Callable[[Any, float], int]] = []
        self.built = {"6.12-precise", "6.1-precise", "6.12-stock", "6.1-stock"}
        self.build_seconds = 300.0
        self.begun: list[str] = []

    def cached_image(self, name: str) -> Path | None:
        return Path(name) if name in self.built else None

    def build(self, name: str, *, timeout_seconds: float) -> Path:
        if name not in self.built:
            self.now += min(self.build_seconds, timeout_seconds)
            if self.build_seconds > timeout_seconds:
                raise kbuild.BuildTimeout(f"{name}: the time was up while compiling")
        return Path(name)

    def run(self, image: Path, words: list[str], *, stdout: Any, timeout_seconds: float, **_: Any) -> int:
        self.begun.append(str(image))
        return self.guests.pop(0)(stdout, timeout_seconds)

    def ends(self, status: int = 0, seconds: float = 400, said: bytes = PASSES) -> None:
        def guest(stdout: Any, timeout: float) -> int:
            self.now += min(seconds, timeout)
            stdout.write(said)
            if seconds > timeout:
                raise vm.GuestTimeout(f"stopped after {timeout:.0f} s", "console")
            return status

        self.guests.append(guest)

    def is_lost(self, said: bytes = b"tests/a.py::test_one ") -> None:
        def guest(stdout: Any, _timeout: float) -> int:
            self.now += 100
            stdout.write(said)
            raise vm.LostGuest("no exit status", "console")

        self.guests.append(guest)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    made = Lab()
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    monkeypatch.setattr(kbuild, "cached_image", made.cached_image)
    monkeypatch.setattr(kbuild, "build", made.build)
    monkeypatch.setattr(vm, "run", made.run)
    return made


def play(lab: Lab, minutes: float, *names: str) -> command.Guests:
    guests = command.Guests("true", lab.now + minutes * 60)
    for name in names or command.KERNELS:
        guests.run(name)
    return guests


def test_what_no_time_is_left_for_is_named_and_is_no_failure(lab: Lab) -> None:
    for _ in range(4):
        lab.ends()
    guests = play(lab, 25)
    assert lab.begun == ["6.12-precise", "6.1-precise", "6.12-stock"]
    assert guests.outcomes["6.12-stock"] == "passed, 1 tests, 400 s"
    assert guests.outcomes["6.1-stock"].startswith("not run: time was up")
    assert guests.status == 0


def test_builds_take_of_the_same_time(lab: Lab) -> None:
    lab.built = {"6.12-precise"}
    for _ in range(4):
        lab.ends()
    guests = play(lab, 20)
    assert lab.begun == ["6.12-precise", "6.1-precise"]
    assert [one.startswith("not run: time was up") for one in guests.outcomes.values()] == [
        False,
        False,
        True,
        True,
    ]


def test_build_that_takes_too_long_leaves_its_guest_out(lab: Lab) -> None:
    lab.built, lab.build_seconds = {"6.12-precise"}, 3600
    lab.ends()
    guests = play(lab, 30, "6.12-precise", "6.1-precise")
    assert guests.outcomes["6.1-precise"].startswith(
        "not run: time was up (6.1-precise: the time was up while"
    )
    assert guests.status == 0


def test_guest_that_was_lost_gets_one_second_try_which_is_told(lab: Lab) -> None:
    lab.is_lost()
    lab.ends()
    guests = play(lab, 60, "6.1-stock")
    assert lab.begun == ["6.1-stock"] * 2
    said = "passed, 1 tests (at the second try; the first: GUEST LOST in tests/a.py::test_one: no exit status"
    assert guests.outcomes["6.1-stock"].startswith(said)
    assert guests.status == 0


def test_guest_that_hangs_twice_is_a_failure(lab: Lab) -> None:
    lab.ends(seconds=9999, said=b"tests/a.py::test_one PASSED [ 1%]\ntests/a.py::test_slow ")
    lab.ends(seconds=9999, said=b"tests/a.py::test_one ")
    guests = play(lab, 120, "6.1-stock")
    assert guests.outcomes["6.1-stock"].startswith(
        "TIME WAS UP in tests/a.py::test_one: stopped after 1500 s"
    )
    assert "the first: TIME WAS UP in tests/a.py::test_slow" in guests.outcomes["6.1-stock"]
    assert guests.status == 1


def test_failed_test_gets_no_second_try_not_even_when_the_guest_is_lost_later(lab: Lab) -> None:
    lab.ends(1, said=b"tests/a.py::test_one FAILED [ 50%]\n")
    lab.is_lost(b"tests/a.py::test_one FAILED [ 50%]\ntests/a.py::test_two ")
    guests = play(lab, 60, "6.1-stock", "6.12-stock")
    assert lab.begun == ["6.1-stock", "6.12-stock"]
    assert guests.outcomes["6.1-stock"].startswith("FAILED (pytest's status 1): tests/a.py::test_one")
    assert guests.outcomes["6.12-stock"].startswith(
        "FAILED: tests/a.py::test_one; then the guest ended in tests/a.py"
    )
    assert guests.status == 1


def test_guest_cut_off_by_the_time_for_all_is_named_as_not_finished(lab: Lab) -> None:
    lab.ends()
    lab.ends(seconds=1200)
    guests = play(lab, 20, "6.12-stock", "6.1-stock")
    assert guests.outcomes["6.1-stock"].startswith("not finished: time was up, 1 passed")
    assert guests.status == 0
    lab.ends()
    lab.ends(seconds=1200, said=b"tests/a.py::test_one FAILED [ 50%]\n")
    assert play(lab, 20, "6.12-stock", "6.1-stock").status == 1


def test_run_in_which_nothing_passed_is_a_failure(lab: Lab) -> None:
    assert play(lab, 1).status == 1
    assert lab.begun == []
