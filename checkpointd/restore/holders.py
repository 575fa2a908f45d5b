# SPDX-License-Identifier: Apache-2.0
"""Who has a pipe, socket or port now: found by walking /proc, which only a restore with a question pays for."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from checkpointd.linux.socket import TCP_ESTABLISHED, UnixDiag


@dataclass(frozen=True, slots=True)
class Holder:
    """A descriptor of some process."""

    pid: int
    fd: int

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.fd}"


def find_holders(links: set[str], *, not_in: set[int]) -> dict[str, Holder]:
    """One holder of each link (`pipe:[1]`, `socket:[2]`) as far as we may see them."""
    found: dict[str, Holder] = {}
    if not links:
        return found
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in not_in:
            continue
        try:
            fds = os.listdir(f"/proc/{name}/fd")
        except OSError:
            continue
        for fd in fds:
            try:
                link = os.readlink(f"/proc/{name}/fd/{fd}")
            except OSError:
                continue
            if link in links and link not in found:
                found[link] = Holder(int(name), int(fd))
                if len(found) == len(links):
                    return found
    return found


def describe(pid: int) -> str:
    """`process 12 (redis-server)`."""
    try:
        comm = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({comm})"


def describe_socket(inodes: list[int]) -> str:
    """The process that has one of these sockets, or "another process"."""
    holders = find_holders({f"socket:[{inode}]" for inode in inodes if inode}, not_in=set())
    return describe(min(holder.pid for holder in holders.values())) if holders else "another process"


def port_inodes(table: bytes, port: int) -> list[int]:
    """Sockets bound to a local port, in a table like /proc/net/tcp.  Source: proc_net_tcp(5)."""
    inodes = []
    for line in table.decode("ascii", "replace").splitlines()[1:]:
        words = line.split()
        if len(words) > 9 and int(words[1].rpartition(":")[2], 16) == port and words[9] != "0":
            inodes.append(int(words[9]))
    return inodes


def port_holder(kind: int, port: int) -> str:
    """Who is bound to the TCP (SOCK_STREAM) or UDP port."""
    name = "tcp" if kind == socket.SOCK_STREAM else "udp"
    inodes: list[int] = []
    for table in (f"/proc/net/{name}", f"/proc/net/{name}6"):
        try:
            inodes += port_inodes(Path(table).read_bytes(), port)
        except OSError:
            continue
    return describe_socket(inodes)


_DATAGRAM = b"0002"  # as /proc/net/unix has it


def unix_name_inode(table: bytes, name: bytes) -> int:
    """The socket bound to a name (abstract ones begin with a zero byte), 0 if none is.

    Connections accepted from a listener carry its name too and do not count; connected datagram sockets do.
    Source: unix(7), proc_net(5).
    """
    shown = name.replace(b"\0", b"@") if name.startswith(b"\0") else name
    for line in table.splitlines()[1:]:
        words = line.split(None, 7)
        # Num RefCount Protocol Flags Type St Inode Path; state 03 is connected, flag 0x10000 listening
        if len(words) < 8 or words[7] != shown:
            continue
        is_accepted = words[5] == b"03" and not int(words[3], 16) & 0x10000 and words[4] != _DATAGRAM
        if not is_accepted:
            return int(words[6])
    return 0


def unix_name_holder(name: bytes) -> str | None:
    """Who is bound to the UNIX name, None if nobody."""
    inode = unix_name_inode(Path("/proc/net/unix").read_bytes(), name)
    return describe_socket([inode]) if inode else None


def unix_file_holder(there: os.stat_result) -> str | None:
    """Who is bound to this socket file, None if nobody."""
    with UnixDiag() as diag:
        bound = [
            one.inode
            for one in diag.dump()
            # connections accepted from a listener carry its file too, even when their peer is gone
            if one.file == (kernel_device(there.st_dev), there.st_ino)
            and not (one.state == TCP_ESTABLISHED and one.type != socket.SOCK_DGRAM)
        ]
    return describe_socket(bound) if bound else None


def kernel_device(device: int) -> int:
    """A device number as the kernel counts it (major << 20 | minor)."""
    return os.major(device) << 20 | os.minor(device)


def lock_holder(table: bytes, device: tuple[int, int], inode: int, kind: str) -> int | None:
    """Pid that holds a lock of this kind (FLOCK, POSIX, OFDLCK) on a file, from /proc/locks; None if nobody."""
    wanted = f"{device[0]:02x}:{device[1]:02x}:{inode}"
    for line in table.decode("ascii", "replace").splitlines():
        words = line.split()
        if len(words) >= 8 and "->" not in words[1] and words[1] == kind and words[5] == wanted:
            return int(words[4])
    return None


def sockaddr_text(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
