# SPDX-License-Identifier: Apache-2.0
"""Runs sessions in forked children and kills them: one JSON request a line in, one JSON answer a line out.

Request: {"session", "pid", "at": N or 0, "delay_us": N or -1, "repeat": N}.  With `at` the child kills itself at the
N-th trace point; with `delay_us` it is killed that long after it began.  Answer: {"killed", "status", "hits", "error"}.
A fork of a warm process costs 2 ms; a fresh interpreter would cost 200.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from checkpointd import tracepoint
from tests.soak import sessions


def _child(request: dict, report: int) -> None:
    names: list[str] = []
    tracepoint.register("*", names.append)
    if request["at"]:
        tracepoint.register("*", lambda name: os.kill(os.getpid(), signal.SIGKILL), at=request["at"])
    if request.get("sig0"):
        from checkpointd.target import rendezvous

        rendezvous.choose_signal = lambda *args, **kwargs: 0  # type: ignore[assignment]
    if request.get("no_vdso"):
        # as on kernels whose vdso fills its pages
        from checkpointd.target import slot

        slot._padding_start = _without_vdso(slot._padding_start)  # type: ignore[assignment]
    error = ""
    try:
        os.write(report, b"+")
        for _ in range(request.get("repeat", 1)):
            if request["session"] == "clean":
                sessions.clean(request["pid"])
            else:
                sessions.ALL[request["session"]](request["pid"])
    except BaseException:
        error = traceback.format_exc()
    os.write(report, json.dumps({"hits": len(names), "names": names, "error": error}).encode())
    os._exit(1 if error else 0)


def _without_vdso(original):
    return lambda mem, vma, vmas: vma.end if vma.path == "[vdso]" else original(mem, vma, vmas)


def serve() -> None:
    stores = os.environ.get("SOAK_STORES")
    for line in sys.stdin:
        request = json.loads(line)
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            _child(request, send)
        os.close(send)
        os.read(receive, 1)
        if request["delay_us"] >= 0:
            until = time.perf_counter() + request["delay_us"] / 1e6
            while time.perf_counter() < until:
                pass
            os.kill(child, signal.SIGKILL)
        report = b""
        while part := os.read(receive, 1 << 16):
            report += part
        os.close(receive)
        _, status = os.waitpid(child, 0)
        if stores:
            for left in Path(stores).iterdir():
                shutil.rmtree(left, ignore_errors=True)
        answer = {"hits": 0, "names": [], "error": ""}
        if report:
            try:
                answer = json.loads(report)
            except ValueError:
                pass
        answer["killed"] = os.WIFSIGNALED(status)
        answer["status"] = status
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
