# SPDX-License-Identifier: Apache-2.0
"""Histories: what a target is told, line by line, with the freezes in between.

A line is a command of oracle_target.c, "@K command" for relative K, or one of

* ``freeze``: take the truth, dump (the first one in full, later ones incrementally), take the truth again, judge;
* ``failfreeze``: a dump that fails after it read: nothing may be lost by it;
* ``fullfreeze``: as freeze, but in full in the middle of a chain;
* ``restore N``: kill the target, bring back the N-th last generation, compare all memory, go on from there;
* ``stormfreeze SLOT PAGES``: dump while a thread writes; the image must be one true instant;
* ``directfreeze SLOT PAGES``: dump while a thread has the disk write into its pages (O_DIRECT): each page must be one
  that the disk had, and what lands during and after the dump is in the next generation;
* ``exec``: the target begins anew as another program.

The same seed gives the same lines for ever; `save` and `load` keep a history in a file of its own.
"""

from __future__ import annotations

import random
from pathlib import Path

NR_SLOTS = 20
NR_FILES = 4

_KINDS = (
    ("anon", 12), ("noreserve", 2), ("growsdown", 2), ("none", 2), ("populate", 3), ("locked", 2), ("thp", 2),
    ("shared", 4), ("zero", 2), ("sysv", 3), ("private-file", 5), ("shared-file", 2), ("file", 6),
    ("file-private", 4), ("hugetlb", 2), ("huge-shared", 1), ("huge-memfd", 1), ("huge-sysv", 1),
)  # fmt: skip
_WRITES = (("fill", 10), ("byte", 8), ("stride", 4), ("zero", 4), ("same", 3), ("read", 4))
_ADVICE = (
    ("dontneed", 10), ("free", 3), ("pageout", 2), ("cold", 1), ("hugepage", 2), ("nohugepage", 1),
    ("collapse", 3), ("mergeable", 1), ("unmergeable", 1), ("dontfork", 1), ("dofork", 1), ("wipeonfork", 1),
    ("keeponfork", 1), ("remove", 4), ("guard", 3), ("unguard", 2), ("populate-read", 2), ("populate-write", 2),
)  # fmt: skip
_VERBS = (
    ("map", 14), ("over", 6), ("next", 4), ("write", 34), ("unmap", 5), ("protect", 5), ("remap", 8),
    ("advise", 14), ("lock", 2), ("kernel", 5), ("ring", 3), ("uffd", 2), ("brk", 3), ("stack", 2), ("file", 4),
    ("change", 7), ("relate", 1), ("relative", 6), ("fork", 2),
)  # fmt: skip


