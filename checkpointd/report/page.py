# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page: no script, no font, no picture from anywhere; light and dark by the reader's wish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from checkpointd.report.charts import Bar, Series, bar_chart, heat_map, line_chart
from checkpointd.report.heat import bands
from checkpointd.report.record import Measurement, Run
from checkpointd.report.summary import CAUSES, BackendSummary, RunSummary, Summary, summarise
from checkpointd.report.text import MISSING, count, size, time

_PAGE = 4096
_TOP = 12

_STYLE = """
:root{color-scheme:light dark;--paper:#fbfbfa;--card:#fff;--ink:#1c2024;--faint:#5d666f;--grid:#e3e6e9;--edge:#d9dde1;
--good:#1a7f4b;--bad:#c0362c;--c0:#2f6fb3;--c1:#1f9d83;--c2:#d2691e;--c3:#8a56b8;--c4:#b58a00;--c5:#c94f7c;--c6:#7b8794;
--hot:#d1491b;--cold:#eef0f2}
@media (prefers-color-scheme:dark){:root{--paper:#15181b;--card:#1d2125;--ink:#e6e9ec;--faint:#9aa5b0;--grid:#31373d;
--edge:#343b42;--good:#58c48c;--bad:#ff7b6e;--c0:#6ea8e6;--c1:#4fcdb0;--c2:#f2995a;--c3:#bd90e8;--c4:#e3bd4a;
--c5:#f08cb0;--c6:#98a4b0;--hot:#ff8a4c;--cold:#262b30}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;margin:0 0 4px;line-height:1.25}h2{font-size:17px;margin:0 0 2px}
p{margin:4px 0}.sub{color:var(--faint);overflow-wrap:anywhere}code{font:13px ui-monospace,monospace}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:20px 0}
.tile,.card{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:14px 16px}
.tile b{display:block;font-size:23px;line-height:1.2;font-weight:650}.tile span{color:var(--faint);font-size:13px}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:14px}
.card{margin:0;min-width:0;overflow-x:auto}.wide{margin:14px 0}
.card>p{color:var(--faint);font-size:13.5px}
svg{width:100%;height:auto;display:block;margin-top:8px}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .tick{fill:var(--faint)}
svg .label{fill:var(--faint);font-size:12.5px}
svg .value{font-size:11.5px}svg .grid{stroke:var(--grid);stroke-width:1}svg .line{fill:none;stroke-width:2}
svg .cold{fill:var(--cold)}svg .hot{fill:var(--hot)}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums;margin-top:8px}
th,td{padding:5px 8px;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--faint);font-weight:550}tr:last-child td{border-bottom:0}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin-top:6px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.ok{color:var(--good)}.no{color:var(--bad);font-weight:650}
details{margin-top:8px}summary{cursor:pointer;color:var(--faint)}
footer{color:var(--faint);font-size:13px;margin-top:28px}
""" + "".join(
    f".f-c{n}{{fill:var(--c{n})}}.s-c{n}{{stroke:var(--c{n})}}.b-c{n}{{background:var(--c{n})}}"
    for n in range(7)
)

_COLOURS = {
    "uffd-wp": "c0",
    "content": "c1",
    "soft-dirty": "c2",
    "precise-soft-dirty": "c3",
    "barrier-soft-dirty": "c4",
}
_CAUSE_COLOURS = dict(zip(CAUSES, ("c0", "c1", "c6", "c3", "c2", "c4", "c5"), strict=True))

_CAUSE_WORDS = {
    "written": "held data before, and its bytes differ",
    "new": "held no data before",
    "new_zero": "new, and holds zeroes only",
    "forced": "unchanged; of a kind that cannot be tracked (copied file pages, pinned, KSM)",
    "merged": "unchanged; its whole VMA is marked, being new or merged with a new one",
    "huge": "unchanged; a huge page is marked as one",
    "silent": "unchanged; written with the bytes it held",
}


def html(measurement: Measurement) -> str:
    """The page."""
    found = summarise(measurement)
    name = str(measurement.header["comm"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(name)}: dirty tracking measured</title><style>{_STYLE}</style></head><body><main>"
        + "\n".join(_parts(measurement, found))
        + "</main></body></html>\n"
    )


def _colour(name: str) -> str:
    return _COLOURS.get(name, "c6")


