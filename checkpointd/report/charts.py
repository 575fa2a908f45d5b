# SPDX-License-Identifier: Apache-2.0
"""Charts as SVG text.  Pure; colours are CSS variables (`--c0`, ... and `--ink`, `--faint`, `--grid`) of the page.

Every chart has a title for screen readers, labelled axes with units, and a tooltip (`<title>`) for each mark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 560  # of a chart in half a page
HEAT_WIDTH = 1160
LEFT, RIGHT, TOP, BOTTOM = 76, 12, 14, 44

Form = Callable[[float], str]
Scale = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points (x, y), and the CSS class of its colour."""

    name: str
    css: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Bar:
    """One part of a bar: its class of colour, its value, and what it is."""

    css: str
    value: float
    name: str


def ticks(most: float, nr: int = 5, *, binary: bool = False) -> list[float]:
    """Round numbers from 0 that cover `most`; with `binary` round in KiB, MiB, ..."""
    if most <= 0:
        return [0.0, 1.0]
    unit = 1024.0 ** math.floor(math.log(most, 1024)) if binary and most >= 1 else 1.0
    rough = most / unit / nr
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    if not binary:
        step = max(step, 1.0) if most >= nr else step
    return [n * step * unit for n in range(math.ceil(most / unit / step - 1e-9) + 1)]


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _svg(height: float, title: str, body: Sequence[str], width: int = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width} {_n(height)}" role="img" aria-label="{escape(title, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg">' + "".join(body) + "</svg>"
    )


def _text(x: float, y: float, words: str, css: str = "tick", anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{_n(x)}" y="{_n(y)}" class="{css}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def _y_axis(values: Sequence[float], scale: Scale, form: Form, label: str, bottom: float) -> list[str]:
    out = []
    for value in values:
        y = scale(value)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_n(y)}" y2="{_n(y)}" class="grid"/>')
        out.append(_text(LEFT - 8, y + 4, form(value), anchor="end"))
    middle = (TOP + bottom) / 2
    out.append(_text(14, middle, label, "label", more=f' transform="rotate(-90 14 {_n(middle)})"'))
    return out


def line_chart(title: str, series: Sequence[Series], x_label: str, y_label: str, form: Form) -> str:
    """Lines over epochs."""
    bottom = TOP + 210.0
    xs = [x for one in series for x, _ in one.points] or [0.0, 1.0]
    first, last = min(xs), max(*xs, min(xs) + 1)
    levels = ticks(max((y for one in series for _, y in one.points), default=0))

    def at_x(x: float) -> float:
        return LEFT + 10 + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT - 20)

    def at_y(y: float) -> float:
        return bottom - y / levels[-1] * (bottom - TOP)

    out = _y_axis(levels, at_y, form, y_label, bottom)
    step = max(1, math.ceil((last - first) / 12))
    for x in range(int(first), int(last) + 1, step):
        out.append(_text(at_x(x), bottom + 18, str(x)))
    out.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 38, x_label, "label"))
    for one in series:
        points = " ".join(f"{_n(at_x(x))},{_n(at_y(y))}" for x, y in one.points)
        out.append(f'<polyline points="{points}" class="line s-{one.css}"/>')
        if len(one.points) <= 200:
            out += [
                f'<circle cx="{_n(at_x(x))}" cy="{_n(at_y(y))}" r="3" class="dot f-{one.css}">'
                f"<title>{escape(one.name)}, epoch {x:g}: {escape(form(y))}</title></circle>"
                for x, y in one.points
            ]
    return _svg(bottom + BOTTOM, title, out)


