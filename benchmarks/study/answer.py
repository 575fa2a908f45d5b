# SPDX-License-Identifier: Apache-2.0
"""The plain answer to the thread, in sentences made from the records: who gains, how much, who pays, who should not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from benchmarks.study.seen import (
    NATIVE,
    Study,
    median,
    merged_of_changed,
    merged_share,
    most_vmas,
    over,
    packed,
    packed_of_stored,
    raw,
    stored,
    vmas_taken_back,
    xor_share,
)
from benchmarks.study.workloads import WORKLOADS
from checkpointd.report.text import count, size

VMA_LIMIT = 65_530  # vm.max_map_count
Form = Callable[[float], str]


def answer(study: Study, percent: Form) -> Iterator[str]:
    yield from _in_short(study)
    yield from _who_gains(study, percent)
    yield from _sizes(study)
    yield from _uffd_wp_in_a_guest(study, percent)
    yield from _vmas(study)
    yield from _clear(study)
    yield from _cpu(study, percent)
    yield from _should_not(study)
    yield from _own_dumps(study)
    yield from _bytes(study, percent)


def _listed(found: Mapping[str, float], form: Form) -> str:
    return ", ".join(f"{name} {form(value)}" for name, value in found.items())


def _most_first(found: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _gained(study: Study, where: str, backend: str) -> dict[str, float]:
    """Programs whose over-report an exact reporter took down: by how many pages for each that changed.

    Counted only where plain soft-dirty had something to lose (unchanged pages of mappings marked as a whole, 5 for
    each 100 that changed) and the highest of the exact repeats is below the lowest of the plain ones.
    """
    stock = study.place("stock")
    whole = study.means(stock, "soft-dirty bit", merged_of_changed)
    found = {}
    for name, share in whole.items():
        plain = study.spread(stock, name, "soft-dirty bit", over)
        exact = study.spread(where, name, backend, over)
        if plain and exact and share >= 5 and plain.low > exact.high:
            found[name] = (plain.mean - exact.mean) / 100
    return _most_first(found)


def _in_short(study: Study) -> Iterator[str]:
    precise = study.place("precise")
    both = [name for name in study.programs(precise) if name in study.programs(study.place("stock"))]
    if not both:
        return
    gain = _gained(study, precise, "precise-soft-dirty bit")
    patterns = [name for name in gain if name.startswith("pattern-")]
    programs = [name for name in gain if name not in patterns]
    yield (
        f"**In short.** Of {len(both)} programs measured with and without exact soft-dirty tracking, {len(gain)} gain: "
        + (
            f"the patterns of the thread ({', '.join(patterns)}), by far"
            if patterns
            else "no pattern of the thread"
        )
        + (f", and of the real programs {', '.join(programs)}" if programs else ", and no real program")
        + f". For the other {len(both) - len(gain)} there is nothing to gain."
    )
    yield ""


def _who_gains(study: Study, percent: Form) -> Iterator[str]:
    """Shares within one run, not differences between two: no two runs do the same work to the page."""
    stock, precise = study.place("stock"), study.place("precise")
    merged = _most_first(study.means(stock, "soft-dirty bit", merged_share))
    if not merged:
        yield "* Plain soft-dirty was not measured."
        return
    much = {name: share for name, share in merged.items() if share >= 1}
    rest = [name for name in merged if name not in much]
    yield (
        f"* **Who gains.** Of the pages plain soft-dirty reported ({stock}), these had not changed and lay in a "
        "mapping marked as a whole, because it was new or had merged with a new one: "
        + (_listed(much, percent) or "none in any program")
        + (f"; under 1 %: {', '.join(rest)}" if rest else "")
        + ". That is the most exact tracking can take away; pages written with what they held stay."
    )
    plain = study.means(stock, "soft-dirty bit", over)
    for label, where, backend in (
        ("The patch", precise, "precise-soft-dirty bit"),
        ("The merge barrier on the stock kernel", stock, "barrier-soft-dirty bit"),
    ):
        exact = study.means(where, backend, over)
        both = [name for name in plain if name in exact]
        if not both:
            yield f"* {label} was not measured beside plain soft-dirty."
            continue
        gain = _gained(study, where, backend)
        told = [f"{name} {percent(plain[name])} to {percent(exact[name])}" for name in gain]
        others = [name for name in both if name not in gain]
        yield (
            f"* **{label}** took the over-report, for each page that changed, "
            + (f"from {', '.join(told)}." if told else "from no program down.")
            + (f" Next to nothing to take: {', '.join(others)}." if others else "")
        )


def _sizes(study: Study) -> Iterator[str]:
    """What the over-report makes of the size of a dump."""
    stock, precise = study.place("stock"), study.place("precise")
    plain = study.means(stock, "soft-dirty bit", packed_of_stored)
    exact = study.means(precise, "precise-soft-dirty bit", packed_of_stored)
    both = [name for name in plain if name in exact]
    if not both:
        return
    saved = _most_first({name: 100 - 100 * exact[name] / plain[name] for name in both})
    much = {name: share for name, share in saved.items() if share >= 5}
    yield (
        "* **How much smaller** a dump that writes what is reported gets by the patch, for equal work: "
        + (_listed(much, lambda value: f"{value:.0f} %") or "no program's by 5 %")
        + (
            f"; less than 5 %: {', '.join(n for n in saved if n not in much)}"
            if len(much) < len(saved)
            else ""
        )
        + "."
    )


def _uffd_wp_in_a_guest(study: Study, percent: Form) -> Iterator[str]:
    where = study.place("stock")
    exact = study.means(where, "uffd-wp", over)
    barrier = study.means(where, "barrier-soft-dirty", over)
    both = [name for name in exact if name in barrier]
    if not both:
        return
    ratio = median([(100 + exact[name]) / (100 + barrier[name]) for name in both])
    yield (
        f"* **uffd-wp needs no patch either**: in the same guest ({where}) it reported {ratio:.2f} times what this "
        f"project's merge barrier reported for each page that changed (median of {len(both)} programs)."
    )


def _vmas(study: Study) -> Iterator[str]:
    found = False
    for where, backend in (
        (study.place("precise"), "precise-soft-dirty"),
        (study.place("stock"), "barrier-soft-dirty"),
        (NATIVE, "uffd-wp"),
    ):
        most = study.means(where, backend, most_vmas)
        beside = "the run with plain soft-dirty"
        plain = {} if where == NATIVE else study.means(study.place("stock"), "soft-dirty", most_vmas)
        if not plain:
            beside = "what there was when tracking began; the program's own growth is in it"
            plain = study.means(where, backend, lambda s: float(s.run.first_vmas))
        growth = {name: most[name] - plain[name] for name in most if name in plain}
        if not growth:
            continue
        found = True
        name = max(growth, key=lambda n: growth[n])
        text = (
            f"* **VMAs with {backend}** ({where}): at most {growth[name]:+.0f} ({name}, {most[name]:.0f} against "
            f"{plain[name]:.0f}: {beside}); the most VMAs any program had is {max(most.values()):.0f}, "
            f"{100 * max(most.values()) / VMA_LIMIT:.1f} % of the default limit of {count(VMA_LIMIT)}."
        )
        back = study.means(where, backend, vmas_taken_back)
        if where != NATIVE and back:
            most_back = max(back, key=lambda n: back[n])
            text += (
                f" Merging when the bits are cleared takes back up to {back[most_back]:.1f} an interval ({most_back})"
                if back[most_back] > 0
                else " Clearing takes none back"
            ) + "."
        yield text
    if not found:
        yield "* VMA growth was not measured."


def _clear(study: Study) -> Iterator[str]:
    plain = study.means(study.place("stock"), "soft-dirty", lambda s: s.clear_us)
    exact = study.means(study.place("precise"), "precise-soft-dirty", lambda s: s.clear_us)
    times = _most_first({name: exact[name] / plain[name] for name in exact if plain.get(name)})
    if times:
        yield (
            f"* **clear_refs** took a median of {median(list(plain.values())):,.0f} us on the stock kernel and "
            f"{median(list(exact.values())):,.0f} us on the patched one, program by program "
            f"{median(list(times.values())):.1f} times as long (median of {len(times)}). The machine is emulated and "
            "was busy: this is an order of size, and no more."
        )


def _cpu(study: Study, percent: Form) -> Iterator[str]:
    found = {name: cost.more_cpu for name in study.programs(NATIVE) if (cost := study.cost(name)) is not None}
    if not found:
        yield "* **Who pays in CPU time** is not known yet: the machine had no calm time to measure it."
        return
    # what tracking cannot do tells how far the method errs
    less = _most_first({name: -middle.median for name, middle in found.items() if middle.high < 0})
    error = max(less.values(), default=0.0)
    more = _most_first({name: middle.median for name, middle in found.items() if middle.low > 0})
    large = {name: value for name, value in more.items() if value > error}
    small = {name: value for name, value in more.items() if value <= error}
    noise = [name for name in found if name not in more and name not in less]
    yield (
        "* **Who pays in CPU time** for the same work (uffd-wp, native, freezes left out): "
        + (_listed(large, percent) or "no program's cost stood out of the noise")
        + (f"; no more than the method errs by: {_listed(small, percent)}" if small else "")
        + (f"; less when tracked, which tracking cannot do: {_listed(less, percent)}" if less else "")
        + (f"; within the noise: {', '.join(noise)}" if noise and (more or less) else "")
        + "."
    )


def _should_not(study: Study) -> Iterator[str]:
    where = study.place("precise")
    seen = study.means(where, "precise-soft-dirty", most_vmas)
    if not seen:
        return
    many = [name for name, most in seen.items() if most > VMA_LIMIT / 2]
    left = [name for name in WORKLOADS if name not in seen]
    yield (
        f"* **A program that should not use it**: {', '.join(many) or 'none'} of the {len(seen)} measured on the "
        f"patched kernel ({where}) came near the limit on VMAs. "
        + (
            f"Not measured there, so this says nothing of them: {', '.join(left)}."
            if left
            else "No program of the study is left out. None of them makes new mappings by the ten thousand: one that "
            "does, each touching the next, is the one to measure first."
        )
    )


def _own_dumps(study: Study) -> Iterator[str]:
    """What precision is worth to dumps that compare what they read."""
    for where, backend in ((study.place("stock"), "soft-dirty bit"), (NATIVE, "uffd-wp")):
        reported = study.means(where, backend, raw)
        wrote = study.means(where, backend, packed)
        kept = study.means(where, backend, stored)
        extra = {name: wrote[name] - kept[name] for name in wrote}
        if not extra:
            continue
        name = max(extra, key=lambda n: extra[n])
        yield (
            f"* **What `checkpoint dump` pays for over-reports** by {backend} ({where}): no space, because it compares "
            f"what it reads with the parent; it reads and hashes up to {size(max(reported.values()))} an interval. "
            f"A tool that writes what is reported would store up to {size(extra[name])} more an interval ({name})."
        )


def _bytes(study: Study, percent: Form) -> Iterator[str]:
    ratios = study.means(NATIVE, "uffd-wp", over)
    if ratios:
        worst, best = max(ratios, key=lambda n: ratios[n]), min(ratios, key=lambda n: ratios[n])
        yield (
            f"* **Exact to the page is not exact to the byte.** uffd-wp over-reported from {percent(ratios[best])} "
            f"({best}) to {percent(ratios[worst])} ({worst}) of what changed: silent writes, and file pages nobody "
            "tracks. Comparing contents after the read takes that out of the image, whatever the tracker."
        )
    xor = study.means(NATIVE, "uffd-wp", xor_share)
    if xor:
        few = [name for name, share in xor.items() if share < 50]
        yield (
            f"* **Differences within pages.** XORed with what they held, written pages took "
            f"{percent(min(xor.values()))} to {percent(max(xor.values()))} of their packed size; less than half "
            f"for {len(few)} of {len(xor)} programs{': ' + ', '.join(few) if few else ''}. "
            "`dump --delta` stores those that get smaller so."
        )
