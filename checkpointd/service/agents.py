# SPDX-License-Identifier: Apache-2.0
"""One agent process and the requests it is working on.

The agent owns the tracer, the service never traces.  Killing an agent is always safe for its target: it is
let go by the kernel and repairs itself, so SIGKILL answers every agent that does not answer.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from checkpointd.agent.protocol import PROTOCOL, Channel, ProtocolError
from checkpointd.errors import CheckpointError, VersionMismatch
from checkpointd.procfs.process import read_stat

log = logging.getLogger(__name__)

DEFAULT_COMMAND = (sys.executable, "-m", "checkpointd.agent")

CANCEL_TIMEOUT_S = 3.0
"""How long an agent may take to end a cancelled request before it is killed."""

SHUTDOWN_TIMEOUT_S = 5.0

FROZEN_PHASES = frozenset({"freezing", "copying"})
"""Phases of a dump in which the target stands still."""

SILENCE_LIMIT_S = 60.0
"""How long an agent may say nothing while its target stands still.

However large the target, none of the steps takes that long without a word: a scan or a fork takes milliseconds
for each GiB, and copying tells its progress every tenth of a second.
"""

EventHandler = Callable[[dict[str, Any]], None]


class Request:
    """A request under way; ended exactly once, by a result, an error or the agent's end."""

    def __init__(self, number: int, op: str, on_event: EventHandler | None) -> None:
        self.number = number
        self.op = op
        self.on_event = on_event
        self.phase = ""
        self._ended = threading.Event()
        self._value: dict[str, Any] = {}
        self._error: CheckpointError | None = None

    def end(self, value: dict[str, Any] | None, error: CheckpointError | None) -> None:
        self._value, self._error = value or {}, error
        self._ended.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._ended.wait(timeout_s)

    def result(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Wait for the end.

        Raises:
            CheckpointError: what the agent reported, or that it is gone.
            TimeoutError: no answer in time.
        """
        if not self.wait(timeout_s):
            raise TimeoutError(f"no answer to {self.op}")
        if self._error is not None:
            raise self._error
        return self._value


class Agent:
    """An agent process.

    Args:
        label: what it works for, for messages, e.g. "pid 1234".
        on_end: called once, from the reader thread, when the process has ended.
        on_target_exit: called when the agent says that its target has exited.
    """

    def __init__(
        self,
        label: str,
        *,
        command: Sequence[str] = DEFAULT_COMMAND,
        on_end: Callable[[Agent], None] | None = None,
        on_target_exit: Callable[[Agent], None] | None = None,
    ) -> None:
        self.label = label
        self._on_end = on_end
        self._on_target_exit = on_target_exit
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._requests: dict[int, Request] = {}
        self._ended = threading.Event()
        self._heard_at = time.monotonic()
        self._refusal: CheckpointError | None = None
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2,  # an agent has nothing to say on our stdout
                start_new_session=True,  # Ctrl-C on our terminal is for us: agents see end of file
            )
        except OSError as error:
            ours.close()
            raise CheckpointError(
                f"cannot start the agent for {label}: {error.strerror}",
                hint="check the installation and the limit on processes (ulimit -u)",
            ) from error
        finally:
            theirs.close()
        self._channel = Channel(ours)
        self._pidfd = os.pidfd_open(self._process.pid)
        threading.Thread(target=self._read, name=f"agent-{self.pid}", daemon=True).start()
        log.info("agent %d started for %s", self.pid, label)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def working(self) -> bool:
        with self._lock:
            return bool(self._requests)

    def start(self, op: str, args: Mapping[str, Any], on_event: EventHandler | None = None) -> Request:
        """Send a request; phases and progress go to `on_event`, from the reader thread."""
        request = Request(next(self._numbers), op, on_event)
        with self._lock:
            if self._ended.is_set():
                request.end(None, self._refusal or self._gone(request))
                return request
            self._requests[request.number] = request
        try:
            self._channel.send({"id": request.number, "op": op, "args": dict(args)})
        except OSError:
            pass  # it is gone: the reader ends the request and knows how the process ended
        except ProtocolError as error:
            with self._lock:
                self._requests.pop(request.number, None)
            request.end(None, CheckpointError(f"cannot ask the agent of {self.label}: {error}"))
        return request

    def cancel(self, request: Request, timeout_s: float = CANCEL_TIMEOUT_S) -> None:
        """End a request; an agent that does not do so in time is killed.  Returns when the request has ended."""
        if request.wait(0):
            return
        self.start("cancel", {"request": request.number})
        if not request.wait(timeout_s):
            log.warning(
                "agent %d of %s did not cancel its %s in time: killed", self.pid, self.label, request.op
            )
            self.kill()
            request.wait()

    def kill(self) -> None:
        """SIGKILL, also to a stopped agent; its requests end with an error."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def shutdown(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        """Let the target go and end the process; kill it when that takes too long.  Returns after its end."""
        self.start("shutdown", {})
        if not self._ended.wait(timeout_s):
            log.warning("agent %d of %s did not end in time: killed", self.pid, self.label)
            self.kill()
            self._ended.wait()

    def holds_target_silently(self, limit_s: float) -> bool:
        """Has it said nothing for that long in a phase in which its target stands still?"""
        with self._lock:
            holds = any(request.phase in FROZEN_PHASES for request in self._requests.values())
            return holds and time.monotonic() - self._heard_at > limit_s

    def is_stopped(self) -> bool:
        """SIGSTOP or a debugger holds it, and with it perhaps a frozen target."""
        try:
            return read_stat(self.pid).state in "tT"
        except (OSError, ValueError):
            return False

    def _read(self) -> None:
        with contextlib.suppress(ProtocolError):
            # what a refused agent had said before its death came is not to be believed either
            while (
                self._refusal is None
                and self._has_message()
                and (message := self._channel.recv()) is not None
            ):
                try:
                    self._dispatch(message)
                except (KeyError, TypeError, ValueError) as error:
                    self._refuse(
                        CheckpointError(
                            f"the agent of {self.label} sent a malformed message: {error!r}",
                            hint="it was ended and its target let go: try again, and please report it",
                        )
                    )
        # End of file, or nonsense: either way it is of no more use.  A child is reaped here and nowhere else.
        self._channel.close()
        os.close(self._pidfd)
        try:
            self._process.wait(SHUTDOWN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # helpers of its session that somebody stopped could not see its end; restored processes lead others
            os.killpg(self.pid, signal.SIGCONT)
        with self._lock:
            self._ended.set()
            requests, self._requests = list(self._requests.values()), {}
        log.info("agent %d of %s ended: %s", self.pid, self.label, self._how_ended())
        for request in requests:
            if request.op == "shutdown":
                request.end({}, None)
            else:
                request.end(None, self._refusal or self._gone(request))
        if self._on_end is not None:
            self._on_end(self)

    def _has_message(self) -> bool:
        """Wait for a message or the end; False once the process is dead and all it said is read.

        The socket alone would not tell: a helper the agent forked may still hold the other end.
        """
        poller = select.poll()
        poller.register(self._channel.fileno(), select.POLLIN)
        poller.register(self._pidfd, select.POLLIN)
        return any(fd == self._channel.fileno() for fd, _ in poller.poll())

    def _dispatch(self, message: dict[str, Any]) -> None:
        number, event = int(message["id"]), str(message["event"])
        self._heard_at = time.monotonic()
        if number == 0:
            if event == "hello" and message.get("protocol") != PROTOCOL:
                self._refuse(
                    VersionMismatch(
                        f"the agent of {self.label} is of version {message.get('version', 'unknown')} and "
                        f"speaks protocol {message.get('protocol')}, not {PROTOCOL}",
                        hint="the installation was changed under a running service: restart the service",
                    )
                )
            elif event == "target-exited" and self._on_target_exit is not None:
                self._on_target_exit(self)
            return
        with self._lock:
            request = self._requests.get(number)
        if request is None:
            log.debug("agent %d: %s for request %d, which has ended", self.pid, event, number)
        elif event in {"result", "error"}:
            # read before it is forgotten: a malformed end must still end it, by the agent's death
            value = dict(message["value"] or {}) if event == "result" else None
            error = CheckpointError.from_dict(message["error"]) if event == "error" else None
            with self._lock:
                self._requests.pop(number, None)
            request.end(value, error)
        else:
            if event == "phase":
                request.phase = str(message["phase"])
            if request.on_event is not None:
                request.on_event(message)

    def _refuse(self, error: CheckpointError) -> None:
        log.error("%s", error)
        self._refusal = error
        self.kill()

    def _gone(self, request: Request) -> CheckpointError:
        return CheckpointError(
            f"the agent of {self.label} {self._how_ended()} during {request.op}; its target was let go",
            hint="nothing half-done was kept: try again (the service's log may say more)",
            agent_pid=self.pid,
        )

    def _how_ended(self) -> str:
        code = self._process.returncode
        if code is None:
            return "ended"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"was killed by {signal.Signals(-code).name}"
            return f"was killed by signal {-code}"
        return f"exited with status {code}"


class Watchdog:
    """Kills agents that can do no more, so that no target stays frozen behind them.

    These are agents found stopped twice in a row with a request under way, and agents that hang: silent for
    `silence_limit_s` while their target stands still.
    """

    def __init__(
        self,
        agents: Callable[[], list[Agent]],
        interval_s: float = 0.5,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        self._agents = agents
        self._interval_s = interval_s
        self._silence_limit_s = silence_limit_s
        self._quit = threading.Event()
        self._suspects: set[int] = set()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._quit.set()

    def _watch(self) -> None:
        while not self._quit.wait(self._interval_s):
            stopped = {a.pid: a for a in self._agents() if a.working() and a.is_stopped()}
            for pid in stopped.keys() & self._suspects:
                log.warning("agent %d of %s is stopped while working: killed", pid, stopped[pid].label)
                stopped[pid].kill()
            self._suspects = set(stopped)
            for agent in self._agents():
                if agent.holds_target_silently(self._silence_limit_s):
                    log.error(
                        "agent %d of %s holds its target and has said nothing for %.0f s: killed",
                        agent.pid,
                        agent.label,
                        self._silence_limit_s,
                    )
                    agent.kill()


def own_pids(agents: list[Agent]) -> set[int]:
    """The service and its agents: none of them may be a target."""
    return {os.getpid(), *(agent.pid for agent in agents)}


def remaining_s(deadline: float | None) -> float | None:
    """Seconds left until a deadline on time.monotonic()."""
    return None if deadline is None else deadline - time.monotonic()
