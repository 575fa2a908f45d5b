# SPDX-License-Identifier: Apache-2.0
"""What the clients' own log says about a restored generation.

A generation is right when there is one instant F, between the moment we called for the dump and the moment it was
done, such that for every client

* every write acknowledged before F is in the generation, and
* no write sent after F is in it.

A write that is present was executed before F, so it was sent before F; one that is absent was not executed before F,
so it was not acknowledged before F.  Such an F exists exactly when

    max(call, sent of every present write)  <=  min(return, acknowledgement of every absent write).

Nothing that checkpointd says about itself is used.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from demo.clients import NR_CHURN_KEYS, Client, Life, churn_key, churn_value
from demo.resp import Connection
from demo.server import filler

NR_SAMPLES = 3000


@dataclass
class Proof:
    """The outcome for one generation.

    Attributes:
        failures: what is wrong; empty when all holds.
        nr_present, nr_absent: writes of the log found in the generation, and rightly not found.
        nr_must: of the present ones, acknowledged before the dump was even called for.
        nr_must_not: of the absent ones, sent after the dump was done.
        window_us: how closely the log alone fixes the instant of the freeze.
    """

    generation: int
    failures: list[str] = field(default_factory=list)
    nr_present: int = 0
    nr_absent: int = 0
    nr_must: int = 0
    nr_must_not: int = 0
    window_us: int = 0
    nr_values: int = 0


def prove(
    generation: int,
    port: int,
    clients: list[Client],
    logs: list[Life],
    called_ns: int,
    returned_ns: int,
    nr_ballast: int,
) -> Proof:
    """Compare a freshly restored server, before any client writes again, with the log of the life it was dumped in.

    Args:
        logs: per client, the life during which the dump was taken.
        called_ns, returned_ns: around the call of the dump, CLOCK_MONOTONIC.
    """
    proof = Proof(generation)
    low, high = called_ns, returned_ns
    with Connection(port) as connection:
        for client, life in zip(clients, logs, strict=True):
            name = f"client {client.number}"
            held = [int(word) for word in connection("LRANGE", f"log:{client.number}", 0, -1)]
            if held != list(range(len(held))):
                proof.failures.append(f"{name}: its list is not 0, 1, 2, ... without a gap")
                continue
            count = len(held) - life.first
            if not 0 <= count <= len(life.sent_ns):
                proof.failures.append(
                    f"{name}: {len(held)} writes, but it sent {life.first + len(life.sent_ns)}"
                )
                continue
            present, absent = slice(0, count), slice(count, None)
            for number, at in enumerate(life.acknowledged_ns[absent], start=count):
                if at < called_ns:
                    proof.failures.append(
                        f"{name}: write {number} was acknowledged before the dump, and is lost"
                    )
            for number, at in enumerate(life.sent_ns[present]):
                if at > returned_ns:
                    proof.failures.append(f"{name}: write {number} was sent after the dump, and is there")
            low = max([low, *life.sent_ns[present]])
            high = min([high, *life.acknowledged_ns[absent]])
            proof.nr_present += count
            proof.nr_absent += len(life.sent_ns) - count
            proof.nr_must += sum(at < called_ns for at in life.acknowledged_ns)
            proof.nr_must_not += sum(at > returned_ns for at in life.sent_ns)
            _check_churn(proof, connection, client.number, len(held))
        if low > high:
            proof.failures.append(
                f"no single instant fits: a write sent at {low} is there, one acknowledged at {high} is not"
            )
        proof.window_us = (high - low) // 1000
        dice = random.Random(generation)  # noqa: S311 (a sample, no secret)
        numbers = sorted(dice.sample(range(nr_ballast), min(NR_SAMPLES, nr_ballast)))
        for start in range(0, len(numbers), 100):
            part = numbers[start : start + 100]
            values = connection.pipeline([("GET", f"ballast:{n}") for n in part])
            proof.nr_values += len(part)
            wrong = [n for n, value in zip(part, values, strict=True) if value != filler(n)]
            if wrong:
                proof.failures.append(f"ballast {wrong[:3]} changed")
    return proof


def _check_churn(proof: Proof, connection: Connection, client: int, count: int) -> None:
    """Each key holds the value of the last write to it that the list has."""
    last = list(range(max(0, count - NR_CHURN_KEYS), count))
    for start in range(0, len(last), 200):
        part = last[start : start + 200]
        values = connection.pipeline([("GET", churn_key(client, n)) for n in part])
        proof.nr_values += len(part)
        for number, value in zip(part, values, strict=True):
            if value != churn_value(client, number):
                proof.failures.append(f"client {client}: the value of write {number} does not fit the list")
                return
