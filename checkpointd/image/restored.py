# SPDX-License-Identifier: Apache-2.0
"""Notes of which image a restored process came from, so that its next dump finds a parent whoever makes it.

::

    STORE/restored/BOOT_ID.PID.START_TIME -> ID      a symbolic link that is only read, never followed

A restored process has no image of its own yet, and the agent that armed it may be gone.  A note names a parent and
nothing more: what is the same as there is found by comparing content, so a note that is lost or wrong costs time or
space and no page.  A link is made and read in one step: there is no torn one.  Notes of other boots, and older ones of
the same pid, go when one is written.

Errors: OSError.
"""

from __future__ import annotations

import contextlib
import os

from checkpointd.image import files

DIRECTORY = "restored"


def write_note(root_fd: int, pid: int, start_time: int, boot_id: str, image_id: str) -> None:
    """Note that this process was restored from `image_id`."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(DIRECTORY, files.DIR_MODE, dir_fd=root_fd)
    fd = files.open_dir(DIRECTORY, root_fd)
    try:
        for name in os.listdir(fd):
            if not name.startswith(f"{boot_id}.") or name.startswith(f"{boot_id}.{pid}."):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=fd)
        os.symlink(image_id, f"{boot_id}.{pid}.{start_time}", dir_fd=fd)
    finally:
        os.close(fd)


def read_note(root_fd: int, pid: int, start_time: int, boot_id: str) -> str:
    """The id of the image this process was restored from; "" when nothing is known."""
    try:
        return os.readlink(f"{DIRECTORY}/{boot_id}.{pid}.{start_time}", dir_fd=root_fd)
    except OSError:
        return ""
