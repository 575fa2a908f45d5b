# SPDX-License-Identifier: Apache-2.0
"""State out: all open files of a process, without changing them.

The way: `prepare_files` (running target: blockers, what takes time) and `capture_files` (frozen target: the
truth).  Everything comes from /proc/PID/fd, fdinfo, kcmp(2) and descriptors borrowed by pidfd_getfd(2), which need
ptrace access; no call is injected.

Raises: Unsupported (all reasons at once), TargetGone.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from checkpointd.errors import NotPermitted, TargetGone, Unsupported
from checkpointd.linux import fcntl as fdcalls
from checkpointd.linux.kcmp import shares_directories, shares_files
from checkpointd.procfs import fdinfo
from checkpointd.procfs.process import boot_id, thread_ids
from checkpointd.state.files import (
    AnyDescription,
    ClosedSocket,
    Descriptor,
    FileLock,
    FilesOptions,
    FilesState,
    PipeEnd,
    PipeState,
    SignalOwner,
)
from checkpointd.target import files_events, files_regular, pipes, sockets
from checkpointd.target.files_session import (
    CannotSaveError,
    ConnectionOpenError,
    ExtraContent,
    FdKey,
    ObjectIds,
    OpenFd,
    Session,
    group_by_description,
    read_mounts,
    read_open_fds,
)
from checkpointd.target.shared_objects import shared_memory_device

__all__ = [
    "CapturedFiles",
    "ExtraContent",
    "FilesDraft",
    "SharedMemoryFd",
    "capture_files",
    "file_blockers",
    "prepare_files",
    "shared_memory_fds",
]

_TRIES = 5
_CLOSED_MEANWHILE = (errno.ENOENT, errno.EBADF, errno.ENOTCONN, errno.ENXIO, errno.ESRCH)
_LOCK_TYPES = {"FLOCK": "flock", "POSIX": "posix", "OFDLCK": "ofd"}
_NOT_SAVED = {
    "[io_uring]": "an io_uring, whose requests live in the kernel",
    "[userfaultfd]": "a userfaultfd: the program serves its own page faults",
    "[perf_event]": "a perf event",
    "[fanotify]": "an fanotify group",
    "[aio]": "an AIO context",
    "bpf": "a BPF object",
    "kvm": "a KVM virtual machine",
    "[landlock-ruleset]": "a Landlock ruleset",
    "seccomp": "a seccomp listener",
}


class _HasPid(Protocol):
    @property
    def pid(self) -> int: ...


@dataclass
class FilesDraft:
    """What was found before the freeze; pass it to `capture_files`.

    Attributes:
        blockers: reasons why the files cannot be saved, one sentence each.
        warnings: what will not come back, as far as it shows before the freeze.
    """

    blockers: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    mounts: dict[int, fdinfo.Mount] = field(default_factory=dict)
    inotify_paths: dict[tuple[int, int], str] = field(default_factory=dict)
    closed_sockets: dict[int, ClosedSocket] = field(default_factory=dict)
    ownerless: set[FdKey] = field(default_factory=set)
    boot_id: str = ""


@dataclass(frozen=True, slots=True)
class CapturedFiles:
    """The state, content too large for it (to be read before the thaw, then closed), and warnings."""

    state: FilesState
    extra_objects: list[ExtraContent]
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class SharedMemoryFd:
    """A descriptor of shared memory: a candidate for the image's shared objects, mapped or not."""

    fd: int
    device: tuple[int, int]
    inode: int
    name: str
    size_bytes: int


def prepare_files(pid: int, options: FilesOptions | None = None) -> FilesDraft:
    """Look at a running process's files: everything that forbids the dump, and what is slow to find.

    Raises:
        TargetGone: no such process.
        NotPermitted: not ours to look at.
    """
    options = options or FilesOptions()
    for _ in range(_TRIES):
        try:
            return _prepare(pid, options)
        except OSError as error:
            # it opens and closes files while we look
            if error.errno not in _CLOSED_MEANWHILE or not os.path.exists(f"/proc/{pid}/fd"):
                raise _meaning(pid, error) from error
    return FilesDraft(boot_id=boot_id())  # the freeze will tell


def _prepare(pid: int, options: FilesOptions) -> FilesDraft:
    draft = FilesDraft(boot_id=boot_id(), mounts=read_mounts(os.getpid()))
    with Session(pid, options, final=False, mounts=draft.mounts) as session:
        _describe(session)
        draft.inotify_paths = session.inotify_paths
        draft.closed_sockets = session.closed_sockets
        draft.ownerless = session.ownerless
        draft.blockers = session.all_problems()
        draft.warnings = session.warnings
    return draft


def file_blockers(pid: int, options: FilesOptions | None = None) -> list[str]:
    """Every reason why the open files of the process cannot be saved, found without stopping it.

    Raises:
        TargetGone, NotPermitted: see `prepare_files`.
    """
    return prepare_files(pid, options).blockers