class _Author:
    """Writes lines; remembers roughly which slots are in use, so that most commands find something."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.value = 1000 * (seed % 1000) + 17
        self.used: list[int] = []
        self.thp: list[int] = []
        self.own_uffd = -1
        self.relatives: list[int] = []

    def begin(self) -> list[str]:
        """The first lines of a program: nothing is mapped yet."""
        dice = self.dice
        self.used, self.thp, self.own_uffd = [], [], -1
        lines = [f"file {n} {kind} 0 {dice.choice((7, 33, 80))}" for n, kind in enumerate(("memfd", "tmpfs"))]
        for slot in range(dice.randint(1, NR_SLOTS)):
            lines.append(self._map(slot))
            lines.append(f"write {slot} {_pick(dice, _WRITES)} 0 {dice.choice((4, 64))} {self.value}")
        return lines

    def line(self) -> str:
        self.value += 101
        verb = _pick(self.dice, _VERBS)
        if verb == "relative":
            if not self.relatives:
                return self._simple("relate")
            what = self.dice.choice(("write", "write", "advise", "change"))
            return f"@{self.dice.choice(self.relatives)} {self._simple(what)}"
        return self._simple(verb)

    def _map(self, slot: int) -> str:
        kind = _pick(self.dice, _KINDS)
        (self.thp if kind == "thp" else self.used).append(slot)
        pages = self.dice.choice((1, 2, 4, 9, 17, 40, 60))
        return f"map {slot} {kind} {self.dice.randrange(2)} {pages}"

    def _slot(self) -> int:
        return self.dice.choice(self.used + self.thp or [0])

    def _simple(self, verb: str) -> str:
        dice, value = self.dice, self.value
        new = dice.randrange(NR_SLOTS)
        first = dice.randrange(64)
        pages = dice.choice((1, 1, 2, 3, 5, 8, 16, 64))
        match verb:
            case "map":
                return self._map(new)
            case "over":
                under = self._slot()
                self.used.append(new)
                return f"over {new} {_pick(dice, _KINDS)} {first} {pages} 0 {under}"
            case "next":
                left = self._slot()
                self.used.append(new)
                return f"next {new} {_pick(dice, _KINDS)} 0 {pages} 0 {left}"
            case "write":
                return f"write {self._slot()} {_pick(dice, _WRITES)} {first} {pages} {value}"
            case "unmap":
                return f"unmap {self._slot()} {dice.choice(('all', 'part', 'part'))} {first} {pages}"
            case "protect":
                return f"protect {self._slot()} {dice.choice(('none', 'r', 'rw', 'rw'))} {first} {pages}"
            case "remap":
                how = dice.choice(("move", "move", "resize", "inplace", "dontunmap"))
                return f"remap {self._slot()} {how} 0 {dice.choice((1, 3, 10, 30, 70))}"
            case "advise":
                what = _pick(dice, _ADVICE)
                if what in ("collapse", "hugepage") and self.thp:
                    return f"advise {dice.choice(self.thp)} {what} 0 512"
                return f"advise {self._slot()} {what} {first} {pages}"
            case "lock":
                return f"lock {self._slot()} {dice.choice(('on', 'off'))} {first} {pages}"
            case "kernel":
                return f"kernel {self._slot()} {dice.choice(('pipe', 'direct', 'vm'))} {first} 1 {value}"
            case "ring":
                how = dice.choice(("open", "read", "read", "close"))
                return f"ring {self._slot()} {how} {first} 1 {value}"
            case "uffd":
                how = dice.choice(("on", "copy", "copy", "off"))
                if how == "on" or self.own_uffd < 0:
                    self.own_uffd = self._slot()
                    return f"uffd {self.own_uffd} on 0 1 {value}"
                return f"uffd {self.own_uffd} {how} {first} 1 {value}"
            case "fork":
                return f"fork {self._slot()} _ {first} {pages} {value}"
            case "brk":
                return f"brk 0 by {dice.choice((1, 3, 20, 60, -2, -15))} 0 {value}"
            case "stack":
                return f"stack 0 by {dice.randrange(60)} 0 {value}"
            case "file":
                kind = dice.choice(("memfd", "tmpfs"))
                return f"file {dice.randrange(NR_FILES)} {kind} 0 {dice.choice((1, 7, 33, 80))}"
            case "change":
                how = dice.choice(("write", "write", "punch", "grow"))
                return f"change {dice.randrange(NR_FILES)} {how} {first} {pages} {value}"
            case _:
                k = dice.randrange(3)
                self.relatives.append(k + 1)
                return f"relate {k}"


def generate(seed: int, *, nr_freezes: int = 6, ops_per_freeze: int = 30) -> list[str]:
    """The lines of one seed."""
    author = _Author(seed)
    dice = author.dice
    lines = author.begin()
    for _ in range(nr_freezes):
        lines.extend(author.line() for _ in range(dice.randint(1, 2 * ops_per_freeze)))
        roll = dice.random()
        if roll < 0.10:
            lines.append("failfreeze")
            lines.extend(author.line() for _ in range(dice.randint(0, 5)))
        elif roll < 0.16:
            lines.append(f"stormfreeze {NR_SLOTS + 1} {dice.randint(8, 200)}")
        elif roll < 0.22:
            lines.append("fullfreeze")
        elif roll < 0.28:
            lines.append(f"directfreeze {NR_SLOTS + 2} {dice.randint(8, 60)}")
        elif roll < 0.31:
            lines.append("exec")
            lines += author.begin()
        lines.append("freeze")
    return lines


def with_restores(seed: int) -> list[str]:
    """As `generate`, with restores in between.

    Files that live on beside the image (on disk or a tmpfs, by name) are left out: they are not what they were.
    """
    dice = random.Random(seed)
    lines: list[str] = []
    nr_freezes = 0
    for line in generate(seed, nr_freezes=5, ops_per_freeze=20):
        if line.split()[0] in ("ring", "uffd"):
            continue
        lines.append(line.replace("tmpfs", "memfd").replace("shared-file", "private-file"))
        if line == "freeze":
            nr_freezes += 1
            if dice.random() < 0.5:
                lines.append(f"restore {dice.randrange(min(3, nr_freezes))}")
    return [*lines, f"restore {dice.randrange(3)}"]


def _pick(dice: random.Random, table: tuple[tuple[str, int], ...]) -> str:
    return dice.choices([name for name, _ in table], [weight for _, weight in table])[0]


def save(path: Path, lines: list[str], about: str = "") -> None:
    path.write_text("".join(f"# {line}\n" for line in about.splitlines()) + "\n".join(lines) + "\n")


def load(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
