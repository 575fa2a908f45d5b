# SPDX-License-Identifier: Apache-2.0
"""What soft-dirty tracking really does, on stock and patched kernels, with precise tracking off and on.

Runs inside the guests of ``kernel-shim/vmtest``, which set CHECKPOINTD_VM_KERNEL to the kernel's name. Every case
is one run of ``kernel-shim/tests/softdirty_cases.c``. The wrong answers of stock kernels are asserted too: the
day one of them is mended, the rules that are built on it want another look.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from kernel_shim import probe, switch

KERNEL = os.environ.get("CHECKPOINTD_VM_KERNEL", "")
SOURCE = Path(__file__).parents[2] / "kernel-shim" / "tests" / "softdirty_cases.c"
PATCHED = "-precise" in KERNEL
Case = Callable[[str], dict[str, str]]

in_guest = pytest.mark.skipif(not KERNEL, reason="needs a kernel of the lab: run it with python -m vmtest")
patched_only = pytest.mark.skipif(not PATCHED, reason=f"{KERNEL or 'this kernel'} has no precise tracking")
both = pytest.mark.parametrize("mode", ["default", pytest.param("precise", marks=patched_only)])


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    path = tmp_path_factory.mktemp("cases") / "softdirty_cases"
    subprocess.run(["gcc", "-O1", "-Wall", "-o", str(path), str(SOURCE)], check=True)
    return path


@pytest.fixture
def case(program: Path, request: pytest.FixtureRequest) -> Case:
    mode = (
        request.node.callspec.params.get("mode", "default")
        if hasattr(request.node, "callspec")
        else "default"
    )

    def run(name: str) -> dict[str, str]:
        done = subprocess.run(
            [str(program), name, mode], capture_output=True, text=True, timeout=240, check=False
        )
        if done.returncode == 77:
            pytest.fail(f"{KERNEL} cannot do {name}: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        return dict(line.split(" ", 1) for line in done.stdout.splitlines())

    return run


@in_guest
@both
def test_new_neighbour_makes_clean_pages_read_dirty_unless_precise(case: Case, mode: str) -> None:
    seen = case("neighbour")
    assert seen["cleared"] == "." * 8
    assert seen["written"] == "...D...."
    if mode == "precise":
        assert seen["behind"] == "...D....DDDDDDDD"
        assert seen["before"] == "DDDD" + "...D....DDDDDDDD"
        assert seen["vmas"] == "3"
    else:
        assert seen["behind"] == "D" * 16
        assert seen["before"] == "D" * 20
        assert seen["vmas"] == "1"
    assert seen["again"] == "." * 20
    assert seen["vmas_again"] == "1"


@in_guest
@both
def test_growing_heap_makes_all_of_it_read_dirty_unless_precise(case: Case, mode: str) -> None:
    seen = case("heap")
    assert seen["grown"] == ("........DD" if mode == "precise" else "D" * 10)
    assert seen["vmas"] == ("2" if mode == "precise" else "1")
    assert seen["vmas_again"] == "1"
    assert seen["shrunk"] == "1"


@in_guest
@both
def test_mprotect_merge_loses_writes_unless_precise(case: Case, mode: str) -> None:
    seen = case("lost_write")
    assert seen["rewritten"] == "DDDD"
    assert seen["merged"] == ("DDDD" if mode == "precise" else "....")
    assert seen["untouched"] == "...."


@in_guest
@both
def test_ksm_loses_writes(case: Case, mode: str) -> None:
    seen = case("ksm")
    assert seen["sharing"] == "1"
    assert int(seen["lost"]) >= 28


@in_guest
@both
def test_hugetlb_reads_clean_after_a_clear(case: Case, mode: str) -> None:
    assert case("hugetlb") == {"new": "D", "rewritten": "."}


@in_guest
@both
def test_huge_page_reads_dirty_as_a_whole(case: Case, mode: str) -> None:
    assert case("thp") == {"dirty": "512"}


@in_guest
@both
def test_number_of_vmas_comes_back_with_the_next_clear(case: Case, mode: str) -> None:
    filled = "512" if mode == "precise" else "256"
    assert case("growth") == {"clean": "256", "filled": filled, "again": "256"}


@in_guest
@both
def test_process_that_nobody_clears_has_as_many_vmas_as_ever(case: Case, mode: str) -> None:
    assert case("untracked") == {"vmas": "1"}


@in_guest
@patched_only
@both
def test_child_inherits_and_new_program_keeps(case: Case, mode: str) -> None:
    expected = "1" if mode == "precise" else "0"
    assert case("inherit") == {"fork": expected, "exec": expected}


@in_guest
@both
def test_mapping_goes_on_near_the_limit_of_mappings(case: Case, mode: str) -> None:
    assert case("max_map_count") == {"mapped": "220", "below_limit": "1"}


@in_guest
@patched_only
def test_sysctl_is_the_default_of_programs_started_later(case: Case) -> None:
    assert case("default_for_all") == {"running": "0", "started": "1", "chosen": "0"}


@in_guest
@both
def test_mremap_across_a_seam_is_the_price(case: Case, mode: str) -> None:
    expected = {"moved": "0", "errno_is_efault": "1"} if mode == "precise" else {"moved": "1"}
    assert case("seam") == expected


@in_guest
def test_merge_barrier_is_exact_and_loses_nothing(case: Case) -> None:
    seen = case("barrier")
    assert seen["behind"] == ".D..DDDD"
    assert seen["merged"] == "DDDD"
    assert seen["untouched"] == "...."
    assert seen["closed"] == "DDDD"


@in_guest
@both
def test_discarded_page_reads_clean_though_it_changed(case: Case, mode: str) -> None:
    assert case("discard") == {"discarded": "....", "zero": "1"}


@in_guest
@both
def test_moved_pages_read_dirty(case: Case, mode: str) -> None:
    assert case("moved") == {"moved": "DDDD"}


@in_guest
@both
def test_moved_page_tables_read_clean_unless_precise(case: Case, mode: str) -> None:
    assert case("moved_table") == {"lost": "0" if mode == "precise" else "1024"}


@in_guest
@both
def test_ksm_loses_writes_and_leaves_no_trace_where_it_unshares(case: Case, mode: str) -> None:
    """6.12 takes merged pages apart without marking them; 6.1 does it by a write fault, which marks."""
    seen = case("ksm_unmerged")
    assert seen["sharing"] == "1"
    lost = int(seen["lost"])
    assert lost >= 28 if KERNEL.startswith("6.12") else lost <= 1, seen


@in_guest
@both
def test_copy_on_write_is_reported_where_it_happens(case: Case, mode: str) -> None:
    assert case("forked") == {"child": "2", "parent": "..D."}


@in_guest
@patched_only
@both
def test_switch_refuses_unknown_arguments(case: Case, mode: str) -> None:
    assert case("arguments") == {"two": "1", "third": "1", "query": "1"}


@in_guest
def test_probe_finds_what_this_kernel_can_do() -> None:
    found = probe.probe_now()
    assert found.soft_dirty.works, found
    assert found.switch.works is PATCHED, found
    assert found.barrier.works, found
    assert not found.keeps_writes.works, found
    assert found.marks_moves.works is PATCHED, found
    assert found.precision is (probe.Precision.PATCHED if PATCHED else probe.Precision.EMULATED)


@in_guest
def test_probe_is_not_deceived_by_precise_tracking_it_inherited(tmp_path: Path) -> None:
    if not PATCHED:
        pytest.skip("needs the patch")
    code = (
        "from kernel_shim import probe, switch; switch.turn_on(); print(probe.probe_now().keeps_writes.works)"
    )
    done = subprocess.run(["python", "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.strip() == "False"


@in_guest
def test_switch_for_oneself_and_for_a_program_to_be_started() -> None:
    code = "from kernel_shim import switch; print(switch.query())"
    launch = (
        f"from kernel_shim import switch; import sys; switch.exec_precise([sys.executable, '-c', {code!r}])"
    )
    run = subprocess.run(["python", "-c", launch], capture_output=True, text=True, timeout=200, check=False)
    if PATCHED:
        assert run.stdout.strip() == "True"
        assert switch.query() is False
        assert switch.read_default() is False
    else:
        assert "Invalid argument" in run.stderr
        assert switch.query() is None
        assert switch.read_default() is None


def test_clear_refs_succeeds_without_soft_dirty_tracking() -> None:
    """Why only a functional probe is safe; runs on any kernel that lacks the feature."""
    found = probe.probe_now()
    if found.soft_dirty.works:
        pytest.skip("this kernel has soft-dirty tracking")
    assert Path("/proc/self/clear_refs").write_text("4") == 1
    assert found.precision is probe.Precision.NEITHER
    assert "no soft-dirty tracking" in found.why
