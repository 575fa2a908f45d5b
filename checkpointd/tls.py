# SPDX-License-Identifier: Apache-2.0
"""Files of mutual TLS, looked at before gRPC gets them: it does not say which one is wrong, nor why."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpointd.errors import UsageError

_CHECK_OPTIONS = "check the --tls-... options"
_MISMATCHES = (
    "KEY_VALUES_MISMATCH",
    "KEY_TYPE_MISMATCH",
    "NO_CERTIFICATE_ASSIGNED",  # none for a key of this kind
)


@dataclass(frozen=True)
class Pems:
    """What the files hold."""

    certificate: bytes
    key: bytes
    authority: bytes


def read_files(certificate: Path, key: Path, authority: Path) -> Pems:
    """Read our certificate, its key and the authority of the other side's certificates.

    Raises:
        UsageError: one cannot be read, is not PEM, or the key is not the certificate's.
    """
    found = Pems(_read(certificate), _read(key), _read(authority))
    for path, pem in ((certificate, found.certificate), (authority, found.authority)):
        try:
            trust(_context(), pem)
        except (ssl.SSLError, ValueError) as error:
            raise UsageError(
                f"{path} holds no certificate in PEM form",
                hint=f"it has to have a line -----BEGIN CERTIFICATE-----: {_CHECK_OPTIONS}",
            ) from error
    try:
        identify(_context(), found)
    except _LockedError:
        raise UsageError(
            f"the key {key} is locked with a password",
            hint=f"give one that is not: openssl pkey -in {key} -out FILE",
        ) from None
    except ssl.SSLError as error:
        if error.reason in _MISMATCHES:
            raise UsageError(
                f"the key {key} does not fit the certificate {certificate}",
                hint=f"give the key that the certificate was made for: {_CHECK_OPTIONS}",
            ) from error
        raise UsageError(
            f"{key} holds no private key in PEM form",
            hint=f"it has to have a line -----BEGIN PRIVATE KEY-----: {_CHECK_OPTIONS}",
        ) from error
    return found


def trust(context: ssl.SSLContext, authority: bytes) -> None:
    """Take certificates that the authority signed."""
    context.load_verify_locations(cadata=authority.decode("ascii", errors="ignore"))


def identify(context: ssl.SSLContext, ours: Pems) -> None:
    """Show our certificate to the other side."""

    def locked() -> str:
        raise _LockedError

    with _file_of(ours.certificate) as certificate, _file_of(ours.key) as key:
        context.load_cert_chain(certificate, key, password=locked)


class _LockedError(Exception):
    """A password was asked for."""


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # whether a key is long enough is gRPC's to judge
    return context


@contextlib.contextmanager
def _file_of(pem: bytes) -> Iterator[str]:
    """A file for the library, which takes names only: what was read may have been a pipe."""
    fd = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(fd, pem)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint=_CHECK_OPTIONS) from error
