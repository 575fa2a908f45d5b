# SPDX-License-Identifier: Apache-2.0
"""Options that many commands share, and the words they take."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from checkpoint_cli.output import printable_lines, short_id, tell
from checkpointd.errors import UsageError

if TYPE_CHECKING:
    from checkpointd.client.connection import Client

F = TypeVar("F", bound=Callable[..., Any])

BACKENDS = ("auto", "uffd-wp", "precise-soft-dirty", "barrier-soft-dirty", "soft-dirty", "content")

_UNITS_US = {"us": 1, "ms": 1000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000}


if TYPE_CHECKING:
    _ParamType = click.ParamType[int]
else:
    _ParamType = click.ParamType  # generic since click 8.4


class Duration(_ParamType):
    """A time with its unit, as microseconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s|m|h)", str(value).strip())
        if match is None:
            self.fail(
                f"{value!r} is not a time: write a number and its unit, e.g. 200ms, 1.5s, 2m", param, ctx
            )
        microseconds = int(float(match[1]) * _UNITS_US[match[2]])
        if not 0 < microseconds < 1 << 62:
            self.fail(f"{value!r} is not a sensible time", param, ctx)
        return microseconds


DURATION = Duration()


class OptionalDuration(Duration):
    """A time, or 0 for none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return 0 if str(value).strip() == "0" else super().convert(value, param, ctx)


@dataclass(frozen=True)
class Session:
    """How to reach the service and how to talk to the user."""

    json: bool
    quiet: bool
    verbose: int
    socket: str
    timeout_us: int
    connect: str
    tls_cert: str
    tls_key: str
    tls_ca: str

    def client(self, *, start: bool = True) -> Client:
        """Connect; gRPC is imported here and not before."""
        import checkpointd.client  # noqa: PLC0415

        tls = None
        names = (self.tls_cert, self.tls_key, self.tls_ca)
        if any(names):
            if not all(names):
                raise UsageError(
                    "mutual TLS needs a certificate, a key and the service's authority",
                    hint="give all of --tls-cert, --tls-key and --tls-ca",
                )
            if not self.connect:
                raise UsageError(
                    "certificates are for a service on TCP, and none is named",
                    hint="give --connect HOST:PORT too, or leave the --tls-... options out",
                )
            from checkpointd.client.connection import ClientTls  # noqa: PLC0415

            tls = ClientTls(*map(Path, names))
        return checkpointd.client.connect(
            self.socket or None,
            start=start,
            address=self.connect,
            tls=tls,
            timeout_s=self.timeout_us / 1e6 if self.timeout_us else None,
        )

    def say(self, line: str = "") -> None:
        """A line of the result for people, on stdout."""
        if not self.quiet and not self.json:
            click.echo(printable_lines(line))

    def note(self, line: str) -> None:
        """Something worth knowing that is not the result, on stderr."""
        if not self.quiet and not self.json:
            tell(printable_lines(line))


def session_options(function: F) -> F:
    """Adds the options of every command and passes them on as one `session`."""
    options = (
        click.option(
            "--json", "json_", is_flag=True, help="Print the result as JSON (long ones: JSON lines)."
        ),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors and what was asked for."),
        click.option("-v", "--verbose", count=True, help="Print more."),
        click.option(
            "--socket", default="", metavar="PATH", help="Socket of the service.", envvar="CHECKPOINT_SOCKET"
        ),
        click.option("--timeout", "timeout_us", type=DURATION, default=0, help="Give up after that time."),
        click.option("--connect", default="", metavar="HOST:PORT", help="Service on TCP, with mutual TLS."),
        click.option("--tls-cert", default="", metavar="FILE", help="Our certificate, for --connect."),
        click.option("--tls-key", default="", metavar="FILE", help="Its key."),
        click.option("--tls-ca", default="", metavar="FILE", help="Authority of the service's certificate."),
    )

    @functools.wraps(function)
    def wrapper(**values: Any) -> Any:
        names = ("quiet", "verbose", "socket", "timeout_us", "connect", "tls_cert", "tls_key", "tls_ca")
        session = Session(json=values.pop("json_"), **{name: values.pop(name) for name in names})
        if session.connect and _is_from_environment("store"):
            values["store"] = ""  # $CHECKPOINT_STORE is a directory here, not on the service's machine
        return function(session, **values)

    for option in reversed(options):
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]


def _is_from_environment(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.ENVIRONMENT


def store_option(function: F) -> F:
    """Adds --store; the value is absolute, or "" for the service's own."""
    return click.option(
        "--store",
        default="",
        metavar="DIR",
        envvar="CHECKPOINT_STORE",
        callback=lambda _ctx, _param, value: os.path.abspath(value) if value else "",
        help="Store of images (default: the service's).",
    )(function)


def precise_option(function: F) -> F:
    """--precise."""
    return click.option(
        "--precise",
        is_flag=True,
        help="By soft-dirty bits made exact: by the patched kernel, or emulated. An error where neither works.",
    )(function)


def pid_option(function: F) -> F:
    return click.option("-p", "--pid", type=int, required=True, metavar="PID", help="The process.")(function)


def files_options(function: F) -> F:
    """Adds what dump and restore may do about connections to the outside."""
    tcp = click.option(
        "--tcp",
        type=click.Choice(["refuse", "close"]),
        default="refuse",
        help="Established TCP connections: refuse, or close them in the restored process.",
    )
    external = click.option(
        "--external",
        type=click.Choice(["keep", "null", "refuse"]),
        default="keep",
        help="Pipes and sockets to other processes: the same ones, /dev/null, or refuse.",
    )
    return tcp(external(function))


def complete_image(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Ids in the store, for the shell; silent when there is no service."""
    import checkpointd.client  # noqa: PLC0415
    from checkpointd.errors import CheckpointError  # noqa: PLC0415

    words = ["latest"]
    try:
        with checkpointd.client.connect(start=False, timeout_s=2.0) as client:
            images = client.list(store=os.environ.get("CHECKPOINT_STORE", ""))["images"]
            words += [short_id(image["id"]) for image in images]
            words += [f"tag:{image['tag']}" for image in images if image["tag"]]
    except CheckpointError:
        pass
    return [word for word in words if word.startswith(incomplete)]


IMAGE_HELP = (
    "IMAGE is an id, a unique prefix of one (4 digits or more), latest, latest~1 (the one before), tag:NAME or "
    "pid:N (the newest of either)."
)
