# SPDX-License-Identifier: Apache-2.0
"""Compare a flattened generation with the truth, byte for byte and hole for hole.

The truth was taken just before and just after the dump.  Where both agree the image must agree with them; where
they differ somebody touched the target, which is a finding of its own (two exceptions: the page of code which
injected calls went through may have become a private copy with the file's content; holes and zeroes may change
places where the kernel makes or splits a huge page).
"""

from __future__ import annotations

import bisect

import numpy as np

from tests.oracle.engine import PRIVATE, U64, Generation, Pages
from tests.oracle.truth import PAGE, Contents, Mapping, Truth

MAX_FINDINGS = 12
HUGE = 512  # pages of a huge page
_ANONYMOUS = ("/dev/zero", "/anon_hugepage")


def judge(before: Truth, after: Truth, image: Generation) -> list[str]:
    """What is wrong, one line each; nothing when all is well."""
    findings = target_unharmed(before, after)
    findings += _mappings(before, image)
    findings += _private(before, after, image)
    findings += _shared(before, after, image)
    if not np.array_equal(np.sort(before.guards), np.sort(image.guards)):
        findings.append(f"guard regions: {_some(before.guards)} in truth, {_some(image.guards)} in the image")
    return findings[:MAX_FINDINGS]


def same_memory(before: Truth, now: Truth) -> list[str]:
    """What a restored process has otherwise than it had at the freeze."""
    findings = []

    def shown(truth: Truth) -> list[Span]:
        return _spans([m for m in truth.mappings if not m.path.startswith(("[vvar", "[vsyscall]"))])

    if shown(before) != shown(now):
        differing = sorted(set(shown(before)) ^ set(shown(now)))
        findings.append(f"other mappings than before: {[_span(span) for span in differing[:6]]}")
    allowed = np.union1d(before.private.pages, before.private.maybe_zero)
    for page in np.setdiff1d(now.private.pages, allowed).tolist():
        mapping = _find(now.mappings, page)
        if not (mapping and ("x" in mapping.prot or mapping.path == "[vdso]")):
            findings.append(f"page {page * PAGE:#x} was a hole and is none after the restore: {mapping}")
    for page in np.setdiff1d(before.private.pages, now.private.pages).tolist():
        mapping, data = _find(before.mappings, page), _row(before.private, page)
        is_file = mapping is not None and mapping.inode != 0
        if (data.any() or is_file) and not (mapping and _is_file_content(mapping, page, data)):
            findings.append(f"page {page * PAGE:#x} held data and is a hole after the restore: {mapping}")
    common = np.intersect1d(before.private.pages, now.private.pages)
    data = now.private.data[np.isin(now.private.pages, common)]
    for n in np.flatnonzero(_differs(common, data, before.private)).tolist():
        page = int(common[n])
        findings.append("restored: " + _difference(page, data[n], before.private, _find(now.mappings, page)))
    was, has = _objects_by_address(before), _objects_by_address(now)
    for start, (nr_pages, contents) in was.items():
        if start not in has:
            continue  # said already: the mappings differ
        if has[start][0] != nr_pages:
            findings.append(f"the object mapped at {start:#x} had {nr_pages} pages and has {has[start][0]}")
        restored = has[start][1]
        filled = np.setdiff1d(restored.pages, contents.pages)
        if len(filled):
            findings.append(f"the object mapped at {start:#x}: holes {filled.tolist()[:9]} were filled")
        # a page of zeroes may come back as a hole: it reads the same, to the program and to the next dump
        wrong = _differs(contents.pages, contents.data, restored)
        if wrong.any():
            pages = contents.pages[wrong].tolist()
            findings.append(f"the object mapped at {start:#x} has other contents in pages {pages[:9]}")
    if not np.array_equal(np.sort(before.guards), np.sort(now.guards)):
        findings.append(f"guard regions were {_some(before.guards)} and are {_some(now.guards)}")
    return findings[:MAX_FINDINGS]


def _objects_by_address(truth: Truth) -> dict[int, tuple[int, Contents]]:
    """Shared memory by where it is mapped: a restored object has another inode."""
    found = {}
    for mapping in truth.mappings:
        key = (mapping.device, mapping.inode, mapping.path.startswith("/SYSV"))
        if mapping.shared and key in truth.shared:
            found[mapping.start] = truth.shared[key]
    return found


