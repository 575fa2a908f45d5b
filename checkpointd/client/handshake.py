# SPDX-License-Identifier: Apache-2.0
"""Why no call reaches a service on TCP.

gRPC says "Socket closed" of a certificate that was refused: we look again with the same certificates, and our own eyes.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from checkpointd.errors import CheckpointError, NotPermitted, ServiceUnreachable
from checkpointd.location import checked_address
from checkpointd.tls import Pems, identify, trust

TIMEOUT_S = 5.0

_OF_ANOTHER_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
# alerts, as OpenSSL names them
_OF_OUR_CERTIFICATE = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")
_OF_ANOTHER_TIME = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED


def explain(address: str, ours: Pems, certificate: Path, authority: Path) -> CheckpointError | None:
    """The error that fits what we meet at "HOST:PORT"; None when there is nothing to see.

    Args:
        certificate, authority: the files of `ours`, by name.
    """
    host, port = checked_address(address, "--connect")
    try:
        connection = socket.create_connection((host, port), TIMEOUT_S)
    except OSError as error:
        return ServiceUnreachable(
            f"no service answers at {address}: {error.strerror or error}",
            hint="start it there with `checkpointd --listen`, or give another --connect",
        )
    refused = f"the service at {address} does not accept the certificate {certificate}"
    done = False
    with connection:
        try:
            with _context(ours).wrap_socket(connection, server_hostname=host) as secure:
                done = True
                if secure.recv(1):  # its settings: it takes us
                    return None
        except ssl.SSLCertVerificationError as error:
            return _not_trusted(address, host, authority, error)
        except TimeoutError:
            return None
        except ssl.SSLError as error:
            if error.reason == "WRONG_VERSION_NUMBER":
                return ServiceUnreachable(
                    f"what answers at {address} does not speak TLS", hint="give another --connect"
                )
            if not any(alert in (error.reason or "") for alert in _OF_OUR_CERTIFICATE):
                return None
            done = True
        except OSError:
            pass
        else:
            refused = (
                f"the service at {address} closed the connection: "
                f"it seems not to accept the certificate {certificate}"
            )
    if not done:  # somebody between us and it, or it is just ending
        return None
    return NotPermitted(
        refused,
        hint="give one with --tls-cert that is valid now and that the authority of its --tls-client-ca signed",
    )


def _context(ours: Pems) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    trust(context, ours.authority)
    identify(context, ours)
    return context


def _not_trusted(
    address: str, host: str, authority: Path, error: ssl.SSLCertVerificationError
) -> NotPermitted:
    if error.verify_code in _OF_ANOTHER_NAME:
        return NotPermitted(
            f"the certificate of the service at {address} is not for {host}",
            hint="--connect by a name that it carries, or give the service one that carries this name",
        )
    if error.verify_code in _OF_ANOTHER_TIME:
        return NotPermitted(
            f"the certificate of the service at {address} is not valid now: {error.verify_message}",
            hint="look at both clocks, or give the service a new certificate",
        )
    return NotPermitted(
        f"the certificate of the service at {address} is not of the authority {authority}: "
        f"{error.verify_message}",
        hint="give the authority that signed it with --tls-ca",
    )
