# SPDX-License-Identifier: Apache-2.0
"""Where slots may lie: only in bytes that belong to nobody, and never on top of a way home still in use."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from checkpointd.errors import NotPermitted, Unsupported
from checkpointd.linux.process_vm import MemFile
from checkpointd.memory import PAGE_SIZE
from checkpointd.procfs import maps
from checkpointd.target import freeze as freeze_module
from checkpointd.target import slot
from checkpointd.target.freeze import freeze
from checkpointd.target.registers import UserRegs, home_context
from tests.soak import lab

pytestmark = pytest.mark.needs("ptrace", "gcc")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return lab.build(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def target(programs, tmp_path):
    made = lab.Target(programs, "dynamic", "nanosleep", tmp_path, tolerant=False)
    yield made
    made.kill()


def _all_places(pid: int, threads: list[UserRegs]) -> list[slot.SlotPlace]:
    with MemFile(pid) as mem:
        return slot.find_places(mem, maps.read_maps(pid), threads, slot.exe_identity(pid), 1000)


@pytest.mark.parametrize("program", ["dynamic", "static", "nolibc", "go"])
def test_places_lie_behind_everything_the_file_describes(programs, tmp_path, program):
    if program not in programs:
        pytest.skip(f"no {program} compiler here")
    mode = "nanosleep" if program in ("dynamic", "static") else ""
    target = lab.Target(programs, program, mode, tmp_path)
    try:
        with freeze(target.pid) as frozen:
            places = _all_places(target.pid, [frozen.leader.regs])
            vmas = maps.read_maps(target.pid)
            assert places
            for place in places:
                vma = next(vma for vma in vmas if vma.start <= place.address < vma.end)
                assert vma.prot == 5
                assert not vma.shared
                assert vma.end - PAGE_SIZE <= place.address <= vma.end - slot.SLOT_SIZE
                assert frozen.mem.read(place.address, slot.SLOT_SIZE) == bytes(slot.SLOT_SIZE)
                if vma.path.startswith("/"):
                    assert place.address - vma.start >= _text_size(vma.path, vma.offset)
            assert len({place.address // slot.SLOT_SIZE for place in places}) == len(places)
    finally:
        target.kill()


def _text_size(path: str, offset: int) -> int:
    """File size of the executable segment at `offset`, by readelf."""
    listing = subprocess.run(["readelf", "-lW", path], check=True, capture_output=True, text=True).stdout
    for line in listing.splitlines():
        parts = line.split()
        if parts[:1] == ["LOAD"] and int(parts[1], 16) & ~0xFFF == offset and "E" in "".join(parts[6:8]):
            return int(parts[4], 16)
    raise AssertionError(f"no executable segment at {offset:#x} of {path}")


def test_data_in_the_padding_is_left_alone(target):
    with freeze(target.pid) as frozen:
        before = _all_places(target.pid, [frozen.leader.regs])
        frozen.force_write(before[0].address + 100, b"\1")
        after = _all_places(target.pid, [frozen.leader.regs])
        assert [place.address for place in before[1:]] == [place.address for place in after]
        frozen.force_write(before[0].address + 100, b"\0")


def _dead_slot(frozen, place, regs):
    bytes_ = slot.slot_bytes(home_context(regs), 0, 0, (frozen.pid, frozen.pid), 23)
    frozen.force_write(place.address, bytes_)


def test_a_dead_agents_slot_is_taken_over_when_nobody_needs_it(target):
    with freeze(target.pid) as frozen:
        regs = frozen.leader.regs
        first = _all_places(target.pid, [regs])[0]
        _dead_slot(frozen, first, regs)
        again = _all_places(target.pid, [regs])
        assert again[0].address == first.address
        assert again[0].stale
        with frozen.inject() as remote:
            assert remote.call(39) == target.pid
        assert not _all_places(target.pid, [regs])[0].stale
    target.judge()


def test_a_slot_somebody_stands_in_is_not_touched(target):
    with freeze(target.pid) as frozen:
        regs = frozen.leader.regs
        first, second = _all_places(target.pid, [regs])[:2]
        _dead_slot(frozen, first, regs)
        inside = regs.copy()
        inside.rip = first.address + 0x30
        assert slot.LeftBehind(frozen.mem).holds(inside.rip)
        assert not slot.LeftBehind(frozen.mem).holds(first.address + slot.SLOT_SIZE)
        assert _all_places(target.pid, [regs, inside])[0].address == second.address
        frozen.force_write(first.address, bytes(slot.SLOT_SIZE))
    target.judge()


def test_a_slot_that_a_signal_handler_will_return_to_is_not_touched(target):
    with freeze(target.pid) as frozen:
        regs = frozen.leader.regs
        first, second = _all_places(target.pid, [regs])[:2]
        _dead_slot(frozen, first, regs)
        below = regs.copy()
        below.rsp = (regs.rsp & ~7) - 4096
        kept = frozen.mem.read(below.rsp + 256, 8)
        frozen.mem.write(below.rsp + 256, (first.address + 0x95).to_bytes(8, "little"))
        assert _all_places(target.pid, [below])[0].address == second.address
        frozen.mem.write(below.rsp + 256, kept)
        frozen.force_write(first.address, bytes(slot.SLOT_SIZE))
    target.judge()


def test_a_runner_page_is_recognised(target):
    with freeze(target.pid) as frozen, frozen.inject() as remote:
        assert slot.LeftBehind(frozen.mem).holds(remote._base + 0x40)


def test_no_room_is_said_so(target, monkeypatch):
    monkeypatch.setattr(freeze_module, "find_places", lambda *args: [])
    with freeze(target.pid) as frozen, pytest.raises(Unsupported, match="unused room"):
        frozen.inject().__enter__()
    target.judge()


def test_where_the_kernel_forbids_forced_writes_ptrace_pokes(target, monkeypatch):
    """proc_mem.force_override=never: code pages can be written by PTRACE_POKETEXT only."""
    original = MemFile.write

    def only_writable(self, address, data):
        vma = next(vma for vma in maps.read_maps(target.pid) if vma.start <= address < vma.end)
        if not vma.prot & 2:
            raise OSError(5, "forced write")
        original(self, address, data)

    monkeypatch.setattr(MemFile, "write", only_writable)
    with freeze(target.pid) as frozen, frozen.inject() as remote:
        assert remote.batch([remote_call(), remote_call()]) == [target.pid] * 2
    monkeypatch.undo()
    target.judge()
    assert not target.leftover_slots()


def remote_call():
    from checkpointd.target.remote import Call

    return Call(39)


def test_not_permitted_says_what_to_do(target):
    if os.geteuid():
        pytest.skip("needs root, to become somebody else")
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            freeze(target.pid)
        except NotPermitted as error:
            os.write(send, f"{error.message} | {error.hint}".encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as file:
        text = file.read()
    os.waitpid(child, 0)
    assert f"not permitted to trace process {target.pid}" in text
    assert "belongs to uid 0, you are 65534" in text
    target.judge()