def shared_memory_fds(pid: int) -> list[SharedMemoryFd]:
    """Descriptors of memfds and of other shared memory without a name (also those mapped nowhere)."""
    found = []
    for one in read_open_fds(pid):
        if stat.S_ISREG(one.stat.st_mode) and one.stat.st_dev == shared_memory_device():
            name = one.link.removesuffix(" (deleted)").removeprefix("/memfd:")
            found.append(SharedMemoryFd(one.fd, one.device, one.stat.st_ino, name, one.stat.st_size))
    return found


def capture_files(
    frozen: _HasPid,
    objects: ObjectIds | None = None,
    *,
    options: FilesOptions | None = None,
    draft: FilesDraft | None = None,
) -> CapturedFiles:
    """All open files of a frozen process.

    Args:
        frozen: whatever knows the pid; every thread is stopped.
        objects: ids of the image's shared memory objects.
        draft: what `prepare_files` found, to save time.

    Raises:
        Unsupported: something cannot be saved; nothing was changed.
        TargetGone: the process died.
    """
    pid = frozen.pid
    draft = draft or FilesDraft(boot_id=boot_id())
    try:
        with Session(
            pid,
            options or FilesOptions(),
            final=True,
            objects=objects or {},
            mounts=draft.mounts,
            inotify_paths=draft.inotify_paths,
            closed_sockets=draft.closed_sockets,
            ownerless=draft.ownerless,
        ) as session:
            try:
                state = _describe(session)
            except BaseException:
                _close_all(session.extra)
                raise
    except OSError as error:
        raise _meaning(pid, error) from error
    if problems := session.all_problems():
        _close_all(session.extra)
        raise Unsupported(
            f"process {pid} has open files that cannot be saved: {problems[0]}"
            + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""),
            hint="`checkpoint check` lists all of them.",
            pid=pid,
            blockers=problems,
        )
    return CapturedFiles(
        FilesState(state.descriptions, state.descriptors, state.pipes, draft.boot_id, pid),
        session.extra,
        session.warnings,
    )


def _close_all(extra_objects: list[ExtraContent]) -> None:
    while extra_objects:
        extra_objects.pop().close()


def _meaning(pid: int, error: OSError) -> Exception:
    if error.errno in (errno.ENOENT, errno.ESRCH):
        return TargetGone(f"process {pid} is gone", pid=pid)
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermitted(
            f"the open files of process {pid} may not be examined ({error})",
            hint="Run checkpointd as the same user with ptrace access, or as root.",
            pid=pid,
        )
    return error


@dataclass
class _Found:
    """What one description may need to know about the others."""

    by_fd: dict[int, OpenFd]
    pipe_index: dict[int, int]
    socket_index: dict[int, int]
    edge: set[int]
    content_of: dict[tuple[int, int], int] = field(default_factory=dict)


def _describe(session: Session) -> FilesState:
    """Describe all descriptions; what cannot be saved becomes a problem of the session."""
    _check_threads(session)
    fds = read_open_fds(session.pid)
    groups = group_by_description(session.pid, fds)
    pipe_states, pipe_index = _pipes(session, groups)
    found = _Found(
        by_fd={one.fd: one for one in fds},
        pipe_index=pipe_index,
        socket_index={
            group[0].stat.st_ino: index
            for index, group in enumerate(groups)
            if group[0].link.startswith("socket:[")
        },
        edge=files_events.edge_watched(fds),
    )
    descriptions: list[AnyDescription] = []
    descriptors: list[Descriptor] = []
    for index, group in enumerate(groups):
        try:
            description = _classify(session, group, index, found)
            descriptions.append(_with_locks_and_owner(session, group, description))
        except ConnectionOpenError as problem:
            session.connections.append((group[0].fd, str(problem)))
        except CannotSaveError as problem:
            session.problems.append(str(problem))
        except (KeyError, ValueError) as error:
            session.problems.append(
                f"fd {group[0].fd} ({group[0].link}): this kernel describes it in a way not understood ({error})"
            )
        except OSError as error:
            # a running target may close it under our hands
            if session.final or error.errno not in (errno.ENOENT, errno.EBADF, errno.ENOTCONN):
                raise
        descriptors += [Descriptor(one.fd, index, one.info.cloexec) for one in group]
    descriptors.sort(key=lambda descriptor: descriptor.fd)
    return FilesState(tuple(descriptions), tuple(descriptors), tuple(pipe_states))


def _check_threads(session: Session) -> None:
    for tid in thread_ids(session.pid):
        if tid == session.pid:
            continue
        try:
            if not shares_files(session.pid, tid):
                session.problems.append(
                    f"thread {tid} has open files of its own (unshare(CLONE_FILES)), which cannot be saved"
                )
            if not shares_directories(session.pid, tid):
                session.problems.append(
                    f"thread {tid} has a working directory of its own (unshare(CLONE_FS)), which cannot be saved"
                )
        except OSError as error:
            if error.errno == errno.ENOSYS:  # without CONFIG_KCMP nobody can tell
                return
            if error.errno != errno.ESRCH or session.final:
                raise