def _private(before: Truth, after: Truth, image: Generation) -> list[str]:
    pages = image.pages(PRIVATE)
    if len(pages) > 1 and not bool((np.diff(pages.astype(np.int64)) > 0).all()):
        return ["the index is not sorted or holds a page twice"]
    findings = []
    allowed = np.concatenate(
        (before.private.pages, after.private.pages, before.private.maybe_zero, after.private.maybe_zero)
    )
    for page in pages[~np.isin(pages, allowed)].tolist():
        mapping = _find(before.mappings, page)
        if mapping is None or mapping.path != "[vdso]":
            findings.append(f"page {page * PAGE:#x} is a hole, yet in the image: {mapping}")
    required = np.intersect1d(before.private.pages, after.private.pages)
    for page in required[~np.isin(required, pages)].tolist():
        mapping = _find(before.mappings, page)
        data = _row(before.private, page)
        if not (mapping and "x" in mapping.prot and _is_file_content(mapping, page, data)):
            findings.append(f"page {page * PAGE:#x} holds data, yet is not in the image: {mapping}")
    common = pages[np.isin(pages, allowed)]
    data = image.read(PRIVATE, common).reshape(-1, PAGE)
    wrong = _differs(common, data, before.private) & _differs(common, data, after.private)
    for n in np.flatnonzero(wrong).tolist():
        page = int(common[n])
        findings.append(_difference(page, data[n], before.private, _find(before.mappings, page)))
    return findings


def _shared(before: Truth, after: Truth, image: Generation) -> list[str]:
    findings = []
    for key, (nr_pages, truth) in before.shared.items():
        if key not in image.objects:
            findings.append(f"shared object {key} is not in the image")
            continue
        obj, image_pages = image.objects[key]
        if image_pages != nr_pages:
            findings.append(f"shared object {key} has {nr_pages} pages, in the image {image_pages}")
        pages = image.pages(obj)
        later = after.shared.get(key, (0, truth))[1]
        allowed = np.concatenate((truth.pages, later.pages, truth.maybe_zero, later.maybe_zero))
        for page in np.setdiff1d(pages, allowed).tolist():
            findings.append(f"page {page} of shared object {key} is a hole, yet in the image")
        for page in np.setdiff1d(np.intersect1d(truth.pages, later.pages), pages).tolist():
            findings.append(f"page {page} of shared object {key} holds data, yet is not in the image")
        common = np.intersect1d(pages, np.union1d(truth.pages, truth.maybe_zero))
        data = image.read(obj, common).reshape(-1, PAGE)
        for n in np.flatnonzero(_differs(common, data, truth)).tolist():
            findings.append(f"shared object {key}: " + _difference(int(common[n]), data[n], truth, None))
    return findings


def _change(truth: Contents, later: Contents) -> str:
    """Which pages differ between two looks at one object."""
    came, went = np.setdiff1d(later.pages, truth.pages), np.setdiff1d(truth.pages, later.pages)
    other = [
        page
        for page in np.intersect1d(truth.pages, later.pages).tolist()
        if not np.array_equal(_row(truth, page), _row(later, page))
    ]
    return f"pages {came.tolist()} came, {went.tolist()} went, {other} are other than before"


def target_unharmed(before: Truth, after: Truth) -> list[str]:
    """Taking a dump must not change what the target has."""
    findings = []
    if _spans(before.mappings) != _spans(after.mappings):
        gone = sorted(set(_spans(before.mappings)) ^ set(_spans(after.mappings)))
        findings.append(f"the dump changed the target's mappings: {gone[:6]}")
    common = np.intersect1d(before.private.pages, after.private.pages)
    changed = (
        (before.private.data[np.isin(before.private.pages, common)])
        != (after.private.data[np.isin(after.private.pages, common)])
    )
    rows = np.flatnonzero(changed.any(axis=1))
    moved = np.concatenate((_moved_by_huge_pages(before, after), _moved_by_huge_pages(after, before)))
    holes = np.setdiff1d(np.setxor1d(before.private.pages, after.private.pages), moved)
    for page in np.union1d(common[rows], holes).tolist():
        mapping = _find(before.mappings, page)
        if not (mapping and "x" in mapping.prot):
            findings.append(f"the dump changed page {page * PAGE:#x} of the target: {mapping}")
    for key, (_, truth) in before.shared.items():
        later = after.shared.get(key, (0, truth))[1]
        if not np.array_equal(truth.pages, later.pages) or not np.array_equal(truth.data, later.data):
            findings.append(f"the dump changed shared object {key}: {_change(truth, later)}")
    return findings


