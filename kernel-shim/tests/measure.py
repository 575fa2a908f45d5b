# SPDX-License-Identifier: Apache-2.0
"""How many pages soft-dirty reports for real programs, beside how many changed: run it in a guest.

    measure.py default|precise [redis|python ...]

Per workload: the program is filled, then works in cycles. After each cycle, with the program stopped, the private
memory that is present is taken page by page: reported (reads dirty), changed (content differs from the cycle
before, or the page is new), missed (changed and reads clean; must be 0). Then soft-dirty is cleared.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernel_shim import switch

PAGE = 4096
CYCLES = 8
PYTHON = """
import sys
table = {i: [i] * 20 for i in range(60000)}
n = len(table)
print("ready", flush=True)
for line in sys.stdin:
    for i in range(n, n + 2000):
        table[i] = [i] * 20
    n += 2000
    for i in range(0, n, 997):
        table[i][3] = n
    print("done", flush=True)
"""


def present_pages(pid: int) -> tuple[dict[int, bytes], set[int], int]:
    """Content of every present private page, the addresses that read dirty, and the number of VMAs."""
    content: dict[int, bytes] = {}
    dirty: set[int] = set()
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap, open(f"/proc/{pid}/mem", "rb") as memory:
        for line in lines:
            where, perms, *rest = line.split()
            start, end = (int(word, 16) for word in where.split("-"))
            if perms[3] != "p" or "w" not in perms or (rest[-1:] and rest[-1].startswith("[v")):
                continue
            words = struct.unpack(
                f"{(end - start) // PAGE}Q",
                os.pread(pagemap.fileno(), (end - start) // PAGE * 8, start // PAGE * 8),
            )
            for index, word in enumerate(words):
                # present, and not a page of the file
                if word >> 63 & 1 and not word >> 61 & 1:
                    vaddr = start + index * PAGE
                    content[vaddr] = os.pread(memory.fileno(), PAGE, vaddr)
                    if word >> 55 & 1:
                        dirty.add(vaddr)
    return content, dirty, len(lines)


def launch(argv: list[str], precise: bool, **pipes: object) -> subprocess.Popen[str]:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from kernel_shim import switch; switch.exec_precise(sys.argv[2:])"
    )
    start = [sys.executable, "-c", code, str(Path(__file__).resolve().parents[1])] if precise else []
    return subprocess.Popen([*start, *argv], text=True, **pipes)  # type: ignore[call-overload]


def stopped(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)


def observe(name: str, mode: str, pid: int, cycle) -> None:  # type: ignore[no-untyped-def]
    stopped(pid)
    before, _, vmas_before = present_pages(pid)
    Path(f"/proc/{pid}/clear_refs").write_text("4")
    os.kill(pid, signal.SIGCONT)
    reported = changed = missed = 0
    for _ in range(CYCLES):
        cycle()
        stopped(pid)
        after, dirty, vmas = present_pages(pid)
        differ = {vaddr for vaddr, page in after.items() if before.get(vaddr) != page}
        reported += len(dirty)
        changed += len(differ)
        missed += len(differ - dirty)
        before = after
        Path(f"/proc/{pid}/clear_refs").write_text("4")
        os.kill(pid, signal.SIGCONT)
    print(
        f"{name} {mode}: {CYCLES} cycles, present {len(before)}, changed {changed}, reported {reported}, "
        f"missed {missed}, VMAs {vmas_before} -> {vmas}",
        flush=True,
    )


def python_workload(mode: str) -> None:
    with launch(
        [sys.executable, "-c", PYTHON], mode == "precise", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin and child.stdout
        child.stdout.readline()

        def cycle() -> None:
            child.stdin.write("go\n")
            child.stdin.flush()
            child.stdout.readline()

        observe("python", mode, child.pid, cycle)
        child.stdin.close()


def redis_workload(mode: str) -> None:
    socket = f"/tmp/measure-{os.getpid()}.sock"  # noqa: S108
    argv = ["redis-server", "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no"]
    server = launch(argv, mode == "precise", stdout=subprocess.DEVNULL)
    client = ["redis-cli", "-s", socket]
    done = 0

    def fill(count: int) -> None:
        nonlocal done
        commands = "".join(f"SET key:{i} {'x' * 100}{i}\n" for i in range(done, done + count))
        done += count
        subprocess.run(client, input=commands, text=True, stdout=subprocess.DEVNULL, check=True)

    try:
        while not Path(socket).exists():
            time.sleep(0.05)
        fill(40000)
        observe("redis", mode, server.pid, lambda: fill(1000))
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    mode = sys.argv[1]
    workloads = {"python": python_workload, "redis": redis_workload}
    for name in sys.argv[2:] or list(workloads):
        workloads[name](mode)


if __name__ == "__main__":
    if sys.argv[1:2] not in (["default"], ["precise"]):
        sys.exit(__doc__)
    if sys.argv[1] == "precise" and switch.query() is None:
        sys.exit("this kernel has no precise soft-dirty tracking")
    main()
