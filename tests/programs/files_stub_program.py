# SPDX-License-Identifier: Apache-2.0
"""Does what it is told over a socket: run Python, make raw system calls, write its own memory.

usage: files_stub_program.py CONTROL_FD [empty]   (`empty`: hold no other descriptor)
Messages are pickles, each with its length in front.
"""

import ctypes
import fcntl  # noqa: F401  some are for the code we are told to run
import os
import pickle
import resource
import select  # noqa: F401
import signal  # noqa: F401
import socket
import struct
import sys
import time  # noqa: F401
import traceback

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
arena = ctypes.create_string_buffer(1 << 20)


def raw_call(nr, args, results):
    words = [results[arg[1]] if isinstance(arg, tuple) else arg for arg in args]
    words += [0] * (6 - len(words))
    result = libc.syscall(ctypes.c_long(nr), *[ctypes.c_ulong(word & (2**64 - 1)) for word in words])
    return -ctypes.get_errno() if result == -1 else result


def answer(request, space):
    what, *args = request
    if what == "arena":
        return ctypes.addressof(arena), len(arena)
    if what == "batch":
        results = []
        for nr, call_args in args[0]:
            results.append(raw_call(nr, call_args, results))
        return results
    if what == "write":
        ctypes.memmove(args[0], args[1], len(args[1]))
        return None
    if what == "read":
        return ctypes.string_at(args[0], args[1])
    if what == "exec":
        exec(args[0], space)
        return None
    return eval(args[0], space)


def main():
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    control = soft - 1
    os.dup2(int(sys.argv[1]), control, inheritable=False)
    os.close(int(sys.argv[1]))
    if sys.argv[2:] == ["empty"]:
        os.closerange(0, control)
    link = socket.socket(fileno=control)
    space = dict(globals())
    while True:
        head = link.recv(4, socket.MSG_WAITALL)
        if len(head) < 4:
            return
        body = link.recv(struct.unpack("I", head)[0], socket.MSG_WAITALL)
        try:
            reply = (True, answer(pickle.loads(body), space))
        except BaseException:
            reply = (False, traceback.format_exc())
        raw = pickle.dumps(reply)
        link.sendall(struct.pack("I", len(raw)) + raw)


main()
