# SPDX-License-Identifier: Apache-2.0
"""The command `checkpoint`: finds the verb, runs it, and turns errors into sentences and exit codes.

Only click is imported here; each verb is a module of `checkpoint_cli.commands`, imported when it is used, and
gRPC comes with the first connection.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click

from checkpoint_cli.output import printable_lines, tell
from checkpointd.errors import CheckpointError, NoSpace, UsageError
from checkpointd.version import VERSION

COMMANDS = (
    *("check", "run", "track", "untrack", "dump", "restore"),
    *("ls", "show", "verify", "rm", "export", "import"),
    *("measure", "report"),
    *("status", "watch", "cancel", "serve", "completion"),
)

ONLY_SHOW = frozenset({"check", "ls", "show", "report", "status", "completion"})
"""Commands that change nothing."""

GC_THRESHOLD = 50_000

REASON_LISTS = ("blockers", "conflicts", "reasons", "problems")
"""Details of an error that list all its reasons, one sentence each."""

EXIT_CODES = """\b
exit status:
   0  done
   1  failed for another reason
   2  wrong words on the command line, or a name that means nothing
   4  there is no such process, or it exited or replaced its program half-way
   5  not permitted
   6  the kernel cannot do it
   7  the process, or the image, holds state that cannot be saved or restored
   8  something at restore is in the way: a pid taken, a file changed or gone
   9  there is no such image
  10  there is no such store
  11  busy: another dump of the same process, a debugger, a locked store
  12  an image is damaged or of an unknown format
  13  the disk is full
  14  frozen too long, or a deadline passed; the process runs on
  15  cancelled by somebody else
  16  a measured backend did not report pages that changed
  20  no service answers, or one of another version
 130  interrupted (Ctrl-C); 143 terminated.  Any other code is a failure too.
"""

EPILOG = f"""\b
example:
  checkpoint dump -p 1234                   save a running process, and track it
  checkpoint dump -p 1234 --incremental     save what changed since
  checkpoint ls
  checkpoint restore latest                 bring it back

{EXIT_CODES}"""


class LazyGroup(click.Group):
    """A group whose commands are modules, imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"checkpoint_cli.commands.{cmd_name.replace('import', 'import_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # the base class offers near misses from `self.commands`, which stays empty here
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            import difflib  # noqa: PLC0415 - only for a mistake

            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _closed_pipe_told(ctx):
            return super().invoke(ctx)


@contextlib.contextmanager
def _closed_pipe_told(ctx: click.Context) -> Iterator[None]:
    """An output whose reader is gone as our error, where more was asked for than to see it.

    click would exit without a word; so it does after `ls | head`, as other programs do.
    """
    try:
        yield
    except BrokenPipeError as error:
        if ctx.invoked_subcommand in ONLY_SHOW or any(word in ctx.help_option_names for word in sys.argv):
            raise
        raise _unwritable(error) from error


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(VERSION, message="checkpoint %(version)s")
def cli() -> None:
    """Save running processes, later only what changed in them, and bring any of those states back.

    A service that works for you starts by itself when none runs.  Every command takes --json.
    """


def main() -> None:
    """Entry point; exits."""
    # What is imported lives to the end: looking through it for cycles, at the start and at the end, takes a sixth of
    # a short command's time.
    gc.set_threshold(GC_THRESHOLD)
    _hold_standard_streams()
    status = run(sys.argv[1:])
    gc.freeze()
    sys.exit(status)


def _hold_standard_streams() -> None:
    """Nothing else may come to have the numbers of those that are closed: what is meant for them would go there.

    A closed output is one that cannot be written to.
    """
    for fd, name, how in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, how)  # gets the lowest number that is free: this one
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", closefd=False))


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit status."""
    as_json = "--json" in arguments[: arguments.index("--")] if "--" in arguments else "--json" in arguments
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    try:
        _check_printable(arguments[: arguments.index("--")] if "--" in arguments else arguments)
        result = cli.main(arguments, prog_name="checkpoint", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        hint = _hint_of(error)
        if as_json:
            message = error.format_message()
            _print_error_json(
                {"reason": "USAGE", "message": message, "hint": hint, "exit_code": error.exit_code}
            )
        else:
            with contextlib.suppress(OSError):
                error.show()
            if hint:
                tell(f"  {hint}")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS or error.filename is not None:
            raise
        failure = _unwritable(error)
        report(failure, as_json=as_json)
        return failure.exit_code
    except CheckpointError as error:
        report(error, as_json=as_json)
        return _exit_status(error)


_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EBADF, errno.EPIPE)


def _unwritable(error: OSError) -> CheckpointError:
    """The error of an output that cannot be written; nothing more is written to it."""
    _drop_stdout()
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = "its reader is gone" if error.errno == errno.EPIPE else error.strerror
    return (NoSpace if full else CheckpointError)(
        f"cannot write the output: {why}", hint="what was asked for may have been done"
    )


def _end(number: int, _frame: object) -> None:
    """What was begun is undone on the way: an export leaves no half file with somebody's memory."""
    raise SystemExit(128 + number)


def _check_printable(words: list[str]) -> None:
    """Raises: UsageError for what no message between us and the service can hold."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(word).decode(errors="backslashreplace")
            raise UsageError(f"{shown} is not UTF-8", hint="give another name, in UTF-8") from None


def _hint_of(error: click.ClickException) -> str:
    """What to do next where click's own words do not say it."""
    if isinstance(error, click.NoSuchOption) and error.ctx is not None and error.ctx.parent is None:
        return f"options follow the command: checkpoint COMMAND {error.option_name} ..."
    return ""


def _exit_status(error: CheckpointError) -> int:
    """Not that of the error's kind after a signal: what was cancelled by Ctrl-C was not by somebody else."""
    return int(error.details.get("exit_status", error.exit_code))


def report(error: CheckpointError, *, as_json: bool) -> None:
    """Say what failed, and what to do next, on stderr."""
    if as_json:
        _print_error_json({**error.to_dict(), "exit_code": _exit_status(error)})
        return
    tell(f"checkpoint: {printable_lines(error.message)}")
    for name in REASON_LISTS:
        reasons = error.details.get(name, ())
        for reason in reasons:
            if len(reasons) > 1 or reason not in error.message:  # a single one is the message already
                tell(f"  - {printable_lines(reason)}")
        if error.details.get(f"{name}_left_out"):
            tell(f"  - and {error.details[f'{name}_left_out']} more")
    if error.hint:
        tell(f"  {printable_lines(error.hint)}")


def _print_error_json(values: dict[str, Any]) -> None:
    tell(json.dumps({"message_type": "error", **values}))


def _drop_stdout() -> None:
    """Keep the interpreter from complaining at exit about what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
