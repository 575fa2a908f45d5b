# SPDX-License-Identifier: Apache-2.0
"""Both hashers give the same bytes, and what cannot be trusted is not used."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from checkpointd.image import blobs, xxh3
from checkpointd.native import NativeFunction

PAGE = 4096


def library() -> xxh3.LibraryHasher:
    try:
        return xxh3.LibraryHasher()
    except OSError as error:
        pytest.skip(f"no library to compare with: {error}")


def noise(nr_bytes: int) -> np.ndarray:
    return np.random.default_rng(nr_bytes).integers(0, 256, nr_bytes, dtype=np.uint8)


@pytest.mark.parametrize("nr_pages", [0, 1, 2, 257])
@given(seed=st.integers(0, 2**64 - 1))
def test_pages_are_hashed_as_the_package_does(nr_pages: int, seed: int) -> None:
    data = noise(nr_pages * PAGE)
    expected = b"".join(xxh3_128_digest(data[at : at + PAGE].data, seed) for at in range(0, len(data), PAGE))
    assert library().pages(data, seed) == expected
    assert xxh3.PackageHasher().pages(data, seed) == expected


def test_many_threads_hash_at_the_same_time() -> None:
    hasher, data = library(), noise(64 * PAGE)
    expected = hasher.pages(data, 7)
    wrong = []

    def work() -> None:
        wrong.extend(1 for _ in range(200) if hasher.pages(data, 7) != expected)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_library_of_other_values_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    library()
    plain = xxh3._function

    def unseeded(found: ctypes.CDLL, name: str) -> object:
        return plain(found, name.removesuffix("_withSeed"))

    monkeypatch.setattr(xxh3, "_function", unseeded)  # as of a release in which XXH3 was another function
    with pytest.raises(OSError, match="other values"):
        xxh3.LibraryHasher()
    assert isinstance(xxh3.best_hasher(), xxh3.PackageHasher)


def test_without_a_library_the_package_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xxh3, "_LIBRARY", "libxxhash-that-is-not-there.so")
    assert isinstance(xxh3.best_hasher(), xxh3.PackageHasher)


def test_without_executable_memory_the_package_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "execmem")

    monkeypatch.setattr("checkpointd.native.mmap.mmap", refused)
    assert isinstance(xxh3.best_hasher(), xxh3.PackageHasher)


@pytest.mark.skipif(not shutil.which("as") or not shutil.which("objcopy"), reason="needs binutils")
def test_machine_code_is_what_its_source_says(tmp_path: Path) -> None:
    source = Path(blobs.__file__).with_name("each_page.S")
    subprocess.run(["as", "-o", tmp_path / "o", source], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "o", tmp_path / "bin"], check=True)
    assert (tmp_path / "bin").read_bytes() == blobs.EACH_PAGE


def test_native_functions_get_all_their_arguments() -> None:
    # lea (%rdi,%rsi),%rax; ret
    assert NativeFunction(bytes.fromhex("488d0437c3"))(40, 2) == 42
    assert NativeFunction(bytes.fromhex("488d0437c3"))(-1, 0) == -1
