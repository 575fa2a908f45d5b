# SPDX-License-Identifier: Apache-2.0
"""Making a tracker for a frozen target, through an injection.

What a backend needs inside the target (a userfaultfd of its address space) is made here and nowhere else, held
by us alone and not left behind.

Raises: UsageError and KernelLacks of `select_backend`; TargetGone when the target died.
"""

from __future__ import annotations

import contextlib
import os

from checkpointd import tracepoint
from checkpointd.features import Features
from checkpointd.linux import pidfd
from checkpointd.linux import userfaultfd as uffd
from checkpointd.target.remote import Call, Remote, Result
from checkpointd.tracking.base import Tracker
from checkpointd.tracking.content import ContentTracker
from checkpointd.tracking.select import Choice, select_backend
from checkpointd.tracking.uffd_wp import FEATURES, UffdWpTracker

NR_CLOSE = 3


def make_tracker(backend: str, pid: int, remote: Remote, features: Features) -> tuple[Tracker, Choice]:
    """The tracker asked for, or the best one with "auto", and why it was taken.

    Its first epoch begins at its first `collect`.
    """
    refused = ""
    calls = [Call(uffd.NR_USERFAULTFD, (os.O_CLOEXEC | os.O_NONBLOCK | uffd.UFFD_USER_MODE_ONLY,))]
    if backend != "content":
        with contextlib.suppress(AttributeError):
            if not remote.seccomp_ok(calls):  # type: ignore[attr-defined]
                refused = f"a seccomp filter of process {pid} forbids userfaultfd"
    choice = select_backend(backend, features, injection_refused=refused)
    if choice.backend == "uffd-wp":
        try:
            fd = _make_userfaultfd(pid, remote, calls)
        except OSError as error:
            choice = select_backend(
                backend, features, injection_refused=f"userfaultfd failed in the target: {error.strerror}"
            )
        else:
            tracker = UffdWpTracker(
                fd,
                has_guard_category=features.guard_category,
                holes_are_written=features.holes_are_written,
            )
            return tracker, choice
    return ContentTracker(has_guard_category=features.guard_category), choice


def _make_userfaultfd(pid: int, remote: Remote, calls: list[Call]) -> int:
    """A userfaultfd of the target's address space, held by us alone."""
    number = remote.batch(calls, undo=[Call(NR_CLOSE, (Result(0),))])[0]
    if number < 0:
        raise OSError(-number, os.strerror(-number), "userfaultfd")
    tracepoint.hit("track.made")
    try:
        process_fd = pidfd.pidfd_open(pid)
        try:
            fd = pidfd.pidfd_getfd(process_fd, number)
        finally:
            os.close(process_fd)
    finally:
        remote.call(NR_CLOSE, number)
    tracepoint.hit("track.taken")
    try:
        uffd.handshake(fd, FEATURES)
    except OSError:
        os.close(fd)
        raise
    return fd
