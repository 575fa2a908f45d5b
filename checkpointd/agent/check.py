# SPDX-License-Identifier: Apache-2.0
"""What this kernel, this user and this target allow: all blockers at once, before anything is frozen."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence

from kernel_shim.probe import Precision

from checkpointd import features
from checkpointd.agent.protocol import CheckItem, CheckResult
from checkpointd.errors import (
    Busy,
    CheckpointError,
    KernelLacks,
    NotPermitted,
    TargetGone,
    Unsupported,
    UsageError,
)
from checkpointd.linux import capability
from checkpointd.memory import VmaKind
from checkpointd.procfs import maps, process
from checkpointd.state.files import FilesOptions
from checkpointd.target.attachable import exited, permission_hint
from checkpointd.target.files import prepare_files
from checkpointd.target.process import prepare_process
from checkpointd.tracking.select import select_backend


def files_options(tcp: str, external: Sequence[str], tty: str = "", changed: str = "refuse") -> FilesOptions:
    """The user's words as options.

    Raises:
        UsageError: a word that means nothing here.
    """
    how = external[-1] if external else "keep"
    if tcp not in ("", "refuse", "close"):
        raise UsageError(f"--tcp takes refuse or close, not {tcp!r}")
    if how not in ("refuse", "keep", "null"):
        raise UsageError(f"--external takes refuse, keep or null, not {how!r}")
    if tty not in ("", "keep", "null"):
        raise UsageError(f"--tty takes keep or null, not {tty!r}")
    if changed not in ("", "refuse", "allow"):
        raise UsageError(f"--changed takes refuse or allow, not {changed!r}")
    return FilesOptions(
        changed="allow" if changed == "allow" else "refuse",
        tcp="close" if tcp == "close" else "refuse",
        external="refuse" if how == "refuse" else "null" if how == "null" else "keep",
        tty="null" if tty == "null" else "keep",
    )


def refuse_impossible(pid: int) -> None:
    """What can never be traced.

    Raises:
        UsageError: our own process.
        TargetGone: no such process, or a zombie.
        NotPermitted: another user's process, and no right to it.
        Busy: a debugger has it.
        Unsupported: a kernel thread, a 32-bit process, or one whose main thread has exited.
    """
    if pid <= 0:
        raise UsageError(f"{pid} is not a process id", hint="give the pid of one running process")
    if pid in (os.getpid(), os.getppid()):
        raise UsageError(f"process {pid} is checkpointd itself", hint="choose another process", pid=pid)
    try:
        stat, status = process.read_stat(pid), process.read_status(pid)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGone(f"no process with pid {pid}", hint="look it up with `ps`", pid=pid) from error
    if "Tgid" in status and int(status["Tgid"]) != pid:
        raise UsageError(
            f"{pid} is a thread of process {status['Tgid']}", hint=f"use -p {status['Tgid']}", pid=pid
        )
    if stat.flags & process.PF_KTHREAD:
        raise Unsupported(
            f"process {pid} ({stat.comm}) is a kernel thread: it has no memory to save",
            hint="give the pid of a program; kernel threads are the children of process 2 (kthreadd)",
            pid=pid,
        )
    if stat.state in "ZX":
        raise exited(pid)
    tracer = int(status.get("TracerPid", "0"))
    if tracer:
        name = "?"
        with contextlib.suppress(OSError):
            name = process.comm(tracer)
        raise Busy(
            f"process {pid} is traced by process {tracer} ({name})", hint="detach the debugger first", pid=pid
        )
    try:
        with open(f"/proc/{pid}/mem", "rb"):
            pass
        elf_class = _elf_class(pid)
    except PermissionError as error:
        uid = int(status["Uid"].split()[0])
        if os.geteuid() in (0, uid):
            raise NotPermitted(
                f"process {pid} ({stat.comm}) may not be traced by this {'user' if os.geteuid() else 'root'}",
                hint=permission_hint(status),
                pid=pid,
            ) from error
        raise NotPermitted(
            f"process {pid} belongs to uid {uid} and this user may not trace it",
            hint="run as that user or as root; see also kernel.yama.ptrace_scope",
            pid=pid,
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            raise TargetGone(f"process {pid} is exiting", pid=pid) from error
        raise
    if elf_class == 1:
        raise Unsupported(
            f"process {pid} ({stat.comm}) runs a 32-bit program, which is not supported",
            hint="only 64-bit programs can be saved: run a 64-bit build of it",
            pid=pid,
        )


def _elf_class(pid: int) -> int:
    with open(f"/proc/{pid}/exe", "rb") as file:
        head = file.read(5)
    return head[4] if head[:4] == b"\x7fELF" else 0


def look(pid: int, options: FilesOptions) -> tuple[list[str], list[str]]:
    """Every reason why this target's state cannot be saved, and what a dump would warn of, one sentence each."""
    warnings: list[str] = []
    vmas = maps.read_smaps(pid)  # once: it takes 40 ms a GiB
    try:
        draft = prepare_process(pid, vmas)
        found, warnings = list(draft.blockers), draft.warnings
    except Unsupported as error:
        found = list(error.details.get("blockers", [error.message]))
    files = prepare_files(pid, options)
    found += files.blockers
    found += [
        f"mapping {vma} shares a deleted file, which cannot be mapped again"
        for vma in vmas
        if vma.kind is VmaKind.FILE_SHARED and vma.deleted
    ]
    return list(dict.fromkeys(found)), list(dict.fromkeys([*warnings, *files.warnings]))


