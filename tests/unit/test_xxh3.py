# SPDX-License-Identifier: Apache-2.0
"""All hashers give the same bytes, the fast one is taken, and what cannot be trusted is not."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from checkpointd.image import blobs, xxh3

PAGE = 4096


def fast_hashers() -> list[xxh3.LibraryHasher]:
    """Of every library that has the function; one that is there and does not work is an error."""
    found = []
    for library in xxh3.libraries():
        try:
            found.append(xxh3.LibraryHasher(library))
        except xxh3.WrongDigestsError:
            raise
        except OSError as error:
            assert "has no" in str(error) or "cannot open" in str(error), error
    return found


@functools.cache
def noise(nr_bytes: int) -> np.ndarray:
    data = np.random.default_rng(nr_bytes).integers(0, 256, nr_bytes, dtype=np.uint8)
    data.flags.writeable = False
    return data


@pytest.mark.needs("c_xxh3")
@pytest.mark.parametrize("nr_pages", [0, 1, 2, 65])
@given(seed=st.integers(0, 2**64 - 1) | st.just(0))
def test_pages_are_hashed_as_the_package_does(nr_pages: int, seed: int) -> None:
    data = noise(nr_pages * PAGE)
    expected = b"".join(xxh3_128_digest(data[at : at + PAGE].data, seed) for at in range(0, len(data), PAGE))
    assert xxh3.PackageHasher().pages(data, seed) == expected
    hashers = fast_hashers()
    assert hashers
    for hasher in hashers:
        assert hasher.pages(data, seed) == expected


@pytest.mark.needs("c_xxh3")
def test_the_fast_one_is_taken_where_it_works() -> None:
    assert isinstance(xxh3.HASHER, xxh3.LibraryHasher)


@pytest.mark.needs("c_xxh3")
def test_only_bytes_in_one_piece_are_hashed() -> None:
    for data in (noise(2 * PAGE)[::2], noise(2 * PAGE).reshape(2, PAGE), noise(2 * PAGE).view(np.uint16)):
        with pytest.raises(ValueError, match="contiguous bytes"):
            fast_hashers()[0].pages(data, 7)


@pytest.mark.needs("c_xxh3")
def test_a_library_of_other_values_is_not_used_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    # as of a release in which XXH3 was another function
    monkeypatch.setattr(xxh3, "_FUNCTION", "XXH3_64bits_withSeed_dispatch")
    with pytest.warns(RuntimeWarning, match="other values than XXH3: not used"):
        assert isinstance(xxh3.best_hasher(), xxh3.PackageHasher)


@pytest.mark.needs("c_xxh3")
def test_package_and_library_that_agree_on_something_else_are_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(xxh3, "_KNOWN", "0" * 32)
    with pytest.raises(xxh3.WrongDigestsError):
        xxh3.LibraryHasher(next(xxh3.libraries()))


def test_without_a_library_the_package_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xxh3, "libraries", lambda: iter(["libxxhash-that-is-not-there.so"]))
    assert isinstance(xxh3.best_hasher(), xxh3.PackageHasher)


def test_without_the_function_the_package_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xxh3, "_FUNCTION", "a_function_that_is_not_there")
    assert isinstance(xxh3.best_hasher(), xxh3.PackageHasher)


@pytest.mark.needs("c_xxh3")
def test_without_executable_memory_the_package_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: bytes) -> None:
        raise PermissionError(13, "mprotect")

    assert isinstance(xxh3.best_hasher(), xxh3.LibraryHasher)
    monkeypatch.setattr(xxh3, "NativeFunction", refused)
    assert isinstance(xxh3.best_hasher(), xxh3.PackageHasher)


@pytest.mark.skipif(not shutil.which("as") or not shutil.which("objcopy"), reason="needs binutils")
@pytest.mark.needs("c_xxh3")
def test_machine_code_is_what_its_source_says(tmp_path: Path) -> None:
    source = Path(blobs.__file__).with_name("each_page.S")
    subprocess.run(["as", "-o", tmp_path / "o", source], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "o", tmp_path / "bin"], check=True)
    assert (tmp_path / "bin").read_bytes() == blobs.EACH_PAGE


NATIVE = """
import ctypes, sys, threading, time
from pathlib import Path
from checkpointd.native import NativeFunction
add = NativeFunction(bytes.fromhex("488d0437c3"))  # lea (%rdi,%rsi),%rax; ret
assert (add(40, 2), add(-1, 0)) == (42, -1)
assert "rwxp" not in Path("/proc/self/maps").read_text()
waits = NativeFunction(bytes.fromhex("803f0074fbc3"))  # 1: cmpb $0,(%rdi); je 1b; ret
flag = ctypes.c_char(0)
threading.Timer(0.1, setattr, (flag, "value", b"x")).start()
waits(ctypes.addressof(flag))  # for ever, if nobody else got the GIL
print("done")
"""


@pytest.mark.needs("c_xxh3")
def test_native_functions_get_their_arguments_and_hold_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", NATIVE], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("done\n", "")
