# SPDX-License-Identifier: Apache-2.0
"""The same kills one floor higher: a real service with real agents and page workers, killed while a client works.

One round is a service of its own, a client that tracks, dumps twice and untracks, and one death:

* of the service, an agent, a page worker, or service and agent together, at a random instant;
* of an agent or a page worker at a named point of its code (`CHECKPOINTD_TRACEPOINT` in the service's environment).

Whoever died, the target must be well afterwards, agents and workers must end, and the store must hold
whole images only.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from checkpointd.client import connect
from checkpointd.client.autostart import is_listening
from checkpointd.errors import CheckpointError
from checkpointd.image.store import Store
from tests.soak.lab import ROOT, Harmed, Tally, Target

VICTIMS = ("service", "agent", "page worker", "service and agent")
POINTS = (
    *(
        "dump.freeze",
        "dump.collect",
        "dump.collected",
        "dump.copied",
        "dump.thawed",
        "dump.commit",
        "dump.committed",
    ),
    *("track.made", "track.taken", "track.scanned", "track.registered", "track.written"),
    *("track.lifted", "track.armed", "worker.walked"),
    *("untrack.begin", "untrack.done", "freeze.seized", "freeze.all_stopped", "thaw.begin", "thaw.released"),
    *("image.begun", "image.pack_written", "image.pack_linked", "image.before_rename", "image.renamed"),
)
MAX_DELAY_S = 1.0
PATIENCE_S = 120.0


def _wait(condition, what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > until:
            raise Harmed(f"waited in vain for {what}")
        time.sleep(0.005)


def _children(pid: int, program: str) -> list[int]:
    """Children of a process whose command line names `program`."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                with contextlib.suppress(OSError):
                    if program in Path(f"/proc/{child}/cmdline").read_text():
                        found.append(int(child))
    return found


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


class _Service:
    """One service; its agents and their page workers, as seen from outside."""

    def __init__(self, where: Path, rule: str) -> None:
        self.socket, self.store = where / "run" / "s.sock", where / "store"
        self._log = (where / "service.log").open("ab")
        names = {name: value for name, value in os.environ.items() if not name.startswith("CHECKPOINT")}
        environ = {**names, "PYTHONPATH": str(ROOT)}
        if rule:
            environ["CHECKPOINTD_TRACEPOINT"] = rule
        command = [sys.executable, "-m", "checkpointd.service.main"]
        command += ["--socket", str(self.socket), "--store", str(self.store)]
        self.process = subprocess.Popen(command, env=environ, stdout=self._log, stderr=self._log)
        self.seen: set[int] = set()
        _wait(lambda: is_listening(self.socket), "the service to listen")

    def agents(self) -> list[int]:
        return self._note(_children(self.process.pid, "checkpointd.agent"))

    def workers(self) -> list[int]:
        return self._note(
            [w for agent in self.agents() for w in _children(agent, "checkpointd.dump.page_server")]
        )

    def _note(self, pids: list[int]) -> list[int]:
        self.seen.update(pids)
        return pids

    def end(self) -> None:
        self.workers()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise Harmed("the service did not end") from None
        finally:
            self._log.close()
        _wait(lambda: all(_is_gone(pid) for pid in self.seen), f"the end of agents and workers {self.seen}")


def _work(service: _Service, pid: int, errors: list[str]) -> None:
    """What a client does meanwhile.  Its calls may fail: that is what the kills are for."""
    try:
        with connect(service.socket, start=False) as client:
            client.track(pid)
            for incremental in (False, True):
                for _ in client.dump(pid, incremental=incremental):
                    pass
            client.untrack(pid)
    except CheckpointError as error:
        errors.append(str(error))


def kill_in_service(target: Target, where: Path, dice: random.Random, tally: Tally) -> str:
    """One round; what was killed, and where."""
    folder = where / "service"
    folder.mkdir()
    name = dice.choice(POINTS) if dice.random() < 0.5 else ""
    service = _Service(folder, f"{name}@{dice.choice((1, 1, 2))}=kill" if name else "")
    errors: list[str] = []
    try:
        client = threading.Thread(target=_work, args=(service, target.pid, errors))
        client.start()
        if name:
            victim = f"{name} (in the service's agent or worker)"
            client.join(PATIENCE_S)
            nr_killed = bool(errors)
        else:
            victim = dice.choice(VICTIMS)
            nr_killed = _kill(service, victim, dice.random() * MAX_DELAY_S, client)
            victim += ", random instant"
            client.join(PATIENCE_S)
        if client.is_alive():
            raise Harmed("the client's call did not end")
        service.end()
        target.judge()
        _check_store(service.store)
        if target.tracked_mappings():
            raise Harmed("a mapping is still registered with a userfaultfd")
    except Harmed as error:
        raise Harmed(f"{target.name}/service, {victim}: {error}; the client saw {errors}") from None
    finally:
        if service.process.poll() is None:
            service.process.kill()
            service.process.wait()
        shutil.rmtree(folder, ignore_errors=True)
    tally.sessions += 1
    tally.kills += nr_killed
    tally.points[victim] = tally.points.get(victim, 0) + nr_killed
    return victim


def _kill(service: _Service, victim: str, delay_s: float, client: threading.Thread) -> int:
    """Kill after the first agent (or page worker, if that is to die) has appeared and the delay is over."""
    until = time.monotonic() + PATIENCE_S
    awaited = service.workers if victim == "page worker" else service.agents
    while not awaited() and client.is_alive() and time.monotonic() < until:
        time.sleep(0.001)
    client.join(delay_s)
    service.workers()
    pids = {
        "service": [service.process.pid],
        "agent": service.agents(),
        "page worker": service.workers(),
        "service and agent": [service.process.pid, *service.agents()],
    }[victim]
    nr_killed = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            nr_killed += 1
    return nr_killed


def _check_store(path: Path) -> None:
    """Whatever is in the store is whole."""
    if not path.exists():
        return
    store = Store.open(path, create=True)  # a service killed as it made one leaves that to the next
    for info in store.images():
        if info.damaged:
            raise Harmed(f"image {info.id} is damaged")
        store.verify(info.id).raise_if_damaged()
