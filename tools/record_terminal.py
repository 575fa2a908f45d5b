# SPDX-License-Identifier: Apache-2.0
"""Draw what a command printed as a terminal picture: `make demo 2>&1 | python tools/record_terminal.py OUT.svg`."""

from __future__ import annotations

import io
import sys

from rich.console import Console
from rich.text import Text


def main() -> None:
    out, title = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "terminal"
    lines = [line.rstrip("\n") for line in sys.stdin]
    width = max((len(line.rstrip()) for line in lines), default=80)
    console = Console(record=True, width=min(width, 150) + 1, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line.rstrip()))
    console.save_svg(out, title=title)


main()
