# SPDX-License-Identifier: Apache-2.0
"""Build the kernels of the lab, each one once.

A kernel is named ``BASE-FLAVOUR``: base ``6.12`` or ``6.1`` (Debian's ``linux-source-BASE`` package), flavour
``stock`` or ``precise`` (our patch series on top), with ``-debug`` behind it for the self-checking build, or
``-kasan`` for one that looks for uses after free as well.
``BASE-precise@N`` has only the first N patches of the series: every one of them has to build and boot.

The result is cached under ``$XDG_CACHE_HOME/checkpointd/kernels/<hash>/``. The hash covers everything that
goes in: the version of the source package, what is compiled of every patch (neither messages nor the cover letter),
every option of the configuration fragments and the compiler. Two builders of the same kernel wait for each
other; a build that fails leaves its log and no image.

Raises:
    BuildError: the sources cannot be had, a patch does not apply, or the compiler failed. The message
        names the step and, where there is one, the log.
    BuildTimeout: a BuildError that says the time allowed was up; nothing of the build is left running.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

HERE = Path(__file__).resolve().parent
SHIM = HERE.parent
BASES = ("6.12", "6.1")
CHECKING = ("debug", "kasan")
FLAVOURS = ("stock", "precise", *(f"{kind}-{checks}" for kind in ("stock", "precise") for checks in CHECKING))
NAMES = tuple(f"{base}-{flavour}" for base in BASES for flavour in FLAVOURS)
BUILD_PACKAGES = (
    "flex",
    "bison",
    "bc",
    "gcc",
    "make",
    "libelf-dev",
    "libssl-dev",
    "cpio",
    "rsync",
    "xz-utils",
    "patch",
)


_OPTION = re.compile(rb"^(?:# )?CONFIG_\w+.*$", re.MULTILINE)


class BuildError(Exception):
    """A kernel could not be built; the message names the step that failed."""


class BuildTimeout(BuildError):
    """The time allowed was up before the kernel was there."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of the lab, by name.

    Attributes:
        checks: how the kernel checks itself: "", "debug", or "kasan" (that and use after free).
        nr_patches: as many patches of the series are applied; None for all of them.
    """

    base: str
    patched: bool
    checks: str = ""
    nr_patches: int | None = None

    @classmethod
    def parse(cls, name: str) -> Kernel:
        """Turn a name such as ``6.12-precise`` into a kernel.

        Raises:
            BuildError: the name is none of ours, or its series has fewer patches than it asks for.
        """
        whole, at, count = name.partition("@")
        known = whole in NAMES and (
            not at or (whole.endswith("-precise") and re.fullmatch("[1-9][0-9]*", count))
        )
        if not known:
            raise BuildError(
                f"unknown kernel {name!r}; the lab knows {', '.join(NAMES)}, and BASE-precise@N for the first N patches"
            )
        base, kind, *checks = whole.split("-")
        kernel = cls(base, kind == "precise", *checks)
        if not at:
            return kernel
        if int(count) > len(kernel.patches):
            raise BuildError(f"{name}: the series for {base} has {len(kernel.patches)} patches")
        return dataclasses.replace(kernel, nr_patches=int(count))

    @property
    def name(self) -> str:
        part = "" if self.nr_patches is None else f"@{self.nr_patches}"
        return f"{self.base}-{'precise' if self.patched else 'stock'}{self.checks and '-'}{self.checks}{part}"

    @property
    def patches(self) -> list[Path]:
        """The series to apply, in order; the cover letter is not one of them."""
        if not self.patched:
            return []
        found = sorted((SHIM / "patches" / self.base).glob("[0-9][0-9][0-9][0-9]-*.patch"))
        return [path for path in found if not path.name.startswith("0000-")][: self.nr_patches]

    @property
    def fragments(self) -> list[Path]:
        """Configuration fragments merged over tinyconfig, in order."""
        names = ["guest.config"]
        if self.checks:
            names.append("debug.config")
        if self.checks == "kasan":
            names.append("kasan.config")
        return [SHIM / "configs" / name for name in names]


def cache_root() -> Path:
    """Where kernels are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``checkpointd/kernels``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "checkpointd" / "kernels"