def bar_chart(
    title: str,
    rows: Sequence[tuple[str, Sequence[Bar]]],
    x_label: str,
    form: Form,
    *,
    stacked: bool,
    binary: bool = False,
) -> str:
    """Horizontal bars, a group (or a stack) of them for each row."""
    left, thick, gap = 130.0, 18.0, 16.0
    heights = [thick + 6 if stacked else thick * len(bars) for _, bars in rows]
    bottom = TOP + sum(heights) + gap * len(rows)
    totals = [
        sum(b.value for b in bars) if stacked else max((b.value for b in bars), default=0) for _, bars in rows
    ]
    levels = ticks(max(totals, default=0), binary=binary)
    room = WIDTH - left - 90

    def at_x(value: float) -> float:
        return left + value / levels[-1] * room

    out = []
    for value in levels:
        x = at_x(value)
        out.append(f'<line x1="{_n(x)}" x2="{_n(x)}" y1="{TOP}" y2="{_n(bottom)}" class="grid"/>')
        out.append(_text(x, bottom + 18, form(value)))
    y = TOP + gap / 2
    for (name, bars), height, total in zip(rows, heights, totals, strict=True):
        out.append(_text(left - 10, y + height / 2 + 4, name, "name", "end"))
        x = left
        for n, bar in enumerate(bars):
            width = at_x(bar.value) - left
            top = y if stacked else y + n * thick
            tip = f"<title>{escape(name)}, {escape(bar.name)}: {escape(form(bar.value))}</title>"
            if width > 0:
                out.append(
                    f'<rect x="{_n(x)}" y="{_n(top + 1)}" width="{max(width, 0.8):.2f}" '
                    f'height="{_n((height if stacked else thick) - 2)}" class="f-{bar.css}">{tip}</rect>'
                )
            if stacked:
                x += width
            else:
                out.append(_text(left + width + 6, top + thick / 2 + 4, form(bar.value), "value", "start"))
        if stacked:
            out.append(_text(x + 6, y + height / 2 + 4, form(total), "value", "start"))
        y += height + gap
    out.append(_text((left + WIDTH - RIGHT) / 2, bottom + 38, x_label, "label"))
    return _svg(bottom + BOTTOM, title, out)


@dataclass(frozen=True, slots=True)
class Band:
    """A stretch of address space in a heat map: its name, and per cell (row in the band, epoch) a share 0 to 1."""

    name: str
    nr_rows: int
    row_pages: int
    cells: dict[tuple[int, int], tuple[float, int]]
    """(row, epoch) -> (share of the pages that changed, pages that changed)"""


def heat_map(title: str, bands: Sequence[Band], epochs: Sequence[int]) -> str:
    """Addresses from top to bottom, in bands with what lies between them left out; epochs from left to right."""
    left, row_height, gap = 230.0, 5.0, 10.0
    room = HEAT_WIDTH - left - RIGHT
    width = room / max(1, len(epochs))
    column = {epoch: n for n, epoch in enumerate(epochs)}
    out: list[str] = []
    y = float(TOP)
    for band in bands:
        height = max(band.nr_rows * row_height, 14.0)
        tall = height / band.nr_rows
        out.append(f'<rect x="{left}" y="{_n(y)}" width="{_n(room)}" height="{_n(height)}" class="cold"/>')
        out.append(_text(left - 10, y + min(height / 2 + 4, height), band.name, "name", "end"))
        for (row, epoch), (share, nr) in sorted(band.cells.items()):
            if epoch not in column:
                continue
            tip = f"{band.name}, epoch {epoch}: {nr} pages changed"
            out.append(
                f'<rect x="{_n(left + column[epoch] * width)}" y="{_n(y + row * tall)}" width="{width + 0.3:.2f}" '
                f'height="{tall + 0.2:.2f}" class="hot" fill-opacity="{0.18 + 0.82 * share:.2f}">'
                f"<title>{escape(tip)}</title></rect>"
            )
        y += height + gap
    bottom = y
    step = max(1, len(epochs) // 10)
    for n in range(0, len(epochs), step):
        out.append(_text(left + (n + 0.5) * width, bottom + 12, str(epochs[n])))
    out.append(_text(left + room / 2, bottom + 32, "epoch", "label"))
    middle = (TOP + bottom) / 2
    out.append(_text(14, middle, "address", "label", more=f' transform="rotate(-90 14 {_n(middle)})"'))
    return _svg(bottom + 40, title, out, HEAT_WIDTH)
