# SPDX-License-Identifier: Apache-2.0
"""State out: what only the process as a whole can tell about itself.

Source: prctl(2), membarrier(2), mlockall(2), madvise(2), landlock(7), kernel sources as cited.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from checkpointd.linux import capability as cap
from checkpointd.linux import kcmp, prctl
from checkpointd.linux.arch import ARCH_GET_CPUID, ARCH_GET_XCOMP_PERM, MCL_FUTURE, MCL_ONFAULT, Nr
from checkpointd.memory import PAGE_SIZE
from checkpointd.state.process import SessionKeyring
from checkpointd.state.threads import Credentials
from checkpointd.target.keyrings import judge_keyrings, keyring_calls
from checkpointd.target.questions import Questions
from checkpointd.target.remote import Call, Remote, Result

_MEMBARRIER_GET_REGISTRATIONS = 512
_MADV_COLD = 20
_PROT_READ, _MAP_PRIVATE_ANON = 1, 0x22


@dataclass(frozen=True, slots=True)
class Asked:
    """What only the process itself can tell.

    Attributes:
        look_at_us: 0 if it may examine us as a debugger does (kcmp(2)), -errno if not.
    """

    brk: int
    dumpable: int
    child_subreaper: bool
    thp_disable: int
    memory_merge: bool
    membarrier: int
    xcomp_permitted: int
    lock_future: int
    session_keyring: SessionKeyring | None
    look_at_us: int
    blockers: tuple[str, ...]
    warnings: tuple[str, ...]


ASKED_ROOM_BYTES = 3 * 16


def ask(questions: Questions) -> Callable[[], Asked]:
    """Add what is to be asked; the answer once that has been."""
    subreaper_at, xcomp_at, tsc_at = questions.room(8), questions.room(8), questions.room(8)
    of_keyrings = questions.add(keyring_calls(questions.remote))
    others = questions.add(
        [
            Call(Nr.BRK, (0,)),
            Call(Nr.PRCTL, (prctl.PR_GET_DUMPABLE,)),
            Call(Nr.PRCTL, (prctl.PR_GET_CHILD_SUBREAPER, subreaper_at)),
            Call(Nr.PRCTL, (prctl.PR_GET_THP_DISABLE, 0, 0, 0, 0)),
            Call(Nr.PRCTL, (prctl.PR_GET_MEMORY_MERGE, 0, 0, 0, 0)),
            Call(Nr.MEMBARRIER, (_MEMBARRIER_GET_REGISTRATIONS, 0, 0)),
            Call(Nr.ARCH_PRCTL, (ARCH_GET_XCOMP_PERM, xcomp_at)),
            Call(Nr.PRCTL, (prctl.PR_GET_MDWE, 0, 0, 0, 0)),
            Call(Nr.PRCTL, (prctl.PR_GET_TSC, tsc_at)),
            Call(Nr.ARCH_PRCTL, (ARCH_GET_CPUID, 0)),
            Call(kcmp.NR_KCMP, (os.getpid(), os.getpid(), kcmp.KCMP_VM, 0, 0)),
            Call(Nr.MADVISE, (subreaper_at & -PAGE_SIZE, PAGE_SIZE, _MADV_COLD)),
        ]
    )

    def number(address: int, size_bytes: int) -> int:
        return int.from_bytes(questions.written(address, size_bytes), "little")

    def answer() -> Asked:
        remote = questions.remote
        brk, dumpable, subreaper, thp, merge, membarrier, xcomp, mdwe, tsc, cpuid, look, cold = (
            questions.results(others)
        )
        keyrings = judge_keyrings(remote, questions.results(of_keyrings))
        blockers = []
        if mdwe > 0:
            blockers.append("it forbade itself memory that is written first and executed later (PR_SET_MDWE)")
        if tsc == 0 and number(tsc_at, 4) == 2:
            blockers.append("it forbade itself the time stamp counter (PR_SET_TSC)")
        if cpuid == 0:
            blockers.append("it forbade itself the cpuid instruction (ARCH_SET_CPUID)")
        return Asked(
            brk=brk,
            dumpable=max(0, dumpable),
            child_subreaper=subreaper == 0 and number(subreaper_at, 4) != 0,
            thp_disable=max(0, thp),
            memory_merge=merge > 0,
            membarrier=max(0, membarrier),
            xcomp_permitted=number(xcomp_at, 8) if xcomp == 0 else 0,
            lock_future=_lock_future(remote) if cold == -errno.EINVAL else 0,
            session_keyring=keyrings.session,
            look_at_us=look,
            blockers=tuple(blockers),
            warnings=keyrings.warnings,
        )

    return answer


def landlock_warnings(credentials: Credentials, look_at_us: int) -> list[str]:
    """No file shows a Landlock domain, but whoever is in one may examine none outside of it, whatever his rights.

    Args:
        credentials: of the main thread, whose domain is looked for.
        look_at_us: of `Asked`.

    Source: Linux security/landlock/task.c (hook_ptrace_access_check).
    """
    if look_at_us >= 0:
        return []  # of a domain that we are in too it loses nothing
    if look_at_us == -errno.EPERM and cap.has(credentials.effective, cap.CAP_SYS_PTRACE):
        return [
            "it is in a Landlock domain, or confined otherwise, as it may not examine other processes in spite of "
            "CAP_SYS_PTRACE: it comes back without"
        ]
    if credentials.no_new_privs:
        return [
            "it has no_new_privs: should it be in a Landlock domain, which nothing shows, it comes back without"
        ]
    return []


def _lock_future(remote: Remote) -> int:
    """MCL_FUTURE, with MCL_ONFAULT or without: a new mapping of such a process is filled at once, or is not.

    No file of /proc shows it.  That the process has it at all is told by the scratch, a mapping newer than any call of
    the program's: advice to age its pages is refused (EINVAL) where they are locked, and does nothing otherwise (Linux
    mm/madvise.c, can_madv_lru_vma).
    """
    answer_at = remote.alloc(16)
    results = remote.batch(
        [
            Call(Nr.MMAP, (0, PAGE_SIZE, _PROT_READ, _MAP_PRIVATE_ANON, -1, 0)),
            Call(Nr.MINCORE, (Result(0), PAGE_SIZE, answer_at)),
        ],
        undo=[Call(Nr.MUNMAP, (Result(0), PAGE_SIZE))],
    )
    if results[0] < 0:  # beyond RLIMIT_MEMLOCK; rather locked too early than too late
        return MCL_FUTURE
    is_filled = results[1] == 0 and remote.read(answer_at, 1)[0] & 1
    # apart from the first batch, whose undo would unmap a second time what another thread may have mapped there since
    remote.batch([Call(Nr.MUNMAP, (results[0], PAGE_SIZE))])
    return MCL_FUTURE if is_filled else MCL_FUTURE | MCL_ONFAULT