def _parts(measurement: Measurement, found: Summary) -> Iterator[str]:
    header = measurement.header
    yield f"<header><h1>{escape(found.title)}</h1>"
    yield f'<p class="sub"><code>{escape(str(header["cmdline"])[:300])}</code></p>'
    yield (
        f'<p class="sub">{escape(str(header["created"]))}, an interval of {time(header["interval_us"])}, '
        f"{sum(run.nr_epochs for run in found.runs)} epochs in {len(found.runs)} "
        f"run{'s' if len(found.runs) != 1 else ''}. Every figure below was counted or timed.</p>"
    )
    for note in found.notes:
        yield f'<p class="sub">Note: {escape(note)}</p>'
    yield "</header>"
    if not found.backends:
        yield "<p>No epoch was measured.</p>"
        return
    yield _tiles(found)
    yield _missed(found)
    yield _card("Backends", "Pages and bytes per epoch, averages.", _backend_table(found.backends), wide=True)
    yield '<div class="grid2">'
    yield _over_chart(measurement)
    yield _size_chart(found)
    yield _cause_chart(found)
    yield _vma_chart(measurement)
    yield "</div>"
    for run in measurement.runs:
        yield _heat(run, len(measurement.runs) > 1)
    yield '<div class="grid2">'
    for backend in found.backends:
        yield _mappings(backend)
    for summary in found.runs:
        yield _program(summary)
    yield "</div>"
    yield (
        f"<footer>Made by {escape(str(header.get('program', 'checkpointd')))} from a recorded measurement. "
        "The truth is a byte comparison of two full reads of the frozen program by a reader of its own. "
        "docs/measuring.md says what each word means and what disturbs what.</footer>"
    )


def _tiles(found: Summary) -> str:
    run = found.runs[0]
    tiles = [
        (size(run.held.mean * _PAGE), "held by the program"),
        (
            size(run.changed.mean * _PAGE),
            f"really changed per epoch, {_share(run.changed.mean, run.held.mean)}",
        ),
    ]
    for b in found.backends:
        over = MISSING if b.over_ratio is None else f"{100 * b.over_ratio:+.1f} %"
        tiles.append((over, f"over-reported by {b.name}"))
    missed = sum(b.missed for b in found.backends if not b.advisory)
    tiles.append((str(missed), "changed pages missed, all backends"))
    cells = [f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles[:-1]]
    css = "no" if missed else "ok"
    cells.append(f'<div class="tile"><b class="{css}">{missed}</b><span>{escape(tiles[-1][1])}</span></div>')
    return f'<div class="tiles">{"".join(cells)}</div>'


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f} % of that" if whole else ""


def _missed(found: Summary) -> str:
    if not found.missed:
        return ""
    rows = [(backend, str(epoch), page, why) for backend, epoch, page, why in found.missed]
    return _card(
        "Missed pages",
        "A restore made of these reports would hold other bytes here.",
        _table(("backend", "epoch", "page", "why"), rows),
        wide=True,
    )


def _card(title: str, words: str, body: str, *, wide: bool = False) -> str:
    css = "card wide" if wide else "card"
    return f'<section class="{css}"><h2>{escape(title)}</h2><p>{escape(words)}</p>{body}</section>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _legend(items: Sequence[tuple[str, str]]) -> str:
    cells = [f'<span><i class="b-{css}"></i>{escape(name)}</span>' for name, css in items]
    return f'<div class="legend">{"".join(cells)}</div>'


def _backend_table(backends: Sequence[BackendSummary]) -> str:
    header = (
        *("backend", "read", "reported", "changed", "over-reported", "over / changed", "silent", "missed"),
        *("raw", "packed", "stored", "collecting", "frozen"),
    )
    rows = [
        (
            b.name,
            count(b.read.mean),
            f"{count(b.reported.mean)} ({count(b.reported.low)} to {count(b.reported.high)})",
            count(b.changed.mean),
            count(b.over_reported.mean),
            MISSING if b.over_ratio is None else f"{100 * b.over_ratio:.1f} %",
            count(b.silent.mean),
            str(b.missed),
            size(b.bytes_raw.mean),
            size(b.bytes_packed.mean),
            size(b.bytes_stored.mean),
            MISSING if b.collect_us is None else time(b.collect_us.mean),
            MISSING if b.frozen_us is None else time(b.frozen_us.mean),
        )
        for b in backends
    ]
    return _table(header, rows)


def _over_chart(measurement: Measurement) -> str:
    series = []
    for name, run in measurement.backends():
        points = [(float(n), float(r["pages_over_reported"])) for n, r in sorted(run.backends[name].items())]
        series.append(Series(name, _colour(name), points))
    chart = line_chart("Over-reported pages per epoch", series, "epoch", "pages", count)
    return _card(
        "Over-reported pages",
        "Reported as changed, though every byte is the same.",
        _legend([(one.name, one.css) for one in series]) + chart,
    )


