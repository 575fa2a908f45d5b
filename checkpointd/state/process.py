# SPDX-License-Identifier: Apache-2.0
"""What an image knows of a process besides its memory and its files, and the three together."""

from __future__ import annotations

from dataclasses import dataclass

from checkpointd.state.files import FilesState
from checkpointd.state.memory import AddressSpace, FileIdentity
from checkpointd.state.signals import SignalsState
from checkpointd.state.threads import ThreadState


@dataclass(frozen=True, slots=True)
class MemoryLayout:
    """What the kernel remembers of a program's parts (struct prctl_mm_map), and its auxiliary vector."""

    start_code: int
    end_code: int
    start_data: int
    end_data: int
    start_brk: int
    brk: int
    start_stack: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    auxv: bytes


@dataclass(frozen=True, slots=True)
class Limit:
    """setrlimit(2): `resource` is RLIMIT_*, 2**64 - 1 stands for no limit."""

    resource: int
    soft: int
    hard: int


@dataclass(frozen=True, slots=True)
class Cpu:
    """The machine's CPU as programs see it.

    Attributes:
        xfeatures: state components the kernel saves (XCR0).
        xstate_size_bytes: their size in memory.
        flags: instruction set extensions.
        xcomp_permitted: components this process asked for (AMX).
    """

    xfeatures: int
    xstate_size_bytes: int
    flags: frozenset[str]
    xcomp_permitted: int = 0


@dataclass(frozen=True, slots=True)
class Host:
    """Where and when the image was taken.

    Attributes:
        monotonic_ns, boottime_ns: the clocks as the process saw them; they compare within `boot_id` only.
        time_offsets_ns: what its time namespace added to these two.
        cgroups: `controllers:path` of each hierarchy it was in below the root; empty in older images too.
    """

    hostname: str
    kernel: str
    boot_id: str
    realtime_ns: int
    monotonic_ns: int
    boottime_ns: int
    time_offsets_ns: tuple[int, int] = (0, 0)
    cgroups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionKeyring:
    """The anonymous session keyring of a process (session-keyring(7)).

    Attributes:
        serial: as in /proc/keys, within a boot; 0 for none.
        has_user_keyring: that of its user is linked there.
    """

    serial: int
    has_user_keyring: bool = False


@dataclass(frozen=True, slots=True)
class ProcessState:
    """One process.

    Attributes:
        pid, ppid, pgid, sid: in the process's own pid namespace; 0 for one outside.
        exe: the program's file; `exe_deleted` when its name was gone.
        comm, cmdline: for people; the program's own copy is in its memory.
        umask: as umask(2) takes it.
        personality: personality(2).
        oom_score_adj, coredump_filter: as in /proc/PID.
        membarrier: registrations (MEMBARRIER_CMD_GET_REGISTRATIONS).
        lock_future: flags of mlockall(2) for what it maps later (MCL_FUTURE, MCL_ONFAULT), or 0.
        namespaces: kind to "kind:[inode]".
        stopped: it was stopped by job control, and comes back stopped.
        autogroup_nice: of its session (sched(7)); None where there are no such groups.
        session_keyring: None where it could not be told.
        threads: the leader first, then by id.
    """

    pid: int
    ppid: int
    pgid: int
    sid: int
    start_time: int
    exe: FileIdentity
    exe_deleted: bool
    comm: str
    cmdline: tuple[str, ...]
    layout: MemoryLayout
    cwd: str
    root: str
    umask: int
    limits: tuple[Limit, ...]
    dumpable: int
    personality: int
    oom_score_adj: int
    coredump_filter: int | None
    child_subreaper: bool
    thp_disable: int
    memory_merge: bool
    membarrier: int
    namespaces: dict[str, str]
    cpu: Cpu
    host: Host
    stopped: bool
    threads: tuple[ThreadState, ...]
    signals: SignalsState
    warnings: tuple[str, ...] = ()
    lock_future: int = 0
    autogroup_nice: int | None = None
    session_keyring: SessionKeyring | None = None


@dataclass(frozen=True, slots=True)
class ImageState:
    """All state of an image other than pages; what the image room stores without looking inside."""

    process: ProcessState
    address_space: AddressSpace
    files: FilesState | None = None