def _pipes(session: Session, groups: Sequence[Sequence[OpenFd]]) -> tuple[list[PipeState], dict[int, int]]:
    """All pipes, and description index to pipe index."""
    ends: dict[tuple[int, int], list[int]] = {}
    for index, group in enumerate(groups):
        if pipes.is_pipe(group[0]) and not group[0].flags & fdcalls.O_PATH:
            ends.setdefault((group[0].stat.st_dev, group[0].stat.st_ino), []).append(index)
    states: list[PipeState] = []
    index_of: dict[int, int] = {}
    for members in ends.values():
        try:
            states.append(pipes.pipe(session, [groups[index][0] for index in members]))
        except CannotSaveError as problem:
            session.problems.append(str(problem))
            continue
        except OSError as error:
            if session.final or error.errno not in (errno.ENOENT, errno.EBADF):
                raise
            continue
        index_of.update(dict.fromkeys(members, len(states) - 1))
    return states, index_of


def _classify(session: Session, group: Sequence[OpenFd], index: int, found: _Found) -> AnyDescription:
    one = group[0]
    mode = one.stat.st_mode
    if one.flags & fdcalls.O_PATH:
        return _path_only(session, one, index, found)
    if one.link.startswith("anon_inode:"):
        return _anonymous(session, group, one.link.removeprefix("anon_inode:"), found)
    if one.link.startswith("pidfd:["):
        return files_events.pidfd(session, one)
    if stat.S_ISSOCK(mode):
        return sockets.one_socket(session, one, found.socket_index)
    if stat.S_ISFIFO(mode):
        # without an entry the pipe itself was a problem, already told
        return PipeEnd(flags=one.flags, pipe=found.pipe_index.get(index, 0))
    if stat.S_ISREG(mode):
        return files_regular.regular(session, one, index, found.content_of)
    if stat.S_ISDIR(mode):
        return files_regular.directory(session, one)
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        return files_regular.device(session, one)
    raise CannotSaveError(f"fd {one.fd} is {one.link}, which cannot be saved; close it before the dump")


def _path_only(session: Session, one: OpenFd, index: int, found: _Found) -> AnyDescription:
    if stat.S_ISDIR(one.stat.st_mode):
        return files_regular.directory(session, one)
    if stat.S_ISREG(one.stat.st_mode) and one.stat.st_nlink:
        return files_regular.regular(session, one, index, found.content_of)
    raise CannotSaveError(
        f"fd {one.fd} is an O_PATH descriptor of {one.link}, which cannot be saved; close it first"
    )


def _anonymous(session: Session, group: Sequence[OpenFd], name: str, found: _Found) -> AnyDescription:
    one = group[0]
    if name == "[eventfd]":
        return files_events.eventfd(session, one)
    if name == "[eventpoll]":
        return files_events.epoll(session, one, found.by_fd)
    if name == "[timerfd]":
        return files_events.timerfd(session, group, found.edge)
    if name == "[signalfd]":
        return files_events.signalfd(one)
    if name in ("inotify", "[inotify]"):
        return files_events.inotify(session, one)
    if name == "[pidfd]":
        return files_events.pidfd(session, one)
    for part, what in _NOT_SAVED.items():
        if name.startswith(part):
            raise CannotSaveError(f"fd {one.fd} is {what}, and cannot be saved; close it before the dump")
    raise CannotSaveError(
        f"fd {one.fd} is the kernel object {name}, which cannot be saved; close it before the dump"
    )


def _with_locks_and_owner(
    session: Session, group: Sequence[OpenFd], description: AnyDescription
) -> AnyDescription:
    one = group[0]
    changes: dict[str, object] = {}
    if one.info.locks:
        changes["locks"] = tuple(_lock(one, entry) for entry in one.info.locks)
    may_signal = one.flags & fdcalls.FASYNC or stat.S_ISSOCK(one.stat.st_mode)
    # the others are asked before the freeze, and again only if they are new or had an answer
    if not session.final or may_signal or one.key not in session.ownerless:
        if owner := _owner(session, one, description):
            changes["owner"] = owner
        elif not session.final:
            session.ownerless.add(one.key)
    if not changes:
        return description
    return dataclasses.replace(description, **changes)  # type: ignore[arg-type]


def _owner(session: Session, one: OpenFd, description: AnyDescription) -> SignalOwner | None:
    if one.flags & fdcalls.O_PATH or isinstance(description, ClosedSocket):
        return None
    with session.borrow(one.fd) as fd:
        kind, number, signal = fdcalls.get_owner(fd)
    if not (number or signal):
        return None
    return SignalOwner(kind, number, signal, own_process=number == session.pid)


def _lock(one: OpenFd, entry: fdinfo.LockEntry) -> FileLock:
    kind = _LOCK_TYPES.get(entry.kind)
    if kind is None:
        raise CannotSaveError(
            f"fd {one.fd} ({one.link}) holds a {entry.kind.lower()} (F_SETLEASE), which cannot be saved; "
            "give it back first"
        )
    return FileLock(kind, entry.write, entry.start, entry.end)  # type: ignore[arg-type]
