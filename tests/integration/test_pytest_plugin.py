# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin, in a pytest of its own, on real processes."""

import subprocess
import sys

import pytest

from checkpointd.pytest_plugin import bytes_of, microseconds_of
from tests.service_harness import House

PROGRAM = """
import sys, time
data, per_step = bytearray(32 << 20), int(sys.argv[1])
for at in range(0, len(data), 4096):
    data[at] = 1
n = 0
while True:
    n += 1
    for page in range(per_step):
        data[page * 4096 + 8] = n % 256
    time.sleep(0.01)
"""

HEAD = f"""
import subprocess, sys, time
import pytest
PROGRAM = {PROGRAM!r}
def start(nr_pages):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(nr_pages)])
def wait_for(meter, nr):
    give_up = time.monotonic() + 100
    while len(meter.changed) < nr and time.monotonic() < give_up:
        time.sleep(0.05)
"""


@pytest.fixture
def run(tmp_path):
    house = House(tmp_path)
    del house.environ["CHECKPOINTD_AGENT"]
    house.serve()

    def run(body):
        (tmp_path / "test_it.py").write_text(HEAD + body)
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                "-q",
                "--rootdir",
                str(tmp_path),
                "test_it.py",
            ],
            cwd=tmp_path,
            env=house.environ,
            capture_output=True,
            text=True,
            timeout=250,
        )

    yield run
    house.close()


@pytest.mark.needs("ptrace", "pagemap_scan")
def test_a_program_within_its_limit_passes_and_one_over_it_fails(run):
    done = run("""
def test_small(limit_dirty):
    program = start(100)
    meter = limit_dirty.watch(program, "4 MB", interval="200ms")
    wait_for(meter, 2)
    program.kill()

def test_large(limit_dirty):
    program = start(2000)
    time.sleep(1)
    meter = limit_dirty.watch(program, "4 MB", interval="200ms")
    wait_for(meter, 2)
    program.kill()
""")
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "FAILED test_it.py::test_large" in done.stdout
    assert "more than 4 MB per 200ms" in done.stdout
    assert " MB  anonymous" in done.stdout  # the mapping that did it


@pytest.mark.needs("ptrace", "pagemap_scan")
def test_the_marker_limits_the_test_s_own_process(run):
    done = run("""
@pytest.mark.limit_dirty("20 MB", interval="300ms")
def test_quiet():
    time.sleep(2)

@pytest.mark.limit_dirty("20 MB", interval="300ms")
def test_loud():
    data, end, n = bytearray(64 << 20), time.monotonic() + 4, 0
    while time.monotonic() < end:
        n += 1
        for at in range(0, len(data), 4096):
            data[at] = n % 256
""")
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "FAILED test_it.py::test_loud" in done.stdout


@pytest.mark.needs("ptrace", "pagemap_scan")
def test_what_cannot_be_measured_fails_in_its_own_words(run):
    done = run("""
@pytest.fixture
def program():  # outlives the meter
    started = start(1)
    yield started
    started.kill()

def test_short(program, limit_dirty):
    limit_dirty.watch(program, "4 MB", interval="1m")

def test_nobody(limit_dirty):
    limit_dirty.watch(999999999, "4 MB")

def test_words(limit_dirty):
    with pytest.raises(ValueError, match="no amount of memory"):
        limit_dirty.watch(1, "four MB")

def test_its_own_failure_comes_first(limit_dirty):
    program = start(2000)
    limit_dirty.watch(program, "1 B", interval="100ms")
    program.kill()
    assert "own failure" == ""
""")
    assert "3 failed, 1 passed" in done.stdout, done.stdout
    assert "the test ended before one interval of 1m" in done.stdout, done.stdout
    assert "999999999" in done.stdout
    assert "assert 'own failure' == ''" in done.stdout


def test_amounts_and_intervals():
    assert [bytes_of(text) for text in ("4 MB", "4MiB", "0.5 kB", "7 B")] == [4_000_000, 4 << 20, 500, 7]
    assert [microseconds_of(text) for text in ("500ms", "1 s", "2m")] == [500_000, 1_000_000, 120_000_000]
    for text in ("4", "MB", "4 mb", "-1 MB"):
        with pytest.raises(ValueError, match="no amount"):
            bytes_of(text)
    with pytest.raises(ValueError, match="no interval"):
        microseconds_of("1")
