# SPDX-License-Identifier: Apache-2.0
"""Opening again what an image refers to by path, without lending the process rights it does not have.

We may be root while the process is not, and its user may have put anything at its paths since the dump:

* The paths of an image come from /proc and had no symbolic link in them; one that has now leads elsewhere and is
  refused (RESOLVE_NO_SYMLINKS; RESOLVE_IN_ROOT where the paths begin elsewhere).
* What is found is looked at (O_PATH) before it is opened: opening a device or a FIFO does things.
* Where we have more rights than the process, it must be the very file of the dump, or one with the owner, group and
  permissions of then (a log that was rotated), or one that the process could open by itself: a thread of ours
  tries, with its ids, groups and capabilities.

Raises: RestoreConflict, OSError.

Source: path_resolution(7), openat2(2), setfsuid(2), credentials(7) ("threads ... credentials").
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from checkpointd.errors import RestoreConflict
from checkpointd.linux import capability as cap
from checkpointd.linux import fcntl as fdcalls
from checkpointd.linux import prctl
from checkpointd.linux._libc import syscall
from checkpointd.linux.arch import Nr
from checkpointd.linux.openat2 import AT_FDCWD, RESOLVE_IN_ROOT, RESOLVE_NO_SYMLINKS, openat2
from checkpointd.state.memory import FileIdentity
from checkpointd.state.threads import Credentials

T = TypeVar("T")

# flags an open(2) must not repeat: they made the file, or need a descriptor in the target
_NOT_AGAIN = os.O_CREAT | os.O_EXCL | os.O_TRUNC | fdcalls.FASYNC
_TMPFILE_BIT = 0o20000000  # __O_TMPFILE: O_TMPFILE without the O_DIRECTORY in it
_SETTABLE = os.O_APPEND | os.O_DIRECT | os.O_NOATIME | os.O_NONBLOCK
_CLONE_FS = 0x200
_NO_ID = (1 << 32) - 1  # (uid_t)-1: changes nothing, tells what is
_KINDS = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "FIFO",
    stat.S_IFCHR: "character device",
    stat.S_IFSOCK: "socket",
}
_PUT_BACK = "bring the file back where it was, readable for this user, then restore again"


@dataclass(frozen=True, slots=True)
class Opener:
    """Opens paths for one process.

    Attributes:
        root: where the paths begin that it is given.
        theirs: who the process is; None if we have no more rights than it.
        ours: who we are.
    """

    root: str = "/"
    theirs: Credentials | None = None
    ours: Credentials | None = None

    def look(self, path: str) -> int:
        """A descriptor (O_PATH) of what is there.

        Raises:
            RestoreConflict: a symbolic link is in the way.
            OSError: nothing is there.
        """
        return self._resolve(path, os.O_PATH | os.O_CLOEXEC)

    def stat(self, path: str) -> os.stat_result | None:
        """What is there; None for nothing.

        Raises:
            RestoreConflict: a symbolic link is in the way.
        """
        try:
            fd = self.look(path)
        except OSError:
            return None
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def open(
        self,
        path: str,
        flags: int,
        *,
        kind: int,
        recorded: FileIdentity | None,
        what: str,
        block: bool = True,
        device: tuple[int, int] | None = None,
    ) -> int:
        """open(2) with the status flags of an image.

        Args:
            kind: S_IFREG, S_IFDIR, ...: what it must be.
            recorded: what it was at the dump; None if the image does not say.
            what: the description and its path, for the error.
            block: False opens without waiting for a peer (FIFOs, terminals) and sets the flags afterwards.
            device: number of a device, which it must have; links may lead to it, and anybody may open it.

        Raises:
            RestoreConflict: it is no such thing, not what it was, or cannot be opened.
        """
        try:
            # a device is known by its number, whatever leads to it
            seen = self.look(path) if device is None else os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                there = os.fstat(seen)
                self._judge_kind(there, kind, device, what, path)
                if device is not None or self._is_theirs(there, recorded):
                    return self._open_seen(seen, path, flags, block=block)
                return self._open_as_process(there, path, flags, block=block, what=what)
            finally:
                os.close(seen)
        except OSError as error:
            raise RestoreConflict(
                f"{what} cannot be opened: {os.strerror(error.errno or 0)}", hint=_PUT_BACK, path=path
            ) from error

    @property
    def is_guarding(self) -> bool:
        """Have we rights that the process has not?"""
        return self.theirs is not None and self.ours is not None and has_more_rights(self.ours, self.theirs)

    def do(self, action: Callable[[], T]) -> T:
        """Run `action`, on files or sockets by name, with the rights of the process where we have more."""
        if self.theirs is None or self.ours is None or not self.is_guarding:
            return action()
        return as_process(self.theirs, self.ours, action)

    def prove(self, seen: int, path: str, recorded: FileIdentity | None, *, what: str) -> None:
        """May the process have to do with what `look` found, as if it had opened it for reading?

        Raises:
            RestoreConflict: it may not.
        """
        there = os.fstat(seen)
        if not self._is_theirs(there, recorded):
            os.close(self._open_as_process(there, path, os.O_RDONLY | os.O_NONBLOCK, block=True, what=what))

    def _resolve(self, path: str, flags: int) -> int:
        resolve, dir_fd, rest = RESOLVE_NO_SYMLINKS, AT_FDCWD, path
        if self.root != "/":
            resolve |= RESOLVE_IN_ROOT
            dir_fd = os.open(self.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            rest = "/" + os.path.relpath(path, self.root)
        try:
            return openat2(dir_fd, rest, flags, resolve)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise RestoreConflict(
                    f"{path} leads through a symbolic link, which it did not at the dump",
                    hint="put the file itself (or its directory) back in the place of the link",
                    path=path,
                ) from error
            raise
        finally:
            if dir_fd >= 0:
                os.close(dir_fd)

    @staticmethod
    def _judge_kind(
        there: os.stat_result, kind: int, device: tuple[int, int] | None, what: str, path: str
    ) -> None:
        if stat.S_IFMT(there.st_mode) != kind:
            raise RestoreConflict(f"{what} is no {_KINDS[kind]} any more", path=path)
        if device is not None and (os.major(there.st_rdev), os.minor(there.st_rdev)) != device:
            raise RestoreConflict(
                f"{what} is not the device {device[0]}:{device[1]} it was at the dump", path=path
            )

    def _is_theirs(self, there: os.stat_result, recorded: FileIdentity | None) -> bool:
        if not self.is_guarding:
            return True
        return recorded is not None and is_recorded(there, recorded)

    def _open_seen(self, seen: int, path: str, flags: int, *, block: bool) -> int:
        if flags & (os.O_NOFOLLOW | os.O_PATH):  # a path through /proc would have to be followed
            fd = self._resolve(path, again_flags(flags, block=block))
            return _same_or_raise(fd, os.fstat(seen), path)
        fd = os.open(own_path(seen), again_flags(flags, block=block))
        if not block:
            set_status(fd, flags)
        return fd

    def _open_as_process(
        self, there: os.stat_result, path: str, flags: int, *, block: bool, what: str
    ) -> int:
        assert self.theirs is not None and self.ours is not None
        try:
            fd = as_process(
                self.theirs, self.ours, lambda: self._resolve(path, again_flags(flags, block=block))
            )
        except PermissionError as error:
            raise RestoreConflict(
                f"{what} is not the file it was at the dump, and the process (user {self.theirs.fsuid}) may not "
                "open this one by itself",
                hint="bring back the file of the dump, or one with its owner, group and permissions",
                path=path,
            ) from error
        _same_or_raise(fd, there, path)
        if not block:
            set_status(fd, flags)
        return fd


def has_more_rights(ours: Credentials, theirs: Credentials) -> bool:
    """Could we open what the process could not?"""
    return (
        (ours.fsuid, ours.fsgid) != (theirs.fsuid, theirs.fsgid)
        or bool(set(ours.groups) - {*theirs.groups, theirs.fsgid})
        or bool(ours.effective & ~theirs.effective)
    )


def is_recorded(there: os.stat_result, recorded: FileIdentity) -> bool:
    """The file of the dump, or one with its owner, group and permissions.

    The number of a removed file is given to the next one, perhaps somebody else's: the owner must be the same, too.
    """
    device = (os.major(there.st_dev), os.minor(there.st_dev))
    same_inode = (device, there.st_ino) == (recorded.dev, recorded.inode)
    if recorded.uid is None:
        return same_inode
    owner = (there.st_uid, there.st_gid, stat.S_IMODE(there.st_mode))
    return owner == (recorded.uid, recorded.gid, recorded.mode) or (
        same_inode and there.st_uid == recorded.uid
    )


def as_process(theirs: Credentials, ours: Credentials, action: Callable[[], T]) -> T:
    """Run `action` in a thread of ours that has the rights of the process, and no more, on files.

    Raises:
        PermissionError: we may not take its place; whatever `action` raises.
    """
    dumpable = prctl.prctl(prctl.PR_GET_DUMPABLE)
    try:
        return _in_thread(lambda: _become(theirs, ours), action)
    finally:
        # a thread's change of user makes the whole process undumpable
        if dumpable in (0, 1):
            prctl.prctl(prctl.PR_SET_DUMPABLE, dumpable)


def in_directory(fd: int, action: Callable[[], T]) -> T:
    """Run `action` in a thread of ours whose working directory is `fd`: the process has but one."""

    def go() -> None:
        syscall(Nr.UNSHARE, _CLONE_FS, name="unshare")
        os.fchdir(fd)

    return _in_thread(go, action)


def _in_thread(prepare: Callable[[], None], action: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            prepare()
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="as-process")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _become(theirs: Credentials, ours: Credentials) -> None:
    """For the calling thread only: raw system calls, where the C library's would change all threads."""
    if theirs.groups != ours.groups:
        groups = struct.pack(f"={len(theirs.groups)}I", *theirs.groups) if theirs.groups else 0
        syscall(Nr.SETGROUPS, len(theirs.groups), groups, name="setgroups")
    for nr, wanted, name in (
        (Nr.SETFSGID, theirs.fsgid, "setfsgid"),
        (Nr.SETFSUID, theirs.fsuid, "setfsuid"),
    ):
        syscall(nr, wanted, name=name)  # tells no error
        if syscall(nr, _NO_ID, name=name) != wanted:
            raise PermissionError(errno.EPERM, f"{name}({wanted}) is not allowed")
    kept = theirs.effective & ours.permitted
    syscall(Nr.CAPSET, cap.pack_header(), cap.pack_data(kept, kept, 0), name="capset")


