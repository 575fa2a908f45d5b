# SPDX-License-Identifier: Apache-2.0
"""Run in a guest: `dump DIRECTORY` in one boot, `restore DIRECTORY` in another: a redis moves, by the command alone.

DIRECTORY is what both boots share: the server's working directory, the exported image, and the log of the clients that
wrote all the time.  Prints one JSON document; what goes wrong ends it with a traceback.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import demo.server
from checkpointd.procfs.process import boot_id
from demo.clients import NOT_ACKNOWLEDGED, Client, Life, total_acknowledged
from demo.proof import prove
from demo.resp import Connection
from tests.service_harness import PATIENCE_S, House, house_of_real_agents, wait_until

# a fresh boot has given away the low ones by the time of the restore; small kernels have no more than 4096
FIRST_PID = 3000
BALLAST_BYTES = 4 << 20
NR_CLIENTS, NR_WRITES = 2, 100


def summary(house: House, *words: str) -> dict[str, Any]:
    done = house.checkpoint(*words, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(
        done.stdout.splitlines()[-1] if words[0] in ("dump", "restore") else done.stdout
    )
    return found


def dump(house: House, shared: Path) -> dict[str, Any]:
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(FIRST_PID))
    demo.server.START_SECONDS = PATIENCE_S
    server = demo.server.Server("redis", shared)
    nr_ballast = demo.server.fill(server.port, BALLAST_BYTES)
    gate, stop = threading.Event(), threading.Event()
    clients = [Client(number, server.port, gate, stop) for number in range(NR_CLIENTS)]
    for client in clients:
        client.start()
    gate.set()
    wait_until(lambda: total_acknowledged(clients) >= NR_WRITES, "writes")
    first = summary(house, "dump", "-p", str(server.pid), "--tcp", "close")
    before = total_acknowledged(clients)
    wait_until(lambda: total_acknowledged(clients) >= before + NR_WRITES, "writes after the first dump")
    called = time.monotonic_ns()
    # dead with the image: not one write may have been acknowledged that is not in it
    second = summary(house, "dump", "-p", str(server.pid), "--tcp", "close", "--incremental", "--kill")
    returned = time.monotonic_ns()
    gate.clear()
    stop.set()
    for client in clients:
        client.join(PATIENCE_S)
        assert not client.problem, client.problem
    server.kill()  # reaps it
    summary(house, "export", second["image_id"], "-o", str(shared / "redis.ckpt"))
    log = {
        "pid": server.pid,
        "port": server.port,
        "lives": [dataclasses.asdict(client.lives[-1]) for client in clients],
        "span": [called, returned],
        "nr_ballast": nr_ballast,
    }
    (shared / "log.json").write_text(json.dumps(log))
    return {"pid": server.pid, "acknowledged": total_acknowledged(clients), "dumps": [first, second]}


def restore(house: House, shared: Path) -> dict[str, Any]:
    log = json.loads((shared / "log.json").read_text())
    lives = [Life(**life) for life in log["lives"]]
    imported = summary(house, "import", str(shared / "redis.ckpt"))
    restored = summary(house, "restore", "latest", "--tcp", "close")
    try:
        clients: Any = [SimpleNamespace(number=number) for number in range(len(lives))]
        proof = prove(0, log["port"], clients, lives, *log["span"], log["nr_ballast"])
        with Connection(log["port"]) as connection:
            lengths = [connection("LLEN", f"log:{number}") for number in range(len(lives))]
            for number in range(NR_WRITES):
                connection("SET", f"after:{number}", f"value {number}")
            assert connection("GET", "after:7") == b"value 7"
        lost = [
            sum(at != NOT_ACKNOWLEDGED for at in life.acknowledged_ns[length - life.first :])
            for life, length in zip(lives, lengths, strict=True)
        ]
        next_dump = summary(house, "dump", "-p", str(restored["pid"]), "--tcp", "close", "--incremental")
        with Connection(log["port"]) as connection:
            assert connection("PING") == "PONG"
    finally:
        os.kill(restored["pid"], signal.SIGKILL)
    return {
        "pid": restored["pid"],
        "image": imported["image"]["id"],
        "tracking": restored["tracking"],
        "failures": proof.failures,
        "present": proof.nr_present,
        "must": proof.nr_must,
        "lost": sum(lost),
        "dump": next_dump,
        "warnings": restored["warnings"],
    }


def main() -> None:
    faulthandler.dump_traceback_later(800, exit=True)
    phase, shared = sys.argv[1], Path(sys.argv[2])
    with house_of_real_agents(Path(tempfile.mkdtemp())) as house:
        answer = (dump if phase == "dump" else restore)(house, shared)
    print(json.dumps({"boot": boot_id(), **answer}))


main()
