# SPDX-License-Identifier: Apache-2.0
"""keyctl(2) and request_key(2): numbers, for calls made in another process, and what we have ourselves.

Source: keyctl(2), request_key(2), Linux include/uapi/linux/keyctl.h.
"""

from __future__ import annotations

from checkpointd.linux._libc import syscall
from checkpointd.linux.arch import Nr

KEYCTL_GET_KEYRING_ID, KEYCTL_JOIN_SESSION_KEYRING = 0, 1
KEYCTL_DESCRIBE, KEYCTL_LINK, KEYCTL_READ = 6, 8, 11
KEY_SPEC_THREAD_KEYRING, KEY_SPEC_PROCESS_KEYRING = -1, -2
KEY_SPEC_SESSION_KEYRING, KEY_SPEC_USER_KEYRING = -3, -4
SERIAL_BYTES = 4
KEYRING, SESSION_NAME = b"keyring\0", b"_ses\0"


def own_session_keyring() -> int:
    """Serial number of our anonymous session keyring; 0 for none, or where keys may not be used."""
    try:
        return syscall(Nr.REQUEST_KEY, KEYRING, SESSION_NAME, 0, 0, name="request_key")
    except OSError:
        return 0
