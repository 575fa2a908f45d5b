# SPDX-License-Identifier: Apache-2.0
"""An agent that touches no process: it speaks the protocol and does as the dump's tag says.

Tags: "" makes an image at once; "wait" says phase "copying" and waits to be cancelled, "thawed" says "encoding" too
and waits, "slow" goes on telling progress; "deaf" waits and does not listen to a cancel; "die" kills itself;
"garbage" sends no JSON; "exec" and "blocked" report errors; "malformed" sends a message without the fields it needs.

What happens to it goes as lines to the file $FAKE_AGENT_LOG: "start PID", "cancel", "untrack",
"track precise", "shutdown", "eof".
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
from typing import Any

from checkpointd.agent import protocol
from checkpointd.errors import Cancelled, CheckpointError, TargetExeced, Unsupported
from checkpointd.stats import DumpStats, RestoreStats


def note(line: str) -> None:
    path = os.environ.get("FAKE_AGENT_LOG")
    if path:
        with open(path, "a") as log:
            log.write(line + "\n")


class FakeAgent:
    def __init__(self, channel: protocol.Channel) -> None:
        self.channel = channel
        self.cancelled: queue.Queue[int] = queue.Queue()
        self.last_image = ""

    def serve(self) -> None:
        hello = protocol.hello(os.getpid())
        hello["protocol"] = int(os.environ.get("FAKE_AGENT_PROTOCOL", hello["protocol"]))
        self.channel.send(hello)
        while (message := self.channel.recv()) is not None:
            if message["op"] == "cancel":
                note("cancel")
                self.cancelled.put(message["args"]["request"])
                self.reply(message["id"], {})
            elif message["op"] == "shutdown":
                note("shutdown")
                self.reply(message["id"], {})
                return
            else:
                threading.Thread(target=self.work, args=(message,), daemon=True).start()
        note("eof")

    def reply(self, number: int, value: dict[str, Any]) -> None:
        self.channel.send({"id": number, "event": "result", "value": value})

    def work(self, message: dict[str, Any]) -> None:
        number = message["id"]
        try:
            self.reply(number, getattr(self, "do_" + message["op"])(number, message["args"]))
        except CheckpointError as error:
            self.channel.send({"id": number, "event": "error", "error": error.to_dict()})

    def do_check(self, number: int, args: dict[str, Any]) -> dict[str, Any]:
        checked = protocol.CheckArgs.from_dict(args)
        items = [protocol.CheckItem("ptrace", "required", True, "allowed").to_dict()]
        if checked.pid is not None:
            items.append(protocol.CheckItem("io_uring", "target", False, "in use", "stop using it").to_dict())
        return protocol.CheckResult(items, "uffd-wp", "the kernel has it").to_dict()

    def do_track(self, number: int, args: dict[str, Any]) -> dict[str, Any]:
        track = protocol.TrackArgs.from_dict(args)
        if track.precise:
            note("track precise")
        backend = "uffd-wp" if track.backend == "auto" else track.backend
        return protocol.TrackResult(track.pid, backend, "as asked").to_dict()

    def do_untrack(self, number: int, args: dict[str, Any]) -> dict[str, Any]:
        note("untrack")
        return {}

    def do_dump(self, number: int, args: dict[str, Any]) -> dict[str, Any]:
        dump = protocol.DumpArgs.from_dict(args)
        for phase in ("freezing", "copying"):
            self.channel.send({"id": number, "event": "phase", "phase": phase})
        if dump.tag == "thawed":
            self.channel.send({"id": number, "event": "phase", "phase": "encoding"})
        while dump.tag == "slow":
            self.channel.send({"id": number, "event": "progress", "done": 1, "total": 9, "unit": "bytes"})
            time.sleep(0.05)
        if dump.tag in ("wait", "thawed", "deaf"):
            while dump.tag == "deaf" or self.cancelled.get() != number:
                if dump.tag == "deaf":
                    threading.Event().wait()
            raise Cancelled("the dump was cancelled")
        if dump.tag == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if dump.tag == "garbage":
            self.channel._sock.sendall(b"\x03\0\0\0{{{")
        if dump.tag == "malformed":
            self.channel.send({"id": number, "event": "result"})
        if dump.tag == "exec":
            raise TargetExeced(f"pid {dump.pid} replaced its program during the dump", hint="dump it again")
        if dump.tag == "blocked":
            blockers = [f"fd {fd} is an io_uring" for fd in range(2000)]
            raise Unsupported(f"pid {dump.pid} cannot be saved", hint="see the list", blockers=blockers)
        self.channel.send({"id": number, "event": "progress", "done": 5, "total": 5, "unit": "pages"})
        return self.make_image(dump).to_dict()

    def do_measure(self, number: int, args: dict[str, Any]) -> dict[str, Any]:
        """Sends the record in $FAKE_AGENT_RECORD; after it waits to be cancelled if the first epoch asks for "wait"."""
        measure = protocol.MeasureArgs.from_dict(args)
        with open(os.environ["FAKE_AGENT_RECORD"], encoding="utf-8") as file:
            lines = file.read().splitlines()
        for line in lines:
            self.channel.send({"id": number, "event": "record", "json": line})
        self.channel.send(
            {"id": number, "event": "progress", "done": 1, "total": measure.epochs, "unit": "epochs"}
        )
        if measure.backends == ["wait"]:
            while self.cancelled.get() != number:
                pass
            raise Cancelled("the measurement was cancelled")
        return {"epochs": measure.epochs, "pages_missed": 0, "reason": "done"}

    def make_image(self, dump: protocol.DumpArgs) -> DumpStats:
        import numpy as np

        from checkpointd.image.store import Store

        store = Store.open(dump.store)
        parent_id = (dump.parent or self.last_image) if dump.incremental else ""
        parent = store.load(parent_id) if parent_id else None
        pages = np.arange(100, 105, dtype=np.uint64)
        data = np.random.default_rng().integers(0, 256, (5, 4096), dtype=np.uint8)
        with store.begin(parent=parent, compress=dump.compress or "zstd:1") as builder:
            builder.add_pages(0, pages, data)
            meta = {"pid": dump.pid, "comm": "fake", "tag": dump.tag, "backend": "uffd-wp"}
            info = builder.commit(meta={**meta, "incremental": dump.incremental}, state=b"{}")
        self.last_image = info.id
        return DumpStats(
            image_id=info.id,
            parent_id=info.parent_id,
            pid=dump.pid,
            backend="uffd-wp",
            backend_reason="the kernel has it",
            incremental=dump.incremental,
            pages_scanned=5,
            pages_written=5,
            bytes_raw=5 * 4096,
            bytes_stored=info.bytes_stored,
            frozen_time=1234,
            phases={"copying": 7},
            warnings=["a warning"],
        )

    def do_restore(self, number: int, args: dict[str, Any]) -> dict[str, Any]:
        restore = protocol.RestoreArgs.from_dict(args)
        self.channel.send({"id": number, "event": "phase", "phase": "mapping"})
        pid = int(os.environ.get("FAKE_AGENT_RESTORED", "1"))
        tracking = "" if restore.track_backend == "none" else "uffd-wp"
        return RestoreStats(image_id=restore.image, pid=pid, pages_restored=5, tracking=tracking).to_dict()


if __name__ == "__main__":
    note(f"start {os.getpid()}")
    fd = int(sys.argv[sys.argv.index("--fd") + 1])
    FakeAgent(protocol.Channel(socket.socket(fileno=fd))).serve()
