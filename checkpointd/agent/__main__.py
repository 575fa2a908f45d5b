# SPDX-License-Identifier: Apache-2.0
"""The agent: one process per target.  It traces, tracks, dumps and restores that one target.

Everything that touches the target runs on the main thread (ptrace is bound to a thread).  A reader thread takes
requests off the socket: `cancel` and `status` are answered at once, the rest wait for the main thread.  A watcher
thread tells when the target exits.  End of file from the service means: cancel, give the target back, exit.

See `checkpointd/agent/protocol.py` for the messages.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from checkpointd.agent import check
from checkpointd.agent.protocol import (
    AgentStatus,
    Channel,
    CheckArgs,
    DumpArgs,
    MeasureArgs,
    ProtocolError,
    RestoreArgs,
    TrackArgs,
    TrackResult,
    hello,
)
from checkpointd.dump.dump import Dumper, DumpOptions
from checkpointd.errors import Busy, Cancelled, CheckpointError, FrozenTooLong, TargetGone
from checkpointd.linux import pidfd
from checkpointd.target.freeze import left_attached

_PROGRESS_INTERVAL_S = 0.1

_LEAVE_TIMEOUT_S = 60.0
"""How long the main thread may take to end once the service is gone: a cancelled dump looks up every few
milliseconds, whatever the target's size.  An agent that hangs kills itself then, which lets its target go."""