def _moved_by_huge_pages(without: Truth, having: Truth) -> U64:
    """Pages of zeroes that came with a huge page the kernel made, or went with one it split: nobody's change.

    khugepaged fills the holes of what it collapses (max_ptes_none), at any time; of a huge page that is split, pages
    of zeroes become holes again.

    Source: Linux Documentation/admin-guide/mm/transhuge.rst, mm/khugepaged.c, mm/huge_memory.c.
    """
    pages = having.private.pages
    lone = np.setdiff1d(pages, without.private.pages)
    moved = []
    for block in np.unique(lone // HUGE).tolist():
        mapping = _find(having.mappings, block * HUGE)
        is_within = mapping is not None and mapping.end >= (block + 1) * HUGE * PAGE
        if is_within and np.count_nonzero(pages // HUGE == block) == HUGE:
            moved += [
                page for page in lone[lone // HUGE == block].tolist() if not _row(having.private, page).any()
            ]
    return np.array(moved, dtype=np.uint64)


def _mappings(before: Truth, image: Generation) -> list[str]:
    def shown(mapping: Mapping) -> bool:
        return not mapping.path.startswith(("[vdso]", "[vvar", "[vsyscall]"))

    wanted = _merge([(m.start, m.end, m.prot, m.offset, m.inode != 0) for m in before.mappings if shown(m)])
    special = [(m.start, m.end) for m in before.mappings if not shown(m)]
    inodes = {(m.start): m.inode for m in before.mappings}
    has = _merge(
        [
            (start, end, prot, offset, _inode_at(before, inodes, start) != 0)
            for start, end, prot, offset in image.mappings
            if not any(start < b and a < end for a, b in special)
        ]
    )
    if wanted == has:
        return []
    lines = [f"only in truth: {_span(span)}" for span in wanted if span not in has]
    lines += [f"only in the image: {_span(span)}" for span in has if span not in wanted]
    return lines[:6]


def _inode_at(before: Truth, inodes: dict[int, int], start: int) -> int:
    if start in inodes:
        return inodes[start]
    mapping = _find(before.mappings, start // PAGE)
    return mapping.inode if mapping else 0


Span = tuple[int, int, str, int, bool]


def _merge(spans: list[Span]) -> list[Span]:
    """Neighbours that differ in nothing become one: registering with userfaultfd may split and join them."""
    out: list[Span] = []
    for start, end, prot, offset, is_file in sorted(spans):
        if not is_file:
            offset = 0
        if out:
            left = out[-1]
            continues = not is_file or left[3] + (start - left[0]) == offset
            if left[1] == start and left[2] == prot and left[4] == is_file and continues:
                out[-1] = (left[0], end, prot, left[3], is_file)
                continue
        out.append((start, end, prot, offset, is_file))
    return out


def _spans(mappings: list[Mapping]) -> list[Span]:
    """Private mappings of /dev/zero and of a hugetlb pool are anonymous memory by another name."""
    return _merge(
        [
            (
                m.start,
                m.end,
                m.prot,
                m.offset,
                m.inode != 0 and (m.shared or not m.path.startswith(_ANONYMOUS)),
            )
            for m in mappings
        ]
    )


def _span(span: Span) -> str:
    return f"{span[0]:x}-{span[1]:x} {span[2]} {span[3]:x}"


def _differs(pages: U64, data: Pages, truth: Contents) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """For each page of the image: is it other than in this truth?  Absent in truth counts as zeroes."""
    out = np.ones(len(pages), dtype=bool)
    if len(pages) == 0:
        return out
    order = np.argsort(truth.pages)
    keys = truth.pages[order]
    at = np.searchsorted(keys, pages)
    at[at == len(keys)] = 0
    found = (keys[at] == pages) if len(keys) else np.zeros(len(pages), dtype=bool)
    rows = np.flatnonzero(found)
    out[rows] = (truth.data[order[at[rows]]] != data[rows]).any(axis=1)
    absent = np.flatnonzero(~found)
    out[absent] = data[absent].any(axis=1)
    return out


def _difference(page: int, data: Pages, truth: Contents, mapping: Mapping | None) -> str:
    rows = np.flatnonzero(truth.pages == page)
    if not len(rows):
        return f"page {page * PAGE:#x} should read as zeroes: {mapping}"
    right = truth.data[rows[0]]
    bytes_wrong = np.flatnonzero(right != data)
    at = int(bytes_wrong[0])
    return (
        f"page {page * PAGE:#x}: {len(bytes_wrong)} bytes differ, the first at +{at:#x}: "
        f"{right[at : at + 8].tobytes().hex()} is true, {data[at : at + 8].tobytes().hex()} in the image: {mapping}"
    )


def _find(mappings: list[Mapping], page: int) -> Mapping | None:
    at = bisect.bisect_right([m.start for m in mappings], page * PAGE) - 1
    return mappings[at] if at >= 0 and page * PAGE < mappings[at].end else None


def _row(contents: Contents, page: int) -> Pages:
    return contents.data[np.flatnonzero(contents.pages == page)[0]]


def _is_file_content(mapping: Mapping, page: int, data: Pages) -> bool:
    try:
        with open(mapping.path, "rb") as file:
            file.seek(mapping.offset + page * PAGE - mapping.start)
            return file.read(PAGE).ljust(PAGE, b"\0") == data.tobytes()
    except OSError:
        return False


def _some(pages: U64) -> str:
    return "[" + " ".join(f"{page * PAGE:#x}" for page in pages[:6].tolist()) + "]"
