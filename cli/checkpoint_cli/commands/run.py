# SPDX-License-Identifier: Apache-2.0
"""`checkpoint run`."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess

import click
from kernel_shim import switch

from checkpoint_cli.options import BACKENDS, Session, precise_option, session_options
from checkpoint_cli.output import tell
from checkpointd.errors import CheckpointError, UsageError


@click.command(
    "run",
    short_help="Run a command and track it from its start.",
    epilog="\b\nexample:\n  checkpoint run -- python3 train.py",
)
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", help="How changes are found.")
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD [ARG]...")
@precise_option
@session_options
def command(session: Session, backend: str, precise: bool, words: tuple[str, ...]) -> int:
    """Run a command and track its memory from its start, so that its first incremental dump is small.

    Exits as the command does (128 + N when signal N killed it).  If it cannot be tracked it runs all the same, and
    stderr says why.  Its pid is printed on stderr; with --json as a JSON line.

    With --precise on a patched kernel precise tracking is on for the command and all its children from the start.
    """
    with session.client() as client:  # before the command starts: nothing to undo when there is no service
        child = _start(words, precise)
        try:
            result = client.track(child.pid, backend=backend, precise=precise)
            if session.json:
                tell(json.dumps({"message_type": "tracked", **result}))
            else:
                session.note(f"checkpoint: pid {child.pid} is tracked by {result['backend']}")
        except CheckpointError as error:
            if child.poll() is None:
                from checkpoint_cli.main import report  # noqa: PLC0415 - main imports this module

                report(error, as_json=session.json)
    status = child.wait()
    return status if status >= 0 else 128 - status


def _start(words: tuple[str, ...], precise: bool) -> subprocess.Popen[bytes]:
    try:
        # children of the command inherit the switch; tracking turns it on for the command alone
        child = subprocess.Popen(words, preexec_fn=_switch_on if precise else None)  # noqa: PLW1509 - one thread yet
    except OSError as error:
        raise UsageError(
            f"cannot run {words[0]}: {error.strerror}", hint="check the command's name"
        ) from error
    # The terminal sends Ctrl-C to both of us: the command decides.  Other signals are ours to pass on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _frame: child.send_signal(number))
    return child


def _switch_on() -> None:
    with contextlib.suppress(OSError):  # no patched kernel: `track` emulates, or says why not
        switch.turn_on()