def _size_chart(found: Summary) -> str:
    rows = [
        (
            b.name,
            [
                Bar("c6", b.bytes_raw.mean, "raw"),
                Bar("c0", b.bytes_packed.mean, "packed"),
                Bar("c1", b.bytes_stored.mean, "stored"),
            ],
        )
        for b in found.backends
    ]
    chart = bar_chart("Bytes per epoch", rows, "bytes per epoch", size, stacked=False, binary=True)
    legend = _legend(
        [
            ("raw: reported × 4 KiB", "c6"),
            ("packed: compressed", "c0"),
            ("stored: compressed, changed only", "c1"),
        ]
    )
    return _card("Size of an incremental dump", "Page data of one epoch.", legend + chart)


def _cause_chart(found: Summary) -> str:
    rows = [
        (b.name, [Bar(_CAUSE_COLOURS[c], b.causes[c] * _PAGE, c) for c in CAUSES]) for b in found.backends
    ]
    seen = [c for c in CAUSES if any(b.causes[c] for b in found.backends)]
    chart = bar_chart(
        "Why pages were reported", rows, "bytes reported per epoch", size, stacked=True, binary=True
    )
    words = "".join(f"<p>{escape(c)}: {escape(_CAUSE_WORDS[c])}</p>" for c in seen)
    details = f"<details><summary>What the causes mean</summary>{words}</details>"
    return _card(
        "Why pages were reported",
        "Every reported page has one cause; only written and new are changes.",
        _legend([(c, _CAUSE_COLOURS[c]) for c in seen]) + chart + details,
    )


def _vma_chart(measurement: Measurement) -> str:
    series = []
    for n, run in enumerate(measurement.runs):
        names = run.start["backends"]
        points = [(float(number), float(epoch["nr_vmas"])) for number, epoch in sorted(run.epochs.items())]
        if points:
            css = _colour(names[0]) if names else f"c{n % 7}"
            series.append(Series("run with " + " + ".join(names), css, points))
    chart = line_chart("VMAs", series, "epoch (0: before tracking began)", "VMAs", count)
    return _card(
        "VMAs",
        "Mappings of the program at each freeze; the kernel allows 65,530 by default.",
        _legend([(one.name, one.css) for one in series]) + chart,
    )


def _heat(run: Run, many: bool) -> str:
    found = bands(run)
    epochs = [number for number in sorted(run.epochs) if number > 0]
    if not found or not epochs:
        return ""
    title = "Changed pages by address" + (f" (run with {' + '.join(run.start['backends'])})" if many else "")
    body = heat_map(title, found, epochs)
    words = (
        "The stronger the colour, the larger the share of pages there that changed in that epoch. "
        "Address space between bands is left out."
    )
    return _card(title, words, body, wide=True)


def _mappings(backend: BackendSummary) -> str:
    rows = [
        (m.name, count(m.reported), count(m.changed), count(m.over_reported), size(m.reported * _PAGE))
        for m in backend.mappings[:_TOP]
    ]
    more = len(backend.mappings) - _TOP
    body = _table(("mapping", "reported", "changed", "over", "bytes"), rows)
    if more > 0:
        body += f"<p>… and {more} more</p>"
    return _card(
        f"What makes dumps big, by {backend.name}", "Pages per epoch; the busiest mappings first.", body
    )


def _program(run: RunSummary) -> str:
    def both(before: float | None, tracked: float | None, scale: float, unit: str) -> tuple[str, str]:
        return tuple(MISSING if v is None else f"{v * scale:,.1f}{unit}" for v in (before, tracked))  # type: ignore[return-value]

    throughput = None if run.throughput is None else run.throughput.mean
    rows = [
        ("CPU used", *both(run.cpu_before, run.cpu, 100, " %")),
        ("minor faults a second", *both(run.faults_before, run.faults, 1, "")),
        ("throughput a second", *both(run.throughput_before, throughput, 1, "")),
        ("VMAs, first and last", count(run.first_vmas), count(run.last_vmas)),
        ("freezing, mean and most", time(run.freezing_us.mean), time(run.freezing_us.high)),
    ]
    body = _table(("", "untracked", "tracked"), rows[:3]) + _table(("", "", ""), rows[3:])
    if run.written:
        within = [
            ("lines of 64 bytes that differ in a written page", f"{run.lines / run.written:.1f} of 64"),
            ("written pages whole, packed", size(run.bytes_written_stored)),
            ("written pages XORed with before, packed", size(run.bytes_xor)),
            ("written pages as lines", size(run.bytes_lines)),
        ]
        body += _table(("within pages, per epoch", ""), within)
    words = "While it ran, freezes left out. CPU time comes in steps of 10 ms."
    return _card(f"The program beside {' + '.join(run.backends)}", words, body)
