# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong, by the command and the real agent: one sentence, the exit code, nothing lost.

Each case says what, which (pid, fd, mapping, file) and what to do next; the target runs on, and the store holds
what it held before.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.service_harness import House, house_of_real_agents, is_gone, wait_until

# counts in the time of a file, so that one can see that it goes on: one call, which holds nothing open that a dump
# could meet and a restore miss
PROGRAM = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
exec(sys.argv[2])
count = 0
while True:
    count += 1
    os.utime(sys.argv[1], ns=(count, count))
    time.sleep(0.005)
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with house_of_real_agents(tmp_path_factory.mktemp("house")) as found:
        yield found


class Target:
    def __init__(self, directory: Path, extra: str = "") -> None:
        self.beat = directory / f"beat-{time.monotonic_ns()}"
        self.beat.touch()
        born = self._count()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.beat), extra],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=directory,
            start_new_session=True,
        )
        self.pid = self.process.pid
        wait_until(lambda: self._count() != born, "the program")

    def _count(self) -> int:
        return self.beat.stat().st_mtime_ns

    def goes_on(self) -> None:
        before = self._count()
        wait_until(lambda: self._count() != before, f"a sign of life of {self.pid}")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def target(tmp_path):
    made = Target(tmp_path)
    yield made
    made.end()


@pytest.fixture
def make_target(tmp_path):
    made = []

    def make(extra):
        made.append(Target(tmp_path, extra))
        return made[-1]

    yield make
    for one in made:
        one.end()


def image_ids(house, *words):
    return house.checkpoint("ls", "-q", *words).stdout.split()


def refused(house, words, status, *phrases):
    """A command that must fail: its exit code, one sentence with these phrases, a next step, the store untouched."""
    before = image_ids(house)
    done = house.checkpoint(*words)
    said = done.stderr
    assert done.returncode == status, (done.returncode, said)
    lines = said.splitlines()
    assert lines[0].startswith("checkpoint: "), said
    assert len(lines) >= 2, f"no next step: {said}"
    assert all(line.startswith("  ") for line in lines[1:]), said
    assert "Traceback" not in said
    for phrase in phrases:
        assert str(phrase) in said, said
    assert done.stdout == ""
    assert image_ids(house) == before
    as_json = house.checkpoint(*words, "--json")
    assert as_json.returncode == status
    error = json.loads(as_json.stderr.splitlines()[-1])
    assert (error["message_type"], error["exit_code"]) == ("error", status)
    assert error["hint"]
    return error