def refuse_blockers(pid: int, options: FilesOptions) -> None:
    """Raises Unsupported with all that `look` finds at once, and what `refuse_impossible` raises."""
    refuse_impossible(pid)
    found, _ = look(pid, options)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise Unsupported(
            f"process {pid} cannot be saved: {found[0]}{more}",
            hint="`checkpoint check -p PID` lists every reason and what to do",
            pid=pid,
            blockers=found,
        )


def refuse_backend(backend: str, *, precise: bool = False) -> None:
    """Raises what `select_backend` does about this kernel: better now than while the target stands still."""
    select_backend(backend, features.probe(), precise=precise)


def check(pid: int | None) -> CheckResult:
    """The kernel's and the user's abilities, and with a pid the target's."""
    items = list(_kernel_items())
    backend = reason = ""
    try:
        choice = select_backend("auto", features.probe())
        backend, reason = choice.backend, choice.reason
    except KernelLacks as error:
        reason = error.message
    if pid is not None:
        items += _target_items(pid)
    return CheckResult([item.to_dict() for item in items], backend, reason)


def _kernel_items() -> Iterator[CheckItem]:
    found = features.probe()
    notes = "; ".join(found.notes)
    yield CheckItem(
        "PAGEMAP_SCAN",
        "optional",
        found.pagemap_scan,
        "lists which pages hold data" if found.pagemap_scan else f"missing: {notes}",
        "" if found.pagemap_scan else "pagemap is read word by word instead (slower, Linux before 6.7)",
    )
    yield CheckItem(
        "userfaultfd write-protect",
        "optional",
        found.uffd_wp_async,
        "exact dirty tracking" if found.uffd_wp_async else f"missing: {notes}",
        "" if found.uffd_wp_async else "incremental dumps compare content instead (slower to read, as small)",
    )
    kinds = found.soft_dirty_kinds
    yield CheckItem("soft-dirty", "optional", found.soft_dirty, kinds.soft_dirty.why)
    exact = kinds.precision is not Precision.NEITHER
    yield CheckItem(
        "precise soft-dirty",
        "optional",
        exact,
        kinds.why,
        "" if exact else "only --precise needs it; kernel-shim/README.md has the kernel patch",
    )
    if found.soft_dirty:
        yield CheckItem(
            "soft-dirty keeps writes", "optional", kinds.keeps_writes.works, kinds.keeps_writes.why
        )
    for name, number, why, lost in _CAPABILITIES:
        have = _has_capability(number)
        yield CheckItem(
            name, "optional", have, why, "" if have else f"{_how_to_get(name)}; without it {lost}"
        )


_CAPABILITIES = (
    (
        "CAP_SYS_PTRACE",
        capability.CAP_SYS_PTRACE,
        "tracing processes of other users",
        "processes of others, and those that may more than this user, cannot be dumped",
    ),
    (
        "CAP_CHECKPOINT_RESTORE",
        capability.CAP_CHECKPOINT_RESTORE,
        "restoring with the same pid, shared memory of others",
        "(or CAP_SYS_ADMIN) a restore needs --new-pid",
    ),
    (
        "CAP_SYS_ADMIN",
        capability.CAP_SYS_ADMIN,
        "telling swap from markers, seccomp details",
        "clocks jump where a process is restored in another boot, with a warning",
    ),
    (
        "CAP_SYS_RESOURCE",
        capability.CAP_SYS_RESOURCE,
        "raising hard limits at restore",
        "a process whose hard limits were higher than the service's comes back with those, with a warning",
    ),
)


def _how_to_get(name: str) -> str:
    if os.geteuid():
        return f"run as root, or grant {name.lower()}"
    short = name.removeprefix("CAP_")
    return (
        f"withheld from this root, by a container or a bounding set (docker run --cap-add {short} grants it)"
    )


def _has_capability(number: int) -> bool:
    return bool(int(process.read_status(os.getpid())["CapEff"], 16) >> number & 1)


def _target_items(pid: int) -> Iterator[CheckItem]:
    try:
        refuse_impossible(pid)
    except CheckpointError as error:
        yield CheckItem(f"process {pid}", "target", False, error.message, error.hint)
        return
    found, warnings = look(pid, FilesOptions())
    for sentence in found:
        yield CheckItem(f"process {pid}", "target", False, sentence)
    if not found:
        but = f", with {len(warnings)} warning{'s' * (len(warnings) > 1)}:" if warnings else ""
        yield CheckItem(f"process {pid}", "target", True, f"can be dumped and restored{but}")
    for sentence in warnings:
        yield CheckItem(f"process {pid}", "target", True, f"warning: {sentence}")
