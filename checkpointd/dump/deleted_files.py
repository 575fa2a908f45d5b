# SPDX-License-Identifier: Apache-2.0
"""Content of open files that have been deleted: it goes with the process, and is saved as pages.

Raises OSError, and what the page worker raised.
"""

from __future__ import annotations

import os

from checkpointd.dump.child import Heard
from checkpointd.dump.page_reading import CopyRequest
from checkpointd.dump.pages import PageWorker
from checkpointd.memory import FILE_CONTENT_OBJECTS
from checkpointd.target.extents import all_data_extents
from checkpointd.target.files import CapturedFiles


def read_deleted_files(worker: PageWorker, pid: int, files: CapturedFiles, heard: Heard) -> None:
    """Content that is too large for the state, read before anybody can change it; lets our descriptors go."""
    extras = files.extra_objects
    paths = [f"/proc/{os.getpid()}/fd/{extra.fd}" for extra in extras]
    try:
        held = all_data_extents([(path, one.size_bytes) for path, one in zip(paths, extras, strict=True)])
        requests = [
            CopyRequest(pid, FILE_CONTENT_OBJECTS + one.description, runs, source=path)
            for path, one, runs in zip(paths, extras, held, strict=True)
        ]
        if requests:
            worker.copy(requests, heard)
    finally:
        for extra in extras:
            extra.close()
