# SPDX-License-Identifier: Apache-2.0
"""Holds every kind of file open, and when told to checks that each still works as it was left.

usage: files_everything_program.py DIRECTORY
DIRECTORY has two FIFOs.  A line written to `commands` is answered by one line in `answers`: `ping` by "pong PID",
`check` by "fine" or what is wrong.  `check` uses everything up.
"""

import array
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import threading
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
wrong = []


def expect(what, got, wanted):
    if got != wanted:
        wrong.append(f"{what}: {got!r}, not {wanted!r}")


def settime(fd, flags, value_ns, interval_ns):
    spec = (ctypes.c_int64 * 4)(*divmod(interval_ns, 10**9), *divmod(value_ns, 10**9))
    assert libc.timerfd_settime(fd, flags, spec, None) == 0


class Everything:
    def __init__(self, where):
        os.chdir(where)
        self.log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(self.log, b"begin\n")
        self.data = os.open("data", os.O_RDWR | os.O_CREAT)
        os.write(self.data, bytes(range(100)))
        os.lseek(self.data, 10, os.SEEK_SET)
        self.twin = os.dup(self.data)
        self.gone = os.open("gone", os.O_RDWR | os.O_CREAT)
        os.write(self.gone, b"still here" + bytes(2 << 20) + b"the end")
        os.unlink("gone")
        self.directory = os.open(".", os.O_RDONLY)
        self.null, self.zero = os.open("/dev/null", os.O_WRONLY), os.open("/dev/zero", os.O_RDONLY)
        self.pipe = os.pipe()
        os.write(self.pipe[1], b"in the pipe")
        self.event = os.eventfd(3, os.EFD_SEMAPHORE)
        self.timer = libc.timerfd_create(1, os.O_NONBLOCK)
        settime(self.timer, 0, 10**6, 10**7)
        self.far_timer = libc.timerfd_create(1, 0)
        settime(self.far_timer, 0, 5000 * 10**9, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        self.signals = libc.signalfd(-1, struct.pack("Q", 1 << signal.SIGUSR1 - 1), 0)
        os.mkdir("watched")
        self.notify = libc.inotify_init1(0)
        self.watch = libc.inotify_add_watch(self.notify, b"watched", 0x100)
        self.box = os.memfd_create("box", os.MFD_ALLOW_SEALING)
        os.write(self.box, b"sealed")
        fcntl.fcntl(self.box, 1033, 2 | 4 | 8)
        self.tcp = socket.create_server(("127.0.0.1", 0), backlog=20)
        self.port = self.tcp.getsockname()[1]
        self.tcp6 = socket.create_server(("::1", 0), family=socket.AF_INET6)
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind("unix.sock")
        self.unix.listen(5)
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.pair = socket.socketpair()
        self.pair[0].sendall(b"in the socket")
        self.epoll = select.epoll()
        for one in (self.pipe[0], self.event, self.tcp.fileno(), self.unix.fileno(), self.udp.fileno()):
            self.epoll.register(one, select.EPOLLIN)
        self.lock = os.open("lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.self = os.pidfd_open(os.getpid())
        self.blocked = os.pipe()
        self.heard = []
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()

    def listen(self):
        """A thread that waits in read(2) all the time."""
        while piece := os.read(self.blocked[0], 100):
            self.heard.append(piece)

    def check(self):
        os.write(self.log, b"end\n")
        with open("log", "rb") as log:
            expect("log", log.read().splitlines()[-1], b"end")
        expect("offset", os.read(self.data, 3), bytes([10, 11, 12]))
        expect("shared offset", os.read(self.twin, 1), bytes([13]))
        expect("deleted file", os.pread(self.gone, 10, 0), b"still here")
        expect("end of the deleted file", os.pread(self.gone, 100, 10 + (2 << 20)), b"the end")
        expect("directory", "watched" in os.listdir(self.directory), True)
        expect("null", os.write(self.null, b"x"), 1)
        expect("zero", os.read(self.zero, 2), b"\0\0")
        ready = {fd for fd, _ in self.epoll.poll(0)}
        expect("epoll", ready, {self.pipe[0], self.event})
        expect("pipe", os.read(self.pipe[0], 100), b"in the pipe")
        expect("eventfd", [os.eventfd_read(self.event) for _ in range(3)], [1, 1, 1])
        expect("quiet epoll", self.epoll.poll(0), [])
        expect("timer", os.read(self.timer, 8) > bytes(8), True)
        left = (ctypes.c_int64 * 4)()
        libc.timerfd_gettime(self.far_timer, left)
        expect("far timer", 4000 < left[2] < 5000, True)
        os.kill(os.getpid(), signal.SIGUSR1)
        expect("signalfd", os.read(self.signals, 128)[:4], struct.pack("I", signal.SIGUSR1))
        os.mkdir("watched/new")
        expect("inotify", struct.unpack_from("i", os.read(self.notify, 1000))[0], self.watch)
        expect("memfd", os.pread(self.box, 10, 0), b"sealed")
        expect("seals", fcntl.fcntl(self.box, 1034), 2 | 4 | 8)
        self.check_sockets()
        with open("lock", "rb+") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                wrong.append("the lock was lost")
            except BlockingIOError:
                pass
        expect("pidfd", f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{self.self}").read_text(), True)
        os.write(self.blocked[1], b"wake up")
        os.close(self.blocked[1])
        self.listener.join(20)
        expect("blocked reader", self.heard, [b"wake up"])

    def check_sockets(self):
        expect("socketpair", self.pair[1].recv(100), b"in the socket")
        for server, address in (
            (self.tcp, ("127.0.0.1", self.port)),
            (self.tcp6, self.tcp6.getsockname()[:2]),
            (self.unix, "unix.sock"),
        ):
            with socket.socket(server.family) as client:
                client.settimeout(10)
                client.connect(address)
                accepted, _ = server.accept()
                with accepted:
                    accepted.sendall(b"hello")
                    expect(f"accepted at {address}", client.recv(10), b"hello")
                if server is self.unix:
                    pid = array.array("i", client.getsockopt(1, socket.SO_PEERCRED, 12))[0]
                    expect("SO_PEERCRED", pid, os.getpid())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"datagram", self.udp.getsockname())
        expect("udp", self.udp.recv(100), b"datagram")


def main():
    everything = Everything(sys.argv[1])
    commands, answers = (os.open(name, os.O_RDWR) for name in ("commands", "answers"))
    os.write(answers, b"ready\n")
    with open(commands, "rb", buffering=0) as lines:
        while True:
            word = lines.readline().strip()
            if word == b"ping":
                os.write(answers, b"pong %d\n" % os.getpid())
            elif word == b"check":
                try:
                    everything.check()
                except Exception as error:
                    wrong.append(repr(error))
                os.write(answers, ("; ".join(wrong) or "fine").encode() + b"\n")


main()
