# SPDX-License-Identifier: Apache-2.0
"""Which target has which agent.

A target is known by (pid, start time): a reused pid is never taken for the process that had it before.  One
operation at a time uses an agent; it takes a *lease*.  An agent whose target exits, or that was started for an
operation that failed, is ended when its lease is given back.

Lock order: `TargetTable._lock` before an agent's own lock; agents are started and ended with it released.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from checkpointd.errors import Busy, TargetGone, UsageError
from checkpointd.procfs.process import Stat, read_stat
from checkpointd.service.agents import DEFAULT_COMMAND, Agent, own_pids

Key = tuple[int, int]


@dataclass
class Target:
    """A process with an agent.

    Attributes:
        user: what uses the agent now ("" when idle), e.g. an operation's id.
        keep: the agent outlives the lease because it tracks the target.
        doomed: the target has exited, or the agent has ended.
    """

    key: Key
    name: str
    agent: Agent | None = None
    user: str = ""
    keep: bool = False
    doomed: bool = False
    backend: str = ""
    last_image_id: str = ""

    @property
    def pid(self) -> int:
        return self.key[0]


class TargetTable:
    """All targets of this service."""

    def __init__(self, command: Sequence[str] = DEFAULT_COMMAND) -> None:
        self._command = tuple(command)
        self._lock = threading.Lock()
        self._targets: dict[Key, Target] = {}
        self._unbound: set[Agent] = set()  # agents without a target: `check`, or a restore under way
        self._closed = False

    def targets(self) -> list[Target]:
        with self._lock:
            return list(self._targets.values())

    def agents(self) -> list[Agent]:
        with self._lock:
            bound = [target.agent for target in self._targets.values() if target.agent is not None]
            return [*bound, *self._unbound]

    def is_tracked(self, pid: int) -> bool:
        key = (pid, self._look(pid).starttime)
        with self._lock:
            return key in self._targets

    @contextlib.contextmanager
    def lease(self, pid: int, user: str) -> Iterator[tuple[Target, Agent]]:
        """The target's agent, started if there is none, for one operation.

        Set `keep` on the target to let a new agent live on; clear it to end an old one.

        Raises:
            TargetGone: no such process.
            UsageError: the pid is our own.
            Busy: another operation has it.
        """
        target = self._take(pid, user)
        try:
            if target.agent is None:
                target.agent = self._spawn(f"pid {pid}", target)
            yield target, target.agent
        finally:
            self._give_back(target)

    @contextlib.contextmanager
    def unbound(self, label: str) -> Iterator[Agent]:
        """An agent without a target; ended afterwards unless it was `bind`-ed to one."""
        agent = self._spawn(label, None)
        try:
            yield agent
        finally:
            with self._lock:
                bound = agent not in self._unbound
                self._unbound.discard(agent)
            if not bound:
                agent.shutdown()

    def bind(self, agent: Agent, pid: int, *, backend: str, image_id: str) -> None:
        """Make an unbound agent that of the process it restored."""
        found = self._look(pid)
        key = (pid, found.starttime)
        with self._lock:
            self._unbound.discard(agent)
            agent.label = f"pid {pid}"
            self._targets[key] = Target(
                key, found.comm, agent, keep=True, backend=backend, last_image_id=image_id, doomed=agent.ended
            )
        self._sweep()

    def close(self) -> None:
        """Let every target go and end every agent; new leases are refused."""
        with self._lock:
            self._closed = True
        agents = self.agents()
        threads = [threading.Thread(target=agent.shutdown) for agent in agents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _take(self, pid: int, user: str) -> Target:
        if pid <= 0:
            raise UsageError(f"{pid} is not a pid", hint="give the number of a running process with --pid")
        if pid in own_pids(self.agents()):
            raise UsageError(
                f"pid {pid} belongs to checkpointd itself", hint="give the pid of another process"
            )
        found = self._look(pid)
        key = (pid, found.starttime)
        with self._lock:
            if self._closed:
                raise Busy("the service is ending", hint="try again in a moment")
            target = self._targets.get(key)
            if target is None:
                target = self._targets[key] = Target(key, found.comm)
            elif target.user:
                raise Busy(
                    f"pid {pid} is in use by {target.user}",
                    hint="wait for it, or end it with `checkpoint cancel`",
                    pid=pid,
                    operation=target.user,
                )
            target.user = user
        return target

    def _give_back(self, target: Target) -> None:
        with self._lock:
            end = target.doomed or not target.keep or target.agent is None or target.agent.ended
            if end:
                self._targets.pop(target.key, None)
            else:
                target.user = ""
        if end and target.agent is not None:
            target.agent.shutdown()

    def _spawn(self, label: str, target: Target | None) -> Agent:
        agent = Agent(
            label,
            command=self._command,
            on_end=self._doom,
            on_target_exit=self._doom,
        )
        if target is None:
            with self._lock:
                self._unbound.add(agent)
        return agent

    def _doom(self, agent: Agent) -> None:
        """The agent or its target has ended.  Called from the agent's reader thread: must not wait for it."""
        with self._lock:
            for target in self._targets.values():
                if target.agent is agent:
                    target.doomed = True
        threading.Thread(target=self._sweep, daemon=True).start()

    def _sweep(self) -> None:
        with self._lock:
            gone = [target for target in self._targets.values() if target.doomed and not target.user]
            for target in gone:
                del self._targets[target.key]
        for target in gone:
            if target.agent is not None:
                target.agent.shutdown()

    @staticmethod
    def _look(pid: int) -> Stat:
        try:
            return read_stat(pid)
        except (FileNotFoundError, ProcessLookupError):
            raise TargetGone(
                f"there is no process with pid {pid}", hint="look it up with `pgrep` or `ps`", pid=pid
            ) from None
