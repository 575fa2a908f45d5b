# SPDX-License-Identifier: Apache-2.0
"""Every error a user can meet, each with its exit code and what to do next.

::

    CheckpointError                1   anything else that failed
    ├── UsageError                 2   words of the call are off (bad id, bad name, bad number)
    ├── TargetGone                 4   no such process, or it exited while we worked
    │   └── TargetExeced           4   the process replaced its program half-way
    ├── NotPermitted               5   ptrace, capabilities, ownership
    ├── KernelLacks                6   this kernel cannot do it
    ├── Unsupported                7   state that cannot be saved or restored; all reasons at once
    ├── RestoreConflict            8   a pid is taken, a file changed or is gone
    ├── ImageNotFound              9   no image of that id, prefix or name; a parent that is missing
    ├── StoreMissing              10   the store directory does not exist or is not one of ours
    ├── Busy                      11   another dump of the same target, a debugger, a locked store
    ├── ImageDamaged              12   a digest, a length or a version does not fit
    │   └── UnknownFormat         12   written by another version of the image format
    ├── NoSpace                   13   the disk is full
    ├── FrozenTooLong             14   `--max-frozen` or a deadline was passed; the target runs on
    ├── Cancelled                 15   the user asked to stop
    ├── PagesMissed               16   a measured backend did not report pages that changed
    └── ServiceUnreachable        20   no service at the socket
        └── VersionMismatch       20   a service of another version answers

The *message* is one sentence: what failed and for which pid, fd, VMA or file.  The *hint* is the next step.
`details` hold the same facts for programs.  An error crosses the wire as `to_dict`/`from_dict`; its class is
found again by `reason`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class CheckpointError(Exception):
    """Base of all errors meant for the user.

    Args:
        message: one sentence without a trailing newline.
        hint: what to do next; without one that of the class, empty when there is nothing to do.
        **details: facts (pid, path, ...) as str or int, for programs.
    """

    reason: ClassVar[str] = "FAILED"
    exit_code: ClassVar[int] = 1
    usual_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint
        self.details: dict[str, Any] = details

    def to_dict(self) -> dict[str, Any]:
        """The error as plain data (JSON types only)."""
        return {
            "reason": self.reason,
            "message": self.message,
            "hint": self.hint,
            "exit_code": self.exit_code,
            "details": self.details,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> CheckpointError:
        """The error `to_dict` described; an unknown reason gives the base class."""
        cls = _by_reason().get(str(data.get("reason", "")), CheckpointError)
        error = cls(str(data.get("message", "unknown error")), hint=str(data.get("hint", "")))
        error.details = dict(data.get("details", {}))
        return error


class UsageError(CheckpointError):
    reason = "USAGE"
    exit_code = 2


class TargetGone(CheckpointError):
    reason = "TARGET_GONE"
    exit_code = 4
    usual_hint = "look up which processes there are with `ps`"


class TargetExeced(TargetGone):
    reason = "TARGET_EXECED"
    usual_hint = "it is another program now: dump it again"


class NotPermitted(CheckpointError):
    reason = "NOT_PERMITTED"
    exit_code = 5
    usual_hint = "run the service as that user or as root; `checkpoint check` lists what this one may"


class KernelLacks(CheckpointError):
    reason = "KERNEL_LACKS"
    exit_code = 6
    usual_hint = "`checkpoint check` lists what this kernel can do"


class Unsupported(CheckpointError):
    """State that cannot be saved or restored.

    `details["blockers"]` is the list of all reasons, one sentence each.
    """

    reason = "UNSUPPORTED"
    exit_code = 7
    usual_hint = "`checkpoint check -p PID` lists every reason"


class RestoreConflict(CheckpointError):
    reason = "RESTORE_CONFLICT"
    exit_code = 8
    usual_hint = "put it back as it was at the dump, then restore again"


class ImageNotFound(CheckpointError):
    reason = "IMAGE_NOT_FOUND"
    exit_code = 9


class StoreMissing(CheckpointError):
    reason = "STORE_MISSING"
    exit_code = 10


class Busy(CheckpointError):
    reason = "BUSY"
    exit_code = 11


class ImageDamaged(CheckpointError):
    reason = "IMAGE_DAMAGED"
    exit_code = 12
    is_what: ClassVar[str] = "is damaged"
    usual_hint = (
        "`checkpoint verify` tells which images are whole: use another generation, or a copy of the store"
    )

    def of_image(self, what: str) -> ImageDamaged:
        """This error with the image it was met in, e.g. "image 3f2a", at the head of its sentence.

        Who knows the image by more than its id may give it that name afterwards.
        """
        self.message = f"{what} {self.is_what}: {self.details.setdefault('damage', self.message)}"
        self.args = (self.message,)
        return self


class UnknownFormat(ImageDamaged):
    reason = "UNKNOWN_FORMAT"
    is_what = "cannot be read"
    usual_hint = (
        "read it with the version of checkpointd that wrote it (`checkpoint export` there gives one file)"
    )


class NoSpace(CheckpointError):
    reason = "NO_SPACE"
    exit_code = 13
    usual_hint = "free some space (`checkpoint rm`), then try again"


class FrozenTooLong(CheckpointError):
    reason = "FROZEN_TOO_LONG"
    exit_code = 14


class Cancelled(CheckpointError):
    reason = "CANCELLED"
    exit_code = 15


class PagesMissed(CheckpointError):
    reason = "PAGES_MISSED"
    exit_code = 16


class ServiceUnreachable(CheckpointError):
    reason = "SERVICE_UNREACHABLE"
    exit_code = 20


class VersionMismatch(ServiceUnreachable):
    reason = "VERSION_MISMATCH"


def _by_reason() -> dict[str, type[CheckpointError]]:
    found: dict[str, type[CheckpointError]] = {CheckpointError.reason: CheckpointError}
    queue: list[type[CheckpointError]] = [CheckpointError]
    while queue:
        for cls in queue.pop().__subclasses__():
            found[cls.reason] = cls
            queue.append(cls)
    return found
