# SPDX-License-Identifier: Apache-2.0
"""The bands of a heat map: which addresses changed when, with the empty address space between them left out."""

from __future__ import annotations

from collections.abc import Sequence

from checkpointd.report.charts import Band
from checkpointd.report.record import Run
from checkpointd.report.summary import mapping_name

MAX_BANDS = 14
MAX_ROWS = 40  # of one band
_OBJECTS = 1 << 52
_FAR_PAGES = 4096  # hot addresses further apart than 16 MiB are in different bands


def bands(run: Run) -> list[Band]:
    """The busiest stretches of address space of a run, by address."""
    cells = [
        (int(page), int(nr), number, int(epoch["heat_pages"]))
        for number, epoch in sorted(run.epochs.items())
        if number > 0
        for page, nr in epoch["heat"]
    ]
    if not cells:
        return []
    cells.sort()
    stretches: list[list[tuple[int, int, int, int]]] = [[cells[0]]]
    end = cells[0][0] + cells[0][3]
    for cell in cells[1:]:
        if cell[0] - end > _FAR_PAGES:
            stretches.append([])
        stretches[-1].append(cell)
        end = max(end, cell[0] + cell[3])
    busiest = sorted(stretches, key=lambda some: -sum(cell[1] for cell in some))[:MAX_BANDS]
    names = _names(run)
    return [_band(some, names) for some in sorted(busiest)]


def _band(cells: Sequence[tuple[int, int, int, int]], names: Sequence[tuple[int, int, int, str]]) -> Band:
    first, last = cells[0][0], max(page + width for page, _, _, width in cells)
    widest = max(width for _, _, _, width in cells)
    nr_rows = min(MAX_ROWS, -(-(last - first) // widest))
    per_row = -(-(last - first) // nr_rows)
    found: dict[tuple[int, int], int] = {}
    for page, nr, epoch, _ in cells:
        key = ((page - first) // per_row, epoch)
        found[key] = found.get(key, 0) + nr
    shares = {key: (min(1.0, nr / per_row), nr) for key, nr in found.items()}
    return Band(_label(first, last, names), nr_rows, per_row, shares)


def _names(run: Run) -> list[tuple[int, int, int, str]]:
    """(start page, end page, pages changed, name) of all mappings listed in any epoch."""
    return [
        (row[1] >> 12, row[2] >> 12, row[6], mapping_name(row))
        for epoch in run.epochs.values()
        for row in epoch["mappings"]
        if row[0] >= 0
    ]


def _label(first: int, last: int, names: Sequence[tuple[int, int, int, str]]) -> str:
    if first >= _OBJECTS:
        return "shared memory"
    inside: dict[str, int] = {}
    for start, end, changed, name in names:
        if start < last and end > first:
            inside[name] = inside.get(name, 0) + changed + 1
    if not inside:
        return f"{first << 12:x}"
    best = max(inside, key=lambda name: inside[name])
    text = best if len(best) <= 24 else best[:23] + "…"
    return text if len(inside) == 1 else f"{text} +{len(inside) - 1}"
