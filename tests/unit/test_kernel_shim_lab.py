# SPDX-License-Identifier: Apache-2.0
"""The lab without a guest: names, what decides the cache key, the form of the patch series, the command line."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import pytest
from vmtest import __main__ as command
from vmtest import kbuild, vm

PATCHES = kbuild.SHIM / "patches"
SERIES = [path for base in kbuild.BASES for path in sorted((PATCHES / base).glob("*.patch"))]


def test_every_name_comes_back_from_parsing() -> None:
    for name in kbuild.NAMES:
        assert kbuild.Kernel.parse(name).name == name


def test_unknown_kernel_is_refused_by_name() -> None:
    with pytest.raises(kbuild.BuildError, match=r"unknown kernel '6\.99-stock'"):
        kbuild.Kernel.parse("6.99-stock")


def test_stock_kernels_get_no_patches_and_precise_ones_the_series_without_its_letter() -> None:
    assert kbuild.Kernel.parse("6.12-stock").patches == []
    names = [path.name for path in kbuild.Kernel.parse("6.12-precise").patches]
    assert names
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))


@pytest.mark.parametrize("base", kbuild.BASES)
def test_first_patches_of_a_series_are_a_kernel_of_their_own(base: str) -> None:
    whole = kbuild.Kernel.parse(f"{base}-precise")
    keys = {kbuild.digest(whole, "1")}
    for count in range(1, len(whole.patches) + 1):
        kernel = kbuild.Kernel.parse(f"{base}-precise@{count}")
        assert kernel.name == f"{base}-precise@{count}"
        assert kernel.patches == whole.patches[:count]
        keys.add(kbuild.digest(kernel, "1"))
    assert len(keys) == 1 + len(whole.patches)


@pytest.mark.parametrize(
    "name", ["6.1-precise@0", "6.1-precise@", "6.1-precise@x", "6.1-stock@1", "6.1-precise@99"]
)
def test_part_of_a_series_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(kbuild.BuildError, match=name):
        kbuild.Kernel.parse(name)


def test_step_that_takes_too_long_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    child = tmp_path / "child"
    words = ["sh", "-c", f"sleep 1000 & echo $! >{child}.part; mv {child}.part {child}; wait"]
    with (tmp_path / "log").open("wb") as log:
        assert kbuild._run(["sh", "-c", "exit 3"], tmp_path, log, float("inf")) == 3
        with pytest.raises(kbuild.BuildTimeout):
            kbuild._run(words, tmp_path, log, time.monotonic() + 5)
    pid = int(child.read_text())
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
        except FileNotFoundError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the step's child still runs")


def test_build_does_not_wait_for_another_builder_beyond_its_time(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with (
        kbuild._locked(lock, float("inf")),
        pytest.raises(kbuild.BuildTimeout, match="somebody else"),
        kbuild._locked(lock, time.monotonic()),
    ):
        pytest.fail("two builders at once")


def test_cache_key_depends_on_code_and_configuration_and_not_on_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = tmp_path / "shim"
    (shim / "patches" / "6.12").mkdir(parents=True)
    (shim / "configs").mkdir()
    (shim / "configs" / "guest.config").write_text("CONFIG_A=y\n")
    patch = shim / "patches" / "6.12" / "0001-x.patch"
    body = "\ndiff --git a/mm/x.c b/mm/x.c\n+one\n"
    patch.write_text("Subject: first" + body)
    monkeypatch.setattr(kbuild, "SHIM", shim)
    kernel = kbuild.Kernel.parse("6.12-precise")
    first = kbuild.digest(kernel, "1")
    patch.write_text(
        "Subject: better words" + body + "diff --git a/Documentation/x b/Documentation/x\n+words\n"
    )
    assert kbuild.digest(kernel, "1") == first
    patch.write_text("Subject: first" + body.replace("one", "two"))
    assert kbuild.digest(kernel, "1") != first
    patch.write_text("Subject: first" + body)
    assert kbuild.digest(kernel, "2") != first
    config = shim / "configs" / "guest.config"
    config.write_text("# why\nCONFIG_A=y\n")
    assert kbuild.digest(kernel, "1") == first
    for other in ("CONFIG_A=n\n", "# CONFIG_A is not set\n"):
        config.write_text(other)
        assert kbuild.digest(kernel, "1") != first


def test_options_dropped_by_kconfig_are_named(tmp_path: Path) -> None:
    fragment = tmp_path / "f.config"
    fragment.write_text("# words\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n")
    assert kbuild._unmet_options([fragment], "CONFIG_A=y\n# CONFIG_B is not set\n") == ["CONFIG_B=y"]


@pytest.mark.parametrize("path", SERIES, ids=lambda path: f"{path.parent.name}/{path.name[:4]}")
def test_patches_are_signed_numbered_and_free_of_this_machine(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^Subject: \[PATCH \d+/\d+\] \S", text, re.MULTILINE)
    assert re.search(r"^From: checkpointd maintainers <", text, re.MULTILINE)
    assert not re.search(r"(?<![\w.])/(?:home|root|srv|tmp|work)/", text)
    if not path.name.startswith("0000"):
        assert "\nSigned-off-by: checkpointd maintainers <maintainers@users.noreply.github.com>\n" in text


def test_no_patch_touches_the_vma_structure() -> None:
    assert not [path for path in SERIES if "mm_types.h" in path.read_text()]


def test_a_command_without_separator_or_a_wrong_name_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["run", "6.12-stock"])
    assert command.main(["run", "nope", "--", "true"]) == command.EXIT_LAB
    assert "unknown kernel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "expected"),
    [(b"exit 0\n", 0), (b"exit 143\n", 143), (b"exit 1", None), (b"", None), (b"noise\n", None)],
)
def test_only_a_whole_status_counts(told: bytes, expected: int | None) -> None:
    ours: dict[str, socket.socket] = {}
    for port in ("stdout", "stderr", "status"):
        ours[port], theirs = socket.socketpair()
        theirs.sendall({"stdout": b"out", "stderr": b"err", "status": told}[port])
        theirs.close()
    out, err = BytesIO(), BytesIO()
    assert vm._pump(ours, {"stdout": out, "stderr": err}, time.monotonic() + 5) == expected
    assert (out.getvalue(), err.getvalue()) == (b"out", b"err")
    for end in ours.values():
        end.close()


def test_a_builder_that_is_told_to_end_takes_its_compilers_with_it(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from vmtest import __main__, kbuild
__main__.end_in_order()
where = Path(sys.argv[1])
with open(where / "log", "wb") as log:
    kbuild._run(["sh", "-c", "echo $$ > pid; mv pid it; sleep 300"], where, log, float("inf"))
"""
    environment = {**os.environ, "PYTHONPATH": str(kbuild.SHIM)}
    builder = subprocess.Popen([sys.executable, "-c", program, tmp_path], env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / "it").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    compiler = int((tmp_path / "it").read_text())
    builder.terminate()
    assert builder.wait(30) == 143
    while (
        os.path.exists(f"/proc/{compiler}")
        and "Z" not in Path(f"/proc/{compiler}/stat").read_text().split()[2]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
