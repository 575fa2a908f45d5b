# SPDX-License-Identifier: Apache-2.0
"""State out: the keyrings of the main thread; keys live in the kernel and do not come back.

The session keyring is looked for by the name that anonymous ones have (those of logins and of services): asking for it
by KEY_SPEC_SESSION_KEYRING would give the process one, that of its user, where it has none.  One that was joined by
a name of its own is not seen.

Where keyctl(2) may not be used (containers) there is nothing to be told.

Source: keyctl(2), keyrings(7), Linux security/keys/process_keys.c (lookup_user_key).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from checkpointd.linux import keys
from checkpointd.linux.arch import Nr
from checkpointd.state.process import SessionKeyring
from checkpointd.target.remote import Call, Remote

_MAX_KEYS = 64
_DESCRIPTION_BYTES = 256


@dataclass(frozen=True, slots=True)
class Keyrings:
    """What was found; `session` is None where it cannot be told."""

    session: SessionKeyring | None
    warnings: tuple[str, ...]


def keyring_calls(remote: Remote) -> list[Call]:
    """To be made in a batch; their results are for `judge_keyrings`."""
    names_at = remote.put(keys.KEYRING + keys.SESSION_NAME)
    return [
        Call(Nr.KEYCTL, (keys.KEYCTL_GET_KEYRING_ID, keys.KEY_SPEC_THREAD_KEYRING, 0)),
        Call(Nr.KEYCTL, (keys.KEYCTL_GET_KEYRING_ID, keys.KEY_SPEC_PROCESS_KEYRING, 0)),
        Call(Nr.REQUEST_KEY, (names_at, names_at + len(keys.KEYRING), 0, 0)),
    ]


def judge_keyrings(remote: Remote, results: Sequence[int]) -> Keyrings:
    """Which keyrings there are, and whether keys are lost with them.

    Args:
        results: of `keyring_calls`.
    """
    thread, process, session = results
    warnings = []
    for serial, word in ((thread, "thread"), (process, "process")):
        if serial > 0 and (held := _keys_of(remote, serial)):
            warnings.append(f"{len(held)} key(s) of its {word} keyring are not restored")
    if session == -errno.ENOKEY:
        # the kernel looks in that of its user then, which one of its own would hide
        return Keyrings(SessionKeyring(0, has_user_keyring=True), tuple(warnings))
    if session <= 0:
        return Keyrings(None, tuple(warnings))
    descriptions = _describe(remote, _keys_of(remote, session))
    # logins and services link the keyring of their user there
    others = [one for one in descriptions if not (one.startswith(b"keyring;") and b";_uid." in one)]
    if others:
        lost = "come back only where the service is of the same session"
        if session != keys.own_session_keyring():
            lost = "are not restored: it gets an empty one of its own"
        warnings.append(f"{len(others)} key(s) of its session keyring {lost}")
    return Keyrings(SessionKeyring(session, len(others) < len(descriptions)), tuple(warnings))


def _keys_of(remote: Remote, keyring: int) -> tuple[int, ...]:
    """Serial numbers of what is linked there; none when it may not be read."""
    at = remote.alloc(_MAX_KEYS * keys.SERIAL_BYTES)
    args = (keys.KEYCTL_READ, keyring, at, _MAX_KEYS * keys.SERIAL_BYTES)
    nr = min(max(0, remote.batch([Call(Nr.KEYCTL, args)])[0]) // keys.SERIAL_BYTES, _MAX_KEYS)
    return struct.unpack(f"={nr}i", remote.read(at, nr * keys.SERIAL_BYTES)) if nr else ()


def _describe(remote: Remote, serials: Sequence[int]) -> list[bytes]:
    if not serials:
        return []
    at = remote.alloc(len(serials) * _DESCRIPTION_BYTES)
    remote.batch(
        [
            Call(Nr.KEYCTL, (keys.KEYCTL_DESCRIBE, serial, at + n * _DESCRIPTION_BYTES, _DESCRIPTION_BYTES))
            for n, serial in enumerate(serials)
        ]
    )
    text = remote.read(at, len(serials) * _DESCRIPTION_BYTES)
    return [
        text[n : n + _DESCRIPTION_BYTES].partition(b"\0")[0] for n in range(0, len(text), _DESCRIPTION_BYTES)
    ]