def _apt_install(packages: list[str]) -> None:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise BuildError(f"please install these Debian packages: {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages]
    if subprocess.run(install, env=environment, capture_output=True, check=False).returncode:
        subprocess.run(["apt-get", "update", "-qq"], env=environment, capture_output=True, check=False)
        done = subprocess.run(install, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"apt-get could not install {' '.join(packages)}: {done.stderr.strip()[-500:]}")


def _installed_version(package: str) -> str | None:
    asked = subprocess.run(
        ["dpkg-query", "-W", "-f=${db:Status-Status} ${Version}", package],
        capture_output=True,
        text=True,
        check=False,
    )
    status, _, version = asked.stdout.partition(" ")
    return version if asked.returncode == 0 and status == "installed" else None


def source_tarball(base: str) -> tuple[Path, str]:
    """The source of Debian's kernel and its package version, installing the package when allowed.

    Raises:
        BuildError: the package is not there and cannot be installed.
    """
    package = f"linux-source-{base}"
    tarball = Path(f"/usr/src/{package}.tar.xz")
    if _installed_version(package) is None or not tarball.exists():
        _apt_install([package])
    version = _installed_version(package)
    if version is None or not tarball.exists():
        raise BuildError(f"{package} is installed but {tarball} is not there")
    return tarball, version


def _require_tools() -> None:
    missing = [package for package in BUILD_PACKAGES if _installed_version(package) is None]
    if missing:
        _apt_install(missing)


def digest(kernel: Kernel, version: str) -> str:
    """The cache key: everything that decides what the image will be."""
    compiler = subprocess.run(
        ["gcc", "-dumpfullversion", "-dumpmachine"], capture_output=True, text=True, check=False
    )
    state = hashlib.sha256()
    for part in (kernel.base, version, compiler.stdout):
        state.update(part.encode() + b"\0")
    if kernel.nr_patches is not None:
        state.update(kernel.name.encode() + b"\0")  # uname(2) tells it, so it is part of the image
    for path in kernel.patches:
        state.update(_compiled_part(path.read_bytes()) + b"\0")
    for path in kernel.fragments:
        state.update(b"\n".join(_OPTION.findall(path.read_bytes())) + b"\0")
    return state.hexdigest()[:20]


def _compiled_part(patch: bytes) -> bytes:
    """What of a patch decides the image: not its message, nor changes of documents and of userland tools."""
    files = patch.split(b"\ndiff --git ")[1:]
    return b"".join(
        part.strip() for part in files if not part.startswith((b"a/Documentation/", b"a/tools/testing/"))
    )


def cached_image(name: str) -> Path | None:
    """The image of ``name`` if it is built already; asks nobody, installs nothing."""
    kernel = Kernel.parse(name)
    version = _installed_version(f"linux-source-{kernel.base}")
    if version is None or (kernel.patched and not kernel.patches):
        return None
    image = cache_root() / digest(kernel, version) / "bzImage"
    return image if image.exists() else None


@contextlib.contextmanager
def _locked(path: Path, deadline: float) -> Iterator[None]:
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildTimeout(f"somebody else held {path} all the time") from None
                time.sleep(0.5)
        yield


def _run(command: list[str], directory: Path, output: BinaryIO, deadline: float) -> int:
    """Run one step at low priority, its output to the log; return its exit status.

    Raises:
        BuildTimeout: the step was not done at `deadline`; all its processes were ended.
    """
    # a group of its own: make's compilers would go on without it
    with subprocess.Popen(
        ["nice", "-n", "10", *command], cwd=directory, stdin=subprocess.DEVNULL, stdout=output,
        stderr=subprocess.STDOUT, process_group=0,
    ) as process:  # fmt: skip
        try:
            return process.wait(None if deadline == float("inf") else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise BuildTimeout("the time was up") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _unmet_options(fragments: list[Path], config: str) -> list[str]:
    """Options we asked for which Kconfig dropped (a dependency is missing or the name is unknown)."""
    have = set(config.splitlines())
    wanted: dict[str, str] = {}
    for fragment in fragments:
        for line in fragment.read_text().splitlines():
            if line.startswith("CONFIG_"):
                wanted[line.split("=")[0]] = line
    return sorted(line for line in wanted.values() if line not in have)


def build(name: str, *, jobs: int = 2, timeout_seconds: float = float("inf")) -> Path:
    """Return the path of the kernel image ``bzImage`` of ``name``, building it if nobody has yet.

    Args:
        name: one of ``NAMES``, or ``BASE-precise@N``.
        jobs: parallel compiler processes; the build runs at low priority.
        timeout_seconds: for all of it, waiting for another builder too; installing packages comes on top.

    Raises:
        BuildError: see the module.
    """
    kernel = Kernel.parse(name)
    deadline = time.monotonic() + timeout_seconds
    _require_tools()
    tarball, version = source_tarball(kernel.base)
    key = digest(kernel, version)
    home = cache_root() / key
    image = home / "bzImage"
    if image.exists():
        return image
    if kernel.patched and not kernel.patches:
        raise BuildError(f"{kernel.name}: no patches in {SHIM / 'patches' / kernel.base}")
    cache_root().mkdir(parents=True, exist_ok=True)
    with _locked(cache_root() / f"{key}.lock", deadline):
        if not image.exists():
            _build_into(home, kernel, tarball, version, jobs, deadline)
    return image


def _build_into(home: Path, kernel: Kernel, tarball: Path, version: str, jobs: int, deadline: float) -> None:
    began = time.monotonic()
    log = cache_root() / f"{home.name}.log"
    print(
        f"vmtest: building {kernel.name} from linux-source {version}, log {log}", file=sys.stderr, flush=True
    )
    work = Path(tempfile.mkdtemp(prefix=f"{home.name}.build.", dir=cache_root()))
    try:
        with log.open("wb") as output:
            tree = work / "linux"
            tree.mkdir()

            def step(what: str, command: list[str]) -> None:
                output.write(f"+ {' '.join(command)}\n".encode())
                output.flush()
                try:
                    status = _run(command, tree, output, deadline)
                except BuildTimeout:
                    raise BuildTimeout(f"{kernel.name}: the time was up while {what}, see {log}") from None
                if status:
                    raise BuildError(f"{kernel.name}: {what} failed, see {log}")

            step("unpacking", ["tar", "-xf", str(tarball), "--strip-components=1"])
            for patch in kernel.patches:
                step(
                    f"patch {patch.name}",
                    ["patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", "-i", str(patch)],
                )
            # the fixed build identity keeps the image a function of its inputs
            flavour = kernel.name.split("-", 1)[1]
            make = ["make", f"-j{jobs}", "KBUILD_BUILD_USER=lab", "KBUILD_BUILD_HOST=checkpointd",
                    "KBUILD_BUILD_TIMESTAMP=2026-01-01", f"LOCALVERSION=-{flavour}"]  # fmt: skip
            step("tinyconfig", [*make, "tinyconfig"])
            merge = ["scripts/kconfig/merge_config.sh", "-m", ".config", *map(str, kernel.fragments)]
            step("merging the configuration", merge)
            step("olddefconfig", [*make, "olddefconfig"])
            unmet = _unmet_options(kernel.fragments, (tree / ".config").read_text())
            output.write(("# dropped by Kconfig: " + " ".join(unmet) + "\n").encode())
            step("compiling", [*make, "bzImage"])
        stage = work / "done"
        stage.mkdir()
        shutil.copy2(tree / "arch/x86/boot/bzImage", stage / "bzImage")
        shutil.copy2(tree / ".config", stage / "config")
        shutil.copy2(log, stage / "build.log")
        seconds = round(time.monotonic() - began)
        facts = {"name": kernel.name, "source": version, "build_seconds": seconds, "dropped_options": unmet,
                 "patches": [path.name for path in kernel.patches]}  # fmt: skip
        (stage / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
        shutil.rmtree(home, ignore_errors=True)
        stage.rename(home)
        print(f"vmtest: {kernel.name} built in {seconds} s: {home / 'bzImage'}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
