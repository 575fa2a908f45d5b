# SPDX-License-Identifier: Apache-2.0
"""Did an open file change since the dump in a way that matters?  Pure rules, no I/O.

| opened | what happened since | verdict |
|---|---|---|
| any | same size and modification time | fine, even a copy (whose copy: restore/reopen.py) |
| any | gone, or no regular file any more | conflict |
| append, write only | grew or shrank (a log) | fine: goes on at its end, told |
| write only | grew | fine: goes on at its offset, what came later is overwritten, told |
| write only | shrank | conflict: a hole would arise |
| read only | grew | fine, told |
| read only | shrank or was rewritten | conflict |
| read and write | changed at all | conflict: a data base would not fit the program's memory |

`changed="allow"` turns conflicts about changes into notes.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from checkpointd.state.files import RegularFile


@dataclass(frozen=True, slots=True)
class Verdict:
    """A sentence that forbids the restore, or one worth telling; both empty when nothing changed."""

    conflict: str = ""
    note: str = ""


def judge(file: RegularFile, there: os.stat_result | None, *, allow_changes: bool) -> Verdict:
    """Compare a file of the image with what is at its path now."""
    path, before = file.file.path, file.file
    if there is None:
        return Verdict(conflict=f"{path} is gone; bring it back as it was at the dump")
    if not stat.S_ISREG(there.st_mode):
        return Verdict(conflict=f"{path} is no regular file any more; bring it back as it was at the dump")
    if file.pseudo or (there.st_size == before.size_bytes and there.st_mtime_ns == before.mtime_ns):
        return Verdict()
    access = file.flags & os.O_ACCMODE
    sizes = f"from {before.size_bytes} to {there.st_size} bytes"
    grew, shrank = there.st_size > before.size_bytes, there.st_size < before.size_bytes
    how = f"grew {sizes}" if grew else f"shrank {sizes}" if shrank else "was rewritten"
    if access == os.O_WRONLY and file.flags & os.O_APPEND:
        return Verdict(note=f"{path} {how} since the dump; the program goes on appending at its end")
    if access == os.O_WRONLY and not shrank:
        return Verdict(
            note=f"{path} {how} since the dump; the program goes on writing at offset {file.offset}"
            + (" and overwrites what came later" if grew else "")
        )
    if access == os.O_RDONLY and grew:
        return Verdict(
            note=f"{path} {how} since the dump; the program goes on reading at offset {file.offset}"
        )
    sentence = f"{path} {how} since the dump"
    if allow_changes:
        return Verdict(note=f"{sentence}; restored all the same, as asked")
    return Verdict(conflict=f"{sentence}; bring back the file of that time, or restore with --changed allow")
