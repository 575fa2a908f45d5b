# SPDX-License-Identifier: Apache-2.0
"""Calling machine code of ours in our own process.

For the few things that neither Python nor a library can do: a clone whose child makes prepared calls (linux/clone.py),
a library function for each of many pages without a step of Python for each (image/xxh3.py).  The code is assembled
beforehand and lies in the `blobs` beside its source.

Raises OSError where the kernel or a security module (SELinux execmem, systemd's MemoryDenyWriteExecute=) gives no
executable memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os

MAX_ARGS = 6
_PADDING = tuple((0,) * (MAX_ARGS - nr) for nr in range(MAX_ARGS + 1))
_libc = ctypes.CDLL(None, use_errno=True)


class NativeFunction:
    """Machine code in executable memory of ours: a C function of up to six longs, called without the GIL."""

    def __init__(self, code: bytes) -> None:
        size = -(-len(code) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._area.write(code)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._area))
        # never writable and executable at once: it stays for as long as we run
        if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_EXEC):
            number = ctypes.get_errno()
            raise OSError(number, f"mprotect: {os.strerror(number)}")
        self._function = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_ulong] * MAX_ARGS)(address)

    def __call__(self, *args: int) -> int:
        # c_ulong takes the low 64 bits of any number
        return int(self._function(*args, *_PADDING[len(args)]))
