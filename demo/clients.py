# SPDX-License-Identifier: Apache-2.0
"""Clients that write without pause and log every write: when it was sent, and when it was acknowledged.

Client c writes the numbers 0, 1, 2, ... to its own list ``log:c``.  In the same transaction it stores a value that
follows from the number at one of a few thousand keys, so that the generation can be checked in its memory too.
Times are of CLOCK_MONOTONIC, which the freezes of the server do not touch.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, field

from demo.resp import Connection, ServerError

NR_CHURN_KEYS = 2000
NOT_ACKNOWLEDGED = 1 << 62
PAUSE_SECONDS = 0.001


def churn_value(client: int, number: int) -> bytes:
    return hashlib.sha256(b"%d:%d" % (client, number)).digest() * 16


@dataclass
class Life:
    """One client's log between two deaths of the server: write k of it has number first + k."""

    first: int
    sent_ns: list[int] = field(default_factory=list)
    acknowledged_ns: list[int] = field(default_factory=list)


class Client(threading.Thread):
    """One writer.  `lives` is its log; it waits with a new connection until `gate` is open."""

    def __init__(self, number: int, port: int, gate: threading.Event, stop: threading.Event) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self.number = number
        self.lives: list[Life] = []
        self.problem = ""
        self.idle = threading.Event()
        self._port, self._gate, self._stop_asked = port, gate, stop

    def run(self) -> None:
        while not self._stop_asked.is_set():
            self.idle.set()
            if not self._gate.wait(0.05):
                continue
            self.idle.clear()
            try:
                with Connection(self._port) as connection:
                    self._write(connection)
            except OSError:
                time.sleep(0.01)
            except (ServerError, AssertionError) as error:
                self.problem = f"client {self.number}: {error!r}"
                break
        self.idle.set()

    def _write(self, connection: Connection) -> None:
        number = connection("LLEN", f"log:{self.number}")
        life = Life(number)
        self.lives.append(life)
        while not self._stop_asked.is_set() and self._gate.is_set():
            life.sent_ns.append(time.monotonic_ns())
            life.acknowledged_ns.append(NOT_ACKNOWLEDGED)
            replies = connection.pipeline(
                [
                    ("MULTI",),
                    ("RPUSH", f"log:{self.number}", number),
                    ("SET", churn_key(self.number, number), churn_value(self.number, number)),
                    ("EXEC",),
                ]
            )
            life.acknowledged_ns[-1] = time.monotonic_ns()
            assert replies[-1][0] == number + 1, f"write {number} became number {replies[-1][0] - 1}"
            number += 1
            time.sleep(PAUSE_SECONDS)


def churn_key(client: int, number: int) -> str:
    return f"churn:{client}:{number % NR_CHURN_KEYS}"


def total_acknowledged(clients: list[Client]) -> int:
    return sum(
        sum(1 for at in life.acknowledged_ns if at != NOT_ACKNOWLEDGED)
        for client in clients
        for life in client.lives
    )