def dumped(house, target, *words):
    done = house.checkpoint("dump", "-p", str(target.pid), "--json", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# -- who can be a target --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["dump", "track"])
def test_no_such_pid(house, verb):
    refused(house, [verb, "-p", str(2**22 + 7)], 4, "no process with pid", 2**22 + 7)


def test_a_thread_is_no_process(house, make_target):
    target = make_target(
        "import threading; threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()"
    )
    (thread,) = [tid for tid in os.listdir(f"/proc/{target.pid}/task") if int(tid) != target.pid]
    refused(house, ["dump", "-p", thread], 2, "is a thread of process", f"-p {target.pid}")
    target.goes_on()


def test_a_kernel_thread(house):
    with contextlib.suppress(OSError):
        if Path("/proc/2/comm").read_text() == "kthreadd\n":
            refused(house, ["dump", "-p", "2"], 7, "process 2 (kthreadd) is a kernel thread")
            return
    pytest.skip("no kernel threads are visible here")


def test_a_zombie(house):
    with subprocess.Popen(["true"]) as zombie:
        wait_until(lambda: is_gone(zombie.pid), "the zombie")
        refused(
            house, ["dump", "-p", str(zombie.pid)], 4, f"process {zombie.pid} (true) has exited", os.getpid()
        )


def test_ourselves(house, target):
    house.checkpoint_json("track", "-p", str(target.pid))
    agent = {t["pid"]: t for t in house.checkpoint_json("status")["targets"]}[target.pid]["agent_pid"]
    for pid in (house.service.pid, agent):
        refused(house, ["dump", "-p", str(pid)], 2, f"{pid} belongs to checkpointd itself")
    target.goes_on()


@pytest.mark.skipif(shutil.which("gdb") is None, reason="no gdb")
def test_a_process_under_gdb(house, target):
    gdb = subprocess.Popen(
        ["gdb", "-q", "-nx", "-ex", "continue", "-p", str(target.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = Path(f"/proc/{target.pid}/status")
        wait_until(lambda: f"TracerPid:\t{gdb.pid}\n" in status.read_text(), "gdb")
        refused(
            house,
            ["dump", "-p", str(target.pid)],
            11,
            f"traced by process {gdb.pid} (gdb)",
            "detach the debugger",
        )
    finally:
        gdb.kill()  # the kernel detaches
        gdb.wait()
    os.kill(target.pid, signal.SIGCONT)
    target.goes_on()
    assert dumped(house, target)["image_id"]


def elf32(code: bytes) -> bytes:
    """The least 32-bit program: one segment, mapped at 0x10000."""
    base, head = 0x10000, 52 + 32
    ident = b"\x7fELF\x01\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, base + head, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    size = head + len(code)
    return header + struct.pack("<IIIIIIII", 1, 0, base, base, size, size, 5, 4096) + code


def test_a_32_bit_program(house, tmp_path):
    program = tmp_path / "tiny32"
    program.write_bytes(elf32(b"\xb8\x1d\x00\x00\x00\xcd\x80\xeb\xf7"))  # pause() for ever
    program.chmod(0o755)
    try:
        process = subprocess.Popen([program])
    except OSError:
        pytest.skip("this kernel runs no 32-bit programs")
    try:
        refused(house, ["dump", "-p", str(process.pid)], 7, f"process {process.pid} (tiny32)", "32-bit")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_a_process_of_another_user(tmp_path_factory, target):
    """A service of user nobody, who may read our interpreter but trace nothing of ours."""
    directory = tmp_path_factory.mktemp("nobody")
    os.chown(directory, 65534, 65534)
    house = House(directory)
    del house.environ["CHECKPOINTD_AGENT"]
    may_read = ("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")
    prefix = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *may_read]
    command = house.command
    house.command = lambda *words: [*prefix, *command(*words)]
    house.environ["HOME"] = str(directory)
    try:
        refused(
            house, ["dump", "-p", str(target.pid)], 5, f"process {target.pid} belongs to uid 0", "as root"
        )
    finally:
        assert house.checkpoint("serve", "--stop").returncode == 0
    target.goes_on()


# -- what cannot be saved -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "needed", "words"),
    [
        ("fd = libc.syscall(425, 4, ctypes.create_string_buffer(120))", "io_uring", "is an io_uring"),
        ("fd = libc.syscall(447, 0)", "memfd_secret", "is memfd_secret"),
    ],
)
def test_state_that_cannot_be_saved_is_named_by_its_descriptor(house, make_target, extra, needed, words):
    target = make_target(extra + "\nif fd < 0: sys.exit(f'none here: {ctypes.get_errno()}')")
    (fd,) = [
        name
        for name in os.listdir(f"/proc/{target.pid}/fd")
        if needed.removeprefix("memfd_") in os.readlink(f"/proc/{target.pid}/fd/{name}")
    ]
    error = refused(house, ["dump", "-p", str(target.pid)], 7, f"process {target.pid}", f"fd {fd} {words}")
    assert len(error["details"]["blockers"]) >= 1
    done = house.checkpoint("check", "-p", str(target.pid))
    assert done.returncode == 7
    assert words in done.stdout
    target.goes_on()


@pytest.mark.parametrize("point", ["dump.freeze", "dump.collect", "dump.collected", "dump.copied"])
def test_a_target_that_is_killed_half_way(tmp_path, target, point):
    """The agent waits at each point until the target was killed."""
    house = House(tmp_path / "own")
    house.directory.mkdir()
    del house.environ["CHECKPOINTD_AGENT"]
    house.serve(CHECKPOINTD_TRACEPOINT=f"{point}=sleep:1500")
    try:
        with house.begin("dump", "-p", str(target.pid)) as command:
            log = house.service_log
            wait_until(lambda: f"started for pid {target.pid}" in log.read_text(), "the agent")
            wait_until(lambda: is_frozen_or_waiting(target.pid, point), "the freeze")
            target.process.kill()
            said = command.communicate(timeout=60)[1]
        assert command.returncode == 4, said
        assert str(target.pid) in said
        assert "Traceback" not in said + log.read_text()
        assert image_ids(house) == []
        wait_until(lambda: house.checkpoint_json("status")["targets"] == [], "the agent's end")
    finally:
        house.close()


def is_frozen_or_waiting(pid, point):
    if point == "dump.freeze":  # just before it: nothing shows from outside
        time.sleep(0.7)
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "t"
    return False


def test_a_target_that_execs_all_the_time(house, tmp_path):
    """Each dump is whole, or refused with a sentence; the program never notices."""
    beat = tmp_path / "beat"
    script = f'n=$((n + 1)); export n; echo $n > {beat}.new; mv {beat}.new {beat}; exec /bin/sh "$0"'
    path = tmp_path / "again"
    path.write_text(script)
    process = subprocess.Popen(["/bin/sh", path], stdin=subprocess.DEVNULL)
    try:
        wait_until(beat.exists, "the program")
        for _ in range(8):
            done = house.checkpoint("dump", "-p", str(process.pid))
            assert "Traceback" not in done.stderr
            assert "unexpected" not in done.stderr
            if done.returncode:
                assert done.returncode in (4, 7, 11), done.stderr
                assert str(process.pid) in done.stderr
            before = beat.read_text()
            wait_until(lambda before=before: beat.read_text() != before, "a sign of life")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


# -- the store ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount a tmpfs")
def test_a_full_disk(house, make_target, tmp_path):
    """No half image stays, the target runs on, and once there is room the next incremental dump is complete."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", mount], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        store = ["--store", str(mount / "store")]
        target = make_target("ballast = bytearray(os.urandom(8 << 20))")
        first = dumped(house, target, *store)
        (mount / "filler").write_bytes(bytes((14 << 20) - (1 << 12)))
        os.kill(target.pid, signal.SIGCONT)
        words = ["dump", "-p", str(target.pid), *store]
        error = refused(house, words, 13, "no space", str(mount))
        assert error["reason"] == "NO_SPACE"
        assert image_ids(house, *store) == [first["image_id"]]
        target.goes_on()
        (mount / "filler").unlink()
        second = dumped(house, target, "--incremental", *store)
        assert second["parent_id"] == first["image_id"]
        assert house.checkpoint("verify", *store).returncode == 0
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def test_a_damaged_image(house, target, tmp_path):
    store = tmp_path / "store"
    made = dumped(house, target, "--store", str(store))
    target.end()
    pack = max((store / "packs").iterdir(), key=lambda path: path.stat().st_size)
    flip(pack, pack.stat().st_size // 2)
    words = [made["image_id"][:8], "--store", str(store)]
    refused(house, ["restore", *words], 12, made["image_id"][:12])
    refused(house, ["verify", *words], 12, made["image_id"][:12])
    # what had been begun under its pid is killed; whoever inherits it reaps it
    wait_until(lambda: not Path(f"/proc/{target.pid}").exists(), "the end of the half-made process")


def test_an_unknown_format_version(house, target, tmp_path):
    store = tmp_path / "store"
    made = dumped(house, target, "--store", str(store))
    image = store / "images" / f"{made['image_id']}.img"
    content = bytearray(image.read_bytes())
    content[8:12] = struct.pack("<I", 7)
    image.write_bytes(content)
    refused(house, ["restore", made["image_id"], "--store", str(store)], 12, "version 7")
    assert "DAMAGED" in house.checkpoint("ls", "--store", str(store)).stdout


def test_a_missing_parent(house, target):
    first = dumped(house, target)
    assert house.checkpoint("rm", first["image_id"]).returncode == 0
    refused(
        house,
        ["dump", "-i", "-p", str(target.pid)],
        9,
        f"parent image {first['image_id'][:12]} of process {target.pid}",
        "without --incremental",
    )
    refused(
        house, ["dump", "-i", "--parent", first["image_id"], "-p", str(target.pid)], 9, first["image_id"][:12]
    )
    target.goes_on()
    second = dumped(house, target)
    assert dumped(house, target, "-i")["parent_id"] == second["image_id"]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "images/../x", "..", "a/b", "tag:../x", "latest~x", "latest~-1"]
)
@pytest.mark.parametrize("verb", ["restore", "show", "verify", "rm"])
def test_names_that_are_paths(house, verb, name):
    status = 9 if name == "tag:../x" else 2
    refused(house, [verb, name], status, name)


# -- restore --------------------------------------------------------------------------------------------------


def test_a_pid_that_is_taken_and_by_whom(house, target):
    made = dumped(house, target)
    refused(
        house,
        ["restore", made["image_id"]],
        8,
        f"pid {target.pid} is in use by process {target.pid}",
        "--new-pid",
    )
    target.goes_on()


@pytest.mark.skipif(os.geteuid() != 0, reason="restoring with the same pid needs CAP_CHECKPOINT_RESTORE")
@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_mapped_file_that_is_gone_or_changed(house, make_target, tmp_path, how):
    mapped, held = tmp_path / "mapped.bin", tmp_path / "held.log"
    mapped.write_bytes(b"m" * 8192)
    held.write_bytes(b"first line\n")
    target = make_target(
        f"import mmap; f = open({str(mapped)!r}, 'rb'); area = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ, "
        f"flags=mmap.MAP_PRIVATE); f.close(); held = open({str(held)!r}, 'r+b'); held.seek(5)"
    )
    made = dumped(house, target)
    target.end()
    aside = tmp_path / "aside"
    shutil.copy2(mapped, aside)
    if how == "gone":
        mapped.unlink()
    else:
        mapped.write_bytes(b"x" * 8192)
        os.utime(mapped, ns=(1, 1))
    refused(house, ["restore", made["image_id"]], 8, str(mapped))
    assert not Path(f"/proc/{target.pid}").exists()
    shutil.copy2(aside, mapped)
    held.unlink()
    refused(house, ["restore", made["image_id"]], 8, str(held))
    held.write_bytes(b"first line\n")
    done = house.checkpoint("restore", made["image_id"], "--changed", "allow")
    assert done.returncode == 0, done.stderr
    target.goes_on()
