# SPDX-License-Identifier: Apache-2.0
"""The command `checkpointd`."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpointd import location
from checkpointd.errors import CheckpointError, UsageError
from checkpointd.version import VERSION

EPILOG = """\
The socket is 0660 in a directory 0750: whoever may open it may save, and so read, every process that this
service may.  TCP is served with mutual TLS only: clients need a certificate of the given authority.

example: checkpointd --socket /run/checkpointd/checkpointd.sock --store /var/lib/checkpointd

exit status: 0 ended as asked, 2 wrong options, 5 not permitted, 11 another service has the socket.
"""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="checkpointd",
        description="Save and restore running processes, incrementally: the service behind `checkpoint`.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"checkpointd {VERSION}")
    found.add_argument(
        "--socket", metavar="PATH", help=f"where to listen (default: {location.default_socket()})"
    )
    found.add_argument(
        "--group", default="", help="group that may use the socket (default: that of the user)"
    )
    found.add_argument(
        "--store", metavar="DIR", help=f"where images go (default: {location.default_store()})"
    )
    found.add_argument("--listen", metavar="HOST:PORT", default="", help="also serve TCP, with mutual TLS")
    found.add_argument("--tls-cert", metavar="FILE", help="certificate of this service (PEM)")
    found.add_argument("--tls-key", metavar="FILE", help="its key (PEM)")
    found.add_argument(
        "--tls-client-ca", metavar="FILE", help="authority that signs the clients' certificates (PEM)"
    )
    found.add_argument(
        "--idle-exit",
        metavar="SECONDS",
        type=float,
        help="end after that long with nothing tracked, no operation and no call",
    )
    found.add_argument("-v", "--verbose", action="count", default=0, help="log more")
    found.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Serve; returns the exit status."""
    arguments = parser().parse_args(argv)
    level = logging.WARNING if arguments.quiet else logging.DEBUG if arguments.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s checkpointd[%(process)d] %(levelname)s %(message)s")
    # Agents are started from many threads; gRPC has nothing to do in a child that execs at once.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.umask(0o077)
    try:
        return _serve(arguments)
    except CheckpointError as error:
        print(f"checkpointd: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return error.exit_code


def _serve(arguments: argparse.Namespace) -> int:
    from checkpointd.service.server import Server, ServerConfig, TlsFiles  # noqa: PLC0415 - after the environment

    names = (arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca)
    if any(names) and not all(names):
        raise UsageError(
            "mutual TLS needs a certificate, a key and the clients' authority",
            hint="give all of --tls-cert, --tls-key and --tls-client-ca",
        )
    config = ServerConfig(
        socket=location.checked_socket_path(arguments.socket or location.default_socket()),
        store=Path(arguments.store).absolute() if arguments.store else location.default_store(),
        group=arguments.group,
        listen=arguments.listen,
        tls=TlsFiles(*map(Path, names)) if all(names) else None,
        idle_exit_s=arguments.idle_exit,
        **_agent_command(),
    )
    Server(config).run()
    return 0


def _agent_command() -> dict[str, list[str]]:
    """$CHECKPOINTD_AGENT names another agent program: for tests, and for running agents under a debugger."""
    given = os.environ.get("CHECKPOINTD_AGENT", "")
    return {"agent_command": shlex.split(given)} if given else {}


if __name__ == "__main__":
    sys.exit(main())