def _same_or_raise(fd: int, there: os.stat_result, path: str) -> int:
    found = os.fstat(fd)
    if (found.st_dev, found.st_ino) == (there.st_dev, there.st_ino):
        return fd
    os.close(fd)
    raise RestoreConflict(f"{path} was replaced while it was being opened", path=path)


def again_flags(flags: int, *, block: bool = True) -> int:
    """Flags for an open(2) that gives back the status flags of an image."""
    wanted = flags & ~_NOT_AGAIN | os.O_CLOEXEC | os.O_NOCTTY
    if flags & _TMPFILE_BIT:
        wanted &= ~os.O_TMPFILE
    return wanted if block else wanted & ~os.O_DIRECT | os.O_NONBLOCK


def open_own(path: str, flags: int, *, what: str, block: bool = True) -> int:
    """open(2) of a path that we chose ourselves (below /proc/self/fd, a holder's /proc/PID/fd, /dev/null).

    Args:
        what: the description and its path, for the error.
        block: as for `Opener.open`.

    Raises:
        RestoreConflict: it cannot be opened.
    """
    fd = -1
    try:
        fd = os.open(path, again_flags(flags, block=block))
        if not block:
            set_status(fd, flags)
    except OSError as error:
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
        raise RestoreConflict(
            f"{what} cannot be opened: {error.strerror}", hint=_PUT_BACK, path=path
        ) from error
    return fd


def reopen(fd: int, flags: int, *, what: str, block: bool = True) -> int:
    """A new description of what our descriptor `fd` has open."""
    return open_own(own_path(fd), flags & ~os.O_NOFOLLOW, what=what, block=block)


def own_path(fd: int) -> str:
    """A path that leads to what our descriptor has open, and nowhere else."""
    return f"/proc/self/fd/{fd}"


def set_status(fd: int, flags: int) -> None:
    """F_SETFL, except O_ASYNC, which belongs to a descriptor of the target."""
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & _SETTABLE)
