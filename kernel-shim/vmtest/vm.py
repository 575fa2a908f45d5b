# SPDX-License-Identifier: Apache-2.0
"""Boot a kernel of the lab under QEMU, run one command in it, return what the command returned.

The guest sees the host's root file system: read-only over 9p, with a throw-away overlay in its memory. So
every program of this machine runs in it unchanged, the project's virtual environment included, and nothing it
writes survives, except below a directory that was shared on purpose.

Standard output, standard error and the exit status come back over three virtio serial ports, apart from the
console, which is kept for messages of the kernel. Emulation only (TCG): seconds measured in a guest mean
nothing.

Raises:
    LostGuest: the guest ended without a status (panic, QEMU died); carries the end of the console.
    GuestTimeout: a LostGuest that was still running when its time was up.
    VmError: there is no QEMU, or it refused to start.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
CONSOLE_TAIL_BYTES = 6000
# after the status has come: time for the power to go off and the last output to arrive
GRACE_SECONDS = 20.0


class VmError(Exception):
    """The lab could not start a guest."""


class LostGuest(VmError):
    """The guest went away without telling how its command ended."""

    def __init__(self, reason: str, console: str) -> None:
        super().__init__(f"{reason}; the console ended with:\n{console}" if console else reason)
        self.console = console


class GuestTimeout(LostGuest):
    """The command, or the guest itself, took longer than allowed."""


def _command_file(command: Sequence[str], name: str, environment: Mapping[str, str]) -> str:
    venv = CHECKOUT / ".venv"
    exports = {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "PATH": f"{venv}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "VIRTUAL_ENV": str(venv),
        **{key: value for key, value in os.environ.items() if key.startswith("CHECKPOINTD_")},
        **environment,
        "CHECKPOINTD_VM_KERNEL": name,
    }
    lines = [f"export {key}={shlex.quote(value)}" for key, value in exports.items()]
    return "\n".join([*lines, f"cd {shlex.quote(os.getcwd())}", f"exec {shlex.join(command)}", ""])


def _qemu_arguments(
    image: Path,
    run_dir: Path,
    console: Path,
    memory_mib: int,
    cpus: int,
    share: Path | None,
    ports: Mapping[str, int],
    append: str,
) -> list[str]:
    cmdline = ["console=ttyS0", "loglevel=4", "root=rootfs", "rootfstype=9p", "ro",
               "rootflags=trans=virtio,version=9p2000.L,cache=loose,msize=512000",
               "panic=-1", "oops=panic",
               f"init={HERE / 'guest-init.sh'}", f"VMTEST_DIR={run_dir}", *append.split()]  # fmt: skip
    # the guest has a /tmp of its own
    tmp = Path("/tmp")  # noqa: S108 - of the guest
    kept = {str(path.relative_to(tmp)) for path in (Path.cwd(), CHECKOUT) if tmp in path.parents}
    if kept:
        cmdline.append(f"VMTEST_KEEP={':'.join(sorted(kept))}")
    arguments = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(cpus),
        "-m", str(memory_mib),
        "-display", "none", "-monitor", "none", "-nodefaults", "-no-reboot", "-no-user-config",
        "-serial", f"file:{console}", "-kernel", str(image), "-append", " ".join(cmdline),
        "-fsdev", "local,id=root,path=/,security_model=passthrough,multidevs=remap,readonly=on",
        "-device", "virtio-9p-pci,fsdev=root,mount_tag=rootfs", "-device", "virtio-serial-pci",
    ]  # fmt: skip
    for port, fd in ports.items():
        arguments += ["-chardev", f"socket,id={port},fd={fd}"]
        arguments += ["-device", f"virtserialport,chardev={port},name=vmtest.{port}"]
    if share is not None:
        arguments += ["-fsdev", f"local,id=share,path={share},security_model=passthrough,multidevs=remap"]
        arguments += ["-device", "virtio-9p-pci,fsdev=share,mount_tag=share"]
    return arguments


def _tail(console: Path) -> str:
    try:
        return console.read_bytes()[-CONSOLE_TAIL_BYTES:].decode(errors="replace").strip()
    except OSError:
        return ""


def run(
    image: Path,
    command: Sequence[str],
    *,
    name: str,
    stdout: BinaryIO,
    stderr: BinaryIO,
    timeout_seconds: float = 600.0,
    memory_mib: int = 2048,
    cpus: int = 2,
    share: Path | None = None,
    console_log: Path | None = None,
    append: str = "",
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run ``command`` in a guest that boots ``image`` and return its exit status.

    Args:
        image: a bzImage built by ``kbuild``.
        command: program and arguments; it starts in the caller's working directory as root.
        name: name of the kernel, which the command finds in ``CHECKPOINTD_VM_KERNEL``.
        stdout: receives the command's output while it runs.
        stderr: receives the command's errors while it runs.
        timeout_seconds: from the start of QEMU to its end.
        memory_mib: memory of the guest; the overlay lives in it too.
        cpus: processors of the guest.
        share: a directory of the host which the guest sees, writable, at the same path.
        console_log: where to keep the kernel's messages.
        append: more words for the kernel's command line.
        environment: more variables for the command.

    Raises:
        LostGuest: no status came back.
        GuestTimeout: the time was up.
        VmError: QEMU is missing or did not start.
    """
    missing = [tool for tool in ("qemu-system-x86_64", "setpriv") if shutil.which(tool) is None]
    if missing:
        raise VmError(
            f"{' and '.join(missing)} not found; on Debian: apt-get install qemu-system-x86 util-linux"
        )
    deadline = time.monotonic() + timeout_seconds
    with contextlib.ExitStack() as stack:
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmtest-")))
        (run_dir / "command").write_text(_command_file(command, name, environment or {}))
        if share is not None:
            (run_dir / "share").write_text(str(share.resolve()))
        console = console_log or run_dir / "console"
        ours: dict[str, socket.socket] = {}
        theirs: dict[str, socket.socket] = {}
        for port in ("stdout", "stderr", "status"):
            ours[port], theirs[port] = (stack.enter_context(end) for end in socket.socketpair())
        fds = {port: end.fileno() for port, end in theirs.items()}
        arguments = _qemu_arguments(
            image, run_dir, console, memory_mib, cpus, share.resolve() if share else None, fds, append
        )
        # setpriv: if we are killed, the guest goes with us
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *arguments], pass_fds=tuple(fds.values()),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            for end in theirs.values():
                end.close()
            status = _pump(ours, {"stdout": stdout, "stderr": stderr}, deadline)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS if status is not None else 1.0)
            ended = process.poll()
        finally:
            if process.poll() is None:
                process.kill()
            _, complaint = process.communicate()
        if status is not None:
            return status
        if ended is None:
            raise GuestTimeout(f"the guest {name} was stopped after {timeout_seconds:.0f} s", _tail(console))
        if ended != 0 and complaint:
            raise VmError(f"QEMU ended with {ended}: {complaint.decode(errors='replace').strip()[-500:]}")
        raise LostGuest(f"the guest {name} ended without an exit status", _tail(console))


def _pump(ends: Mapping[str, socket.socket], sinks: Mapping[str, BinaryIO], deadline: float) -> int | None:
    """Pass output on until all ports are closed or the time is up; return the exit status if it came."""
    told = b""
    with selectors.DefaultSelector() as selector:
        for port, end in ends.items():
            selector.register(end, selectors.EVENT_READ, port)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for key, _ in selector.select(left):
                end = ends[key.data]
                data = end.recv(1 << 16)
                if not data:
                    selector.unregister(end)
                elif key.data == "status":
                    told += data
                    # whatever is still on its way has little time left
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                else:
                    sinks[key.data].write(data)
                    sinks[key.data].flush()
    words = told.split()
    return int(words[1]) if len(words) == 2 and words[0] == b"exit" and told.endswith(b"\n") else None
