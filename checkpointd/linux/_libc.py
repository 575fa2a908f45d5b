# SPDX-License-Identifier: Apache-2.0
"""The one door to raw system calls: ctypes is set up here, once.

`syscall(nr, *args)` takes ints (negative ones as two's complement) or writable buffers (bytearray, numpy array,
ctypes object: their address is passed) and returns the result as an int.  `bytes` may be passed where the kernel only
reads.  Failures raise OSError(errno, "NAME: text") where NAME names the system call.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

_lib = ctypes.CDLL(None, use_errno=True)
_raw = _lib.syscall
_raw.restype = ctypes.c_long
# every argument as a full 64-bit word: a plain Python int would be passed as a 32-bit int
_raw.argtypes = (ctypes.c_long, *[ctypes.c_ulong] * 6)
_ZEROES = tuple((0,) * (6 - nr) for nr in range(7))


def address_of(buffer: Any) -> int:
    """The address of a buffer's first byte; the caller keeps the buffer alive while the kernel may use it.

    Args:
        buffer: bytes, a writable contiguous buffer, a numpy array, or a ctypes object.
    """
    if isinstance(buffer, bytearray):
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    if isinstance(buffer, bytes):
        return ctypes.cast(ctypes.c_char_p(buffer), ctypes.c_void_p).value or 0
    interface = getattr(buffer, "ctypes", None)  # a numpy array, also a read-only one
    if interface is not None:
        return int(interface.data)
    if isinstance(buffer, (ctypes.Structure, ctypes.Array, ctypes._SimpleCData)):
        return ctypes.addressof(buffer)
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def syscall(nr: int, *args: Any, name: str = "") -> int:
    """Make a system call.

    Args:
        nr: its x86-64 number.
        args: up to six ints or buffers.
        name: for the error text.

    Raises:
        OSError: the call failed.
    """
    words = [arg if isinstance(arg, int) else 0 if arg is None else address_of(arg) for arg in args]
    result: int = _raw(nr, *words, *_ZEROES[len(words)])
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name or f'syscall {nr}'}: {os.strerror(number)}")
    return result