class Agent:
    """State of this process; see the module's text."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._dumper: Dumper | None = None
        self._current: tuple[int, str] = (0, "")  # request id, op
        self._cancelled: set[int] = set()
        self._leaving = False

    def run(self) -> None:
        """Serve until the service is gone or the target is."""
        with contextlib.suppress(OSError):
            self._channel.send(hello(os.getpid()))
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        try:
            # threads that cannot be detached from go free only when this process ends
            while not left_attached() and (request := self._requests.get()) is not None:
                self._serve(request)
        finally:
            if left_attached():
                os._exit(1)  # at once: closing would take time, and they stand still until we are gone
            if self._dumper is not None:
                self._dumper.close()

    # -- the reader thread

    def _read(self) -> None:
        while True:
            try:
                message = self._channel.recv()
            except ProtocolError:
                message = None
            if message is None or message.get("op") == "shutdown":
                self._leaving = True
                self._requests.put(None)
                time.sleep(_LEAVE_TIMEOUT_S)  # the end of the main thread ends this one
                os.kill(os.getpid(), signal.SIGKILL)
                return
            op, number = message.get("op"), int(message.get("id", 0))
            if op == "cancel":
                self._cancelled.add(int(message.get("args", {}).get("request", 0)))
                self._send({"id": number, "event": "result", "value": {}})
            elif op == "status":
                self._send({"id": number, "event": "result", "value": self._status().to_dict()})
            else:
                self._requests.put(message)

    def _status(self) -> AgentStatus:
        dumper = self._dumper
        if dumper is None:
            return AgentStatus(busy=self._current[1])
        return AgentStatus(dumper.pid, dumper.choice.backend, dumper.last_image_id, self._current[1])

    # -- the main thread

    def _serve(self, request: Mapping[str, Any]) -> None:
        number, op = int(request.get("id", 0)), str(request.get("op", ""))
        self._current = (number, op)
        try:
            value = self._operate(number, op, request.get("args", {}))
            self._send({"id": number, "event": "result", "value": value})
        except CheckpointError as error:
            self._send({"id": number, "event": "error", "error": error.to_dict()})
        except ProtocolError as error:
            self._send({"id": number, "event": "error", "error": CheckpointError(str(error)).to_dict()})
        except Exception as error:
            traceback.print_exc()
            failure = CheckpointError(
                f"{op} failed unexpectedly: {type(error).__name__}: {error}",
                hint="the target runs on; please report this with the service's log",
            )
            self._send({"id": number, "event": "error", "error": failure.to_dict()})
        finally:
            self._current = (0, "")
            self._cancelled.discard(number)

    def _operate(self, number: int, op: str, args: Mapping[str, Any]) -> dict[str, Any]:
        if op == "check":
            return check.check(CheckArgs.from_dict(args).pid).to_dict()
        if op == "track":
            return self._track(TrackArgs.from_dict(args))
        if op == "untrack":
            if self._dumper is not None:
                self._dumper.untrack()
            return {}
        if op == "dump":
            return self._dump(number, DumpArgs.from_dict(args))
        if op == "restore":
            return self._restore(number, RestoreArgs.from_dict(args))
        if op == "measure":
            return self._measure(number, MeasureArgs.from_dict(args))
        raise ProtocolError(f"no operation named {op!r}")

    def _target(self, pid: int) -> Dumper:
        if self._dumper is not None and self._dumper.pid != pid:
            raise ProtocolError(f"this agent belongs to process {self._dumper.pid}, not {pid}")
        if self._dumper is None:
            check.refuse_impossible(pid)
            self._adopt(Dumper(pid))
        assert self._dumper is not None
        return self._dumper

    def _adopt(self, dumper: Dumper) -> None:
        self._dumper = dumper
        threading.Thread(target=self._watch, args=(dumper.pid,), name="watcher", daemon=True).start()

    def _watch(self, pid: int) -> None:
        try:
            fd = pidfd.pidfd_open(pid)
        except OSError:
            pass
        else:
            while not pidfd.has_exited(fd, timeout_s=3600.0):
                pass
            os.close(fd)
        # let an operation under way report its own error first
        while self._current[0] and not self._leaving:
            time.sleep(0.01)
        self._send({"id": 0, "event": "target-exited", "pid": pid})
        self._requests.put(None)

    def _track(self, args: TrackArgs) -> dict[str, Any]:
        check.refuse_backend(args.backend, precise=args.precise)
        choice = self._target(args.pid).track(args.backend, precise=args.precise)
        return TrackResult(args.pid, choice.backend, choice.reason).to_dict()

    def _dump(self, number: int, args: DumpArgs) -> dict[str, Any]:
        files = check.files_options(args.tcp, args.external)
        check.refuse_blockers(args.pid, files)
        check.refuse_backend(args.backend)
        dumper = self._target(args.pid)
        dumper.cancelled = lambda: self._leaving or number in self._cancelled
        deadline_ns = 0
        if args.deadline_s is not None:
            deadline_ns = time.monotonic_ns() + int(args.deadline_s * 1e9)
        options = DumpOptions(
            store=args.store,
            incremental=args.incremental,
            backend=args.backend,
            kill=args.kill,
            max_frozen_us=args.max_frozen_us,
            compress=args.compress,
            tag=args.tag,
            parent=args.parent,
            read_mode=args.read_mode,
            delta=args.delta,
            files=files,
            deadline_ns=deadline_ns,
        )
        return dumper.dump(options, self._reporter(number, "bytes")).to_dict()

    def _restore(self, number: int, args: RestoreArgs) -> dict[str, Any]:
        from checkpointd.agent.restoring import restore  # noqa: PLC0415 - only agents that restore need it

        if self._dumper is not None:
            raise TargetGone("this agent already has a target")
        tell = self._reporter(number, "pages")
        deadline = None if args.deadline_s is None else time.monotonic() + args.deadline_s

        def report(phase: str, done: int, total: int) -> None:
            # what this raises ends the restore, which leaves no process behind
            if self._leaving or number in self._cancelled:
                raise Cancelled(f"the restore of image {args.image[:12]} was cancelled; nothing runs")
            if deadline is not None and time.monotonic() > deadline:
                raise FrozenTooLong(
                    f"the deadline passed during the restore of image {args.image[:12]}; nothing runs",
                    hint="allow it more time with --timeout",
                )
            tell(phase, done, total)

        stats, dumper = restore(args, report)
        if dumper is not None:
            self._adopt(dumper)
        found: dict[str, Any] = stats.to_dict()
        return found

    def _measure(self, number: int, args: MeasureArgs) -> dict[str, Any]:
        from checkpointd.measure import engine  # noqa: PLC0415 - only agents that measure need it
        from checkpointd.report import record  # noqa: PLC0415

        if self._dumper is not None and self._dumper.choice.backend:
            raise Busy(
                f"process {args.pid} is tracked for its next dump, and measuring would disturb that",
                hint=f"end the tracking first: checkpoint untrack -p {args.pid}",
                pid=args.pid,
            )
        check.refuse_impossible(args.pid)
        total = args.epochs

        def emit(found: dict[str, Any]) -> None:
            self._send({"id": number, "event": "record", "json": record.line(found)})
            if found["type"] == "run":
                self._send({"id": number, "event": "phase", "phase": " + ".join(found["backends"])})
            elif found["type"] == "epoch":
                done = {"done": found["epoch"], "total": total, "unit": "epochs"}
                self._send({"id": number, "event": "progress", **done})

        options = engine.MeasureOptions(
            args.interval_us,
            args.epochs,
            tuple(args.backends),
            args.run,
            args.baseline_us,
            args.max_frozen_us,
        )
        return engine.measure(args.pid, options, emit, lambda: self._leaving or number in self._cancelled)

    def _reporter(self, number: int, unit: str) -> Callable[[str, int, int], None]:
        last_at, last_phase = 0.0, ""

        def report(phase: str, done: int, total: int) -> None:
            nonlocal last_at, last_phase
            if phase != last_phase:
                last_phase = phase
                self._send({"id": number, "event": "phase", "phase": phase})
            if total and (done == total or time.monotonic() - last_at > _PROGRESS_INTERVAL_S):
                last_at = time.monotonic()
                self._send({"id": number, "event": "progress", "done": done, "total": total, "unit": unit})

        return report

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._channel.send(message)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="checkpointd-agent", description="one target's agent; started by checkpointd"
    )
    parser.add_argument("--fd", type=int, required=True, help="connected stream socket to the service")
    fd = parser.parse_args().fd
    # Ctrl-C in the user's terminal is the service's to handle: it cancels in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))  # target/rendezvous.py waits for it
    Agent(Channel(socket.socket(fileno=fd))).run()


if __name__ == "__main__":
    main()
