# SPDX-License-Identifier: Apache-2.0
"""State in: the watches of epoll instances.  The target adds them: they remember the number by which it does.

A watch with EPOLLONESHOT that has fired is left without any event, which nobody can ask for: EPOLL_CTL_ADD and
EPOLL_CTL_MOD always add EPOLLERR and EPOLLHUP.  So it has to fire again.  Those are added first, asking for anything,
and what is ready is taken from the instance before it gets the others.  Timers are made to expire and empty pipes given
a byte for the moment, sockets begin to listen afterwards; what still has nothing to tell is warned of.

Raises RestoreConflict.

Source: epoll_ctl(2), Linux fs/eventpoll.c (do_epoll_ctl, ep_send_events), net/ipv4/tcp.c (tcp_poll),
net/unix/af_unix.c (unix_poll).
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
from collections.abc import Iterator, Sequence

from checkpointd.linux import fcntl as fdcalls
from checkpointd.procfs import fdinfo
from checkpointd.restore.files_kinds import set_time
from checkpointd.restore.files_maker import BATCH_CALLS, Maker, run_exactly
from checkpointd.state.files import EPOLL_PRIVATE_BITS, Epoll, EpollWatch, PipeEnd, TimerFd
from checkpointd.target.remote import Call, Remote

_EPOLL_CTL_ADD, _EPOLL_CTL_MOD = 1, 3
_EPOLL_EVENT = struct.Struct("=IQ")  # packed on x86-64
_ANYTHING = (
    select.EPOLLIN | select.EPOLLPRI | select.EPOLLOUT | select.EPOLLRDHUP
    | select.EPOLLRDNORM | select.EPOLLRDBAND | select.EPOLLWRNORM | select.EPOLLWRBAND
)  # fmt: skip
_EXPIRY_LIMIT_MS = 1000

_Watch = tuple[int, EpollWatch]
"""Index of the instance's description, and what it watches."""


def add_watches(remote: Remote, maker: Maker) -> None:
    """Give all instances their watches, by epoll_ctl(2) in the target."""
    watches = [
        (index, watch)
        for index, one in enumerate(maker.state.descriptions)
        if isinstance(one, Epoll)
        for watch in one.watches
    ]
    if maker.spent:
        _spend(remote, maker, [one for one in watches if one[1].is_spent])
    armed = [one for one in watches if not one[1].is_spent]
    _control(remote, maker, _EPOLL_CTL_ADD, armed)


def _spend(remote: Remote, maker: Maker, watches: Sequence[_Watch]) -> None:
    _control(remote, maker, _EPOLL_CTL_ADD, watches, or_events=_ANYTHING)
    _fire(maker, watches)
    left = _still_armed(maker, watches)
    if left:
        description = {one.fd: one.description for one in maker.state.descriptors}
        for one in sorted({description[watch.fd] for _, watch in left}):
            with _made_ready(maker, one):
                _fire(maker, [found for found in left if description[found[1].fd] == one])
        left = _still_armed(maker, left)
    _control(remote, maker, _EPOLL_CTL_MOD, left)
    for index, watch in left:
        maker.warnings.append(
            f"{maker.name(index)} (epoll): the watch of fd {watch.fd}, which has fired (EPOLLONESHOT), will tell of an "
            "error or hang-up all the same"
        )


def _control(
    remote: Remote, maker: Maker, operation: int, watches: Sequence[_Watch], *, or_events: int = 0
) -> None:
    for start in range(0, len(watches), BATCH_CALLS):
        some = watches[start : start + BATCH_CALLS]
        events = (_EPOLL_EVENT.pack(watch.events | or_events, watch.data) for _, watch in some)
        address = remote.put(b"".join(events))
        calls = [
            Call(
                fdcalls.NR_EPOLL_CTL,
                (maker.descriptors(index)[0].fd, operation, watch.fd, address + nth * _EPOLL_EVENT.size),
            )
            for nth, (index, watch) in enumerate(some)
        ]
        run_exactly(remote, [(call, 0) for call in calls], "the epoll watches")


def _fire(maker: Maker, watches: Sequence[_Watch]) -> None:
    """Take what is ready from the instances of these watches."""
    for index in {index for index, _ in watches}:
        with contextlib.closing(select.epoll.fromfd(os.dup(maker.local[index]))) as instance:
            while instance.poll(0):
                pass


def _still_armed(maker: Maker, watches: Sequence[_Watch]) -> list[_Watch]:
    armed = set()
    for index in {index for index, _ in watches}:
        entries = fdinfo.parse(fdinfo.read(os.getpid(), maker.local[index])).epoll
        armed |= {(index, entry.fd) for entry in entries if entry.events & ~EPOLL_PRIVATE_BITS}
    return [one for one in watches if (one[0], one[1].fd) in armed]


@contextlib.contextmanager
def _made_ready(maker: Maker, index: int) -> Iterator[None]:
    """Give a description something to tell, if that harms nobody, and take it away again."""
    one, fd = maker.state.descriptions[index], maker.local[index]
    if isinstance(one, TimerFd):
        fdcalls.timerfd_settime(fd, 0, 1, 0)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(_EXPIRY_LIMIT_MS)
        yield
        set_time(maker, index, one, fd)
    elif isinstance(one, PipeEnd) and (writer := _writer(maker, one)) is not None:
        os.write(writer, b"\0")
        yield
        os.read(fd, 1)
    else:
        yield


def _writer(maker: Maker, reader: PipeEnd) -> int | None:
    """An end by which we can write to an empty pipe that nobody else has."""
    pipe = maker.state.pipes[reader.pipe]
    if pipe.external or pipe.path or pipe.content or reader.flags & os.O_ACCMODE == os.O_WRONLY:
        return None
    for index, one in enumerate(maker.state.descriptions):
        if isinstance(one, PipeEnd) and one.pipe == reader.pipe and one.flags & os.O_ACCMODE != os.O_RDONLY:
            return maker.local[index]
    return None
