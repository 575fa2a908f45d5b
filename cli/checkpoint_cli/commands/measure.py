# SPDX-License-Identifier: Apache-2.0
"""`checkpoint measure`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import IO, Any

import click

from checkpoint_cli.follow import Interruption, display
from checkpoint_cli.options import DURATION, OptionalDuration, Session, session_options
from checkpoint_cli.output import print_line
from checkpointd.errors import CheckpointError, PagesMissed, TargetGone, UsageError
from checkpointd.report import record

EPILOG = """\b
example:
  checkpoint measure --interval 1s --epochs 20 -o redis.jsonl -p 1234
  checkpoint measure --backends uffd-wp,content -- python3 train.py
"""

PROBE_TIMEOUT_S = 10.0
PROBE_PATIENCE = 3
END_TIMEOUT_S = 20.0

Record = dict[str, Any]


@click.command(
    "measure", short_help="Judge dirty trackers on a program against full reads of it.", epilog=EPILOG
)
@click.option("-p", "--pid", type=int, default=0, metavar="PID", help="The process.")
@click.option("--interval", type=DURATION, default="1s", help="How long it runs between two freezes.")
@click.option(
    "--epochs", type=click.IntRange(1, 10_000), default=20, help="How many such intervals a run has."
)
@click.option(
    "--backends", default="", metavar="LIST", help="Names with commas between (default: all there are)."
)
@click.option(
    "--baseline", type=OptionalDuration(), default="3s", help="Watch it untouched so long first; 0: not."
)
@click.option(
    "--warmup", type=OptionalDuration(), default="0", help="Let a started command run so long first."
)
@click.option(
    "--max-frozen", type=OptionalDuration(), default="10s", help="End it rather than freeze for longer."
)
@click.option(
    "--probe", default="", metavar="CMD", help="Shell command that prints how much was done so far."
)
@click.option("-o", "--output", default="", metavar="FILE", help="Keep the record, for `report`.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing file.")
@click.option("--keep", is_flag=True, help="Leave a started command running.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD [ARG]...]")
@session_options
def command(
    session: Session,
    pid: int,
    words: tuple[str, ...],
    output: str,
    force: bool,
    **options: Any,
) -> int:
    """Run dirty trackers on a program and compare what they say with two full reads of it, once an interval.

    The program is frozen for a full read each time and runs on.  Ctrl-C ends the measurement with what was measured
    so far; the program runs on.  A command given is started anew for every run.
    """
    if bool(pid) == bool(words):
        raise click.UsageError("give either -p PID or -- CMD")
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(session.client())  # before a command is started
        file = stack.enter_context(_open(output, force)) if output else None
        return _Measuring(session, client, file, options).work(pid, words)


class _Measuring:
    """One measurement, perhaps of several runs with a command started for each."""

    def __init__(self, session: Session, client: Any, file: IO[str] | None, options: dict[str, Any]) -> None:
        self._session, self._client, self._file = session, client, file
        self._options = options
        self._lines: list[str] = []
        self._header: Record = {}
        self._shift_us = 0
        self._ends: list[Record] = []
        self._probe_failures = 0  # one after the other
        self._nr_epochs = self._nr_missed = 0

    def work(self, pid: int, words: tuple[str, ...]) -> int:
        status, failure = 0, None
        with Interruption(self._client) as interruption:
            try:
                if pid:
                    self._follow(pid, 0, interruption)
                else:
                    number = 1
                    while number == 1 or number <= len(self._header.get("runs", ())):
                        self._run(words, number, interruption)
                        number += 1
            except CheckpointError as error:
                status = interruption.exit_status
                if not self._header or not (status and error.reason == "CANCELLED"):
                    failure = error
            reason = "interrupted" if status else f"failed: {failure}" if failure else self._reason()
            if self._header:
                end = {"type": "end", "reason": reason, "epochs": self._nr_epochs}
                self._keep({**end, "pages_missed": self._nr_missed})
        if self._header:
            status = self._show(status)
        if failure is not None:
            raise failure
        return status

    def _reason(self) -> str:
        return next((end["reason"] for end in self._ends if end["reason"] != "done"), "done")

    def _run(self, words: tuple[str, ...], number: int, interruption: Interruption) -> None:
        child = _start(words)
        try:
            time.sleep(self._options["warmup"] / 1e6)
            if child.poll() is not None:
                raise TargetGone(
                    f"{words[0]} ended with status {child.returncode} before it could be measured",
                    hint="measure a command that runs for longer, or give less --warmup",
                )
            self._follow(child.pid, number, interruption)
        finally:
            if child.poll() is None:
                if self._options["keep"] or interruption.exit_status:
                    self._session.note(f"checkpoint: {words[0]} runs on, its pid is {child.pid}")
                else:
                    _end(child)

    def _follow(self, pid: int, run: int, interruption: Interruption) -> None:
        """One call to the service, to its end."""
        events = self._client.measure(
            pid,
            run=run,
            interval_us=self._options["interval"],
            epochs=self._options["epochs"],
            backends=[name.strip() for name in self._options["backends"].split(",") if name.strip()],
            baseline_us=self._options["baseline"],
            max_frozen_us=self._options["max_frozen"],
            cancel_on_disconnect=True,  # the record is with us: without us there is none
        )
        with display(self._session, f"measuring {pid}") as show:
            for event in events:
                kind = event["message_type"]
                if kind == "started":
                    interruption.started(event["operation_id"])
                seen = self._take(json.loads(event["json"])) if kind == "record" else event
                if seen and self._session.json:
                    print_line(seen)
                elif seen:
                    show(seen)

    def _take(self, found: Record) -> Record:
        """A record from the agent: keep it, in one time and under one header; the event that shows it, if any."""
        kind = found["type"]
        if kind == "mark":
            self._sample(found)
            return {}
        if kind == "header":
            if self._header:
                self._shift_us = (found["monotonic_ns"] - self._header["monotonic_ns"]) // 1000
                return {}
            self._header = found
        elif kind == "end":
            self._ends.append(found)
            return {}
        elif "t_us" in found:
            found["t_us"] += self._shift_us
        self._nr_epochs += kind == "epoch" and found["epoch"] > 0
        self._nr_missed += 0 if found.get("advisory") else found.get("pages_missed", 0)
        self._keep(found)
        return {"message_type": "record", **found}

    def _keep(self, found: Record) -> None:
        self._lines.append(record.line(found))
        if self._file is not None:
            self._file.write(self._lines[-1] + "\n")
            self._file.flush()

    def _sample(self, mark: Record) -> None:
        command = self._options["probe"]
        if not command or self._probe_failures >= PROBE_PATIENCE:
            return
        begun = time.monotonic()
        try:
            done = subprocess.run(  # noqa: S602 - the user's own command, run as the user
                command,
                shell=True,
                capture_output=True,
                text=True,
                timeout=PROBE_TIMEOUT_S,
                check=True,
            )
            value = float(re.findall(r"[0-9]+(?:\.[0-9]+)?", done.stdout)[-1])
        except (subprocess.SubprocessError, IndexError) as error:
            self._probe_failures += 1
            again = "" if self._probe_failures < PROBE_PATIENCE else " and is not asked again"
            what = "it printed no number" if isinstance(error, IndexError) else str(error)
            self._session.note(f"checkpoint: the probe failed{again}: {what}")
            return
        self._probe_failures = 0
        t_us = mark["t_us"] + self._shift_us
        self._keep(
            {
                "type": "probe",
                "run": mark["run"],
                "epoch": mark["epoch"],
                "edge": mark["edge"],
                "t_us": t_us,
                "value": value,
                "took_us": int((time.monotonic() - begun) * 1e6),
            }
        )

    def _show(self, status: int) -> int:
        measurement = record.parse(self._lines)
        if not self._session.json:
            from checkpointd.report.text import table  # noqa: PLC0415 - only where somebody looks

            if not self._session.quiet:
                click.echo(table(measurement), nl=False)
        if measurement.nr_missed:
            judged = (r for run in measurement.runs for by in run.backends.values() for r in by.values())
            first = next(found for found in judged if found["missed"] and not found.get("advisory"))
            raise PagesMissed(
                f"{first['backend']} did not report {first['pages_missed']} pages in epoch {first['epoch']}, the first "
                f"is {first['missed'][0]['page']}: {first['missed'][0]['why']}",
                hint="do not use this backend for incremental dumps of this program; please report it with the record",
                pages_missed=measurement.nr_missed,
            )
        return status


def _start(words: tuple[str, ...]) -> subprocess.Popen[bytes]:
    try:
        # a process group of its own: Ctrl-C ends the measurement, not the program
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, process_group=0)
    except OSError as error:
        raise UsageError(
            f"cannot run {words[0]}: {error.strerror}", hint="check the command's name"
        ) from error


def _end(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@contextlib.contextmanager
def _open(path: str, force: bool) -> Iterator[IO[str]]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL)
    try:
        # command lines and paths of a process are not everybody's business
        fd = os.open(path, flags, 0o600)
    except FileExistsError:
        raise UsageError(f"{path} exists already", hint="choose another name, or give --force") from None
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint="check the directory") from None
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        yield file
