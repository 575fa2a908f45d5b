# SPDX-License-Identifier: Apache-2.0
"""Changes a few pages and maps new memory beside the old, once for each time it is asked: `DIRECTORY`.

DIRECTORY/asked holds how often it was asked; DIRECTORY/done gets "TIMES SWITCH" when it has done so and all it holds is
as it should be, SWITCH being what the kernel says of precise tracking (True, False, None); or "broken".
"""

import mmap
import os
import sys
import time
from pathlib import Path

from kernel_shim import switch

PAGE = 4096
LEDGER_PAGES, NEW_PAGES, CHANGES = 4096, 16, 5


def anonymous(nr_pages: int) -> mmap.mmap:
    return mmap.mmap(-1, nr_pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def main() -> None:
    directory = Path(sys.argv[1])
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):  # nothing of whoever started us
        os.dup2(null, fd)
    os.close(null)
    asked, done, part = (str(directory / name) for name in ("asked", "done", "part"))
    areas = [anonymous(LEDGER_PAGES)]
    expected: dict[tuple[int, int], int] = {}

    def put(area: int, page: int, value: int) -> None:
        areas[area][page * PAGE] = value
        expected[area, page] = value

    for page in range(LEDGER_PAGES):
        put(0, page, page % 251 + 1)
    times = 0
    while True:
        for n in range(CHANGES):
            put(0, (times * 37 + n * 101) % LEDGER_PAGES, (times * 31 + n) % 251 + 1)
        areas.append(anonymous(NEW_PAGES))
        for page in range(NEW_PAGES):
            put(len(areas) - 1, page, (times + page) % 251 + 1)
        right = all(areas[area][page * PAGE] == value for (area, page), value in expected.items())
        with open(part, "w") as file:
            file.write(f"{times} {switch.query()}" if right else "broken")
        os.rename(part, done)
        while True:
            with open(asked) as file:
                wanted = int(file.read() or 0)
            if wanted > times:
                break
            time.sleep(0.05)
        times += 1


main()
