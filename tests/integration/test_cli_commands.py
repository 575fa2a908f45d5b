# SPDX-License-Identifier: Apache-2.0
"""The real command against a real service with fake agents: results, JSON, exit codes, signals."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import stat
import subprocess
import sys

import pytest

from tests.service_harness import House, events_until, is_gone, sleeping_target, wait_until


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    found = House(tmp_path_factory.mktemp("house"))
    found.serve()
    yield found
    found.close()


@pytest.fixture
def target():
    with sleeping_target() as pid:
        yield pid


def last_image(house):
    return house.checkpoint_json("ls")["images"][-1]


def error_of(done):
    return json.loads(done.stderr.splitlines()[-1])


def test_a_day_in_the_life_of_a_process(house, target):
    done = house.checkpoint("dump", "-p", str(target))
    assert done.returncode == 0, done.stderr
    assert f"(full) of pid {target}" in done.stdout
    first = last_image(house)
    done = house.checkpoint("dump", "-p", str(target), "--incremental", "--tag", "second")
    assert f"incremental, parent {first['id'][:12]}" in done.stdout
    assert "a warning" in done.stderr
    listed = house.checkpoint("ls").stdout
    assert listed.splitlines()[0].split() == [
        "ID",
        "PARENT",
        "CREATED",
        "PID",
        "NAME",
        "BACKEND",
        "PAGES",
        "DELTAS",
        "STORED",
        "TAG",
    ]
    assert "second" in listed
    shown = house.checkpoint("show", "tag:second").stdout
    assert f"parent   {first['id']}" in shown
    assert "1 image whole" in house.checkpoint("verify", "latest").stdout
    assert f"pid {target} is no longer tracked" in house.checkpoint("untrack", "-p", str(target)).stdout
    assert "removed" in house.checkpoint("rm", "latest~1").stdout
    assert house.checkpoint("show", "tag:second").returncode == 0


def test_quiet_prints_what_was_asked_for_and_nothing_else(house, target):
    done = house.checkpoint("dump", "-p", str(target), "-q")
    assert done.stdout == last_image(house)["id"] + "\n"
    assert house.checkpoint("ls", "-q").stdout.splitlines()[-1] == last_image(house)["id"]
    assert house.checkpoint("restore", "latest", "--backend", "none", "-q").stdout == "1\n"


def test_long_commands_print_json_lines(house, target):
    done = house.checkpoint("dump", "-p", str(target), "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["message_type"] for line in lines][:1] == ["started"]
    summary = lines[-1]
    assert summary["message_type"] == "summary"
    assert {
        *("image_id", "parent_id", "backend", "backend_reason", "pages_zero", "pages_same", "bytes_raw"),
        *(
            "bytes_stored",
            "pages_scanned",
            "pages_skipped_parent",
            "pages_written",
            "freezing_time",
            "frozen_time",
        ),
    } <= set(summary)
    assert all(isinstance(summary[name], int) for name in ("bytes_raw", "frozen_time", "pages_scanned"))
    lines = house.checkpoint("restore", "latest", "--backend", "none", "--json").stdout.splitlines()
    assert json.loads(lines[-1])["pid"] == 1
    lines = house.checkpoint("verify", "latest", "--json").stdout.splitlines()
    assert json.loads(lines[-1])["image_ids"] == [summary["image_id"]]


def test_short_commands_print_one_document(house, target):
    pid = str(target)
    assert house.checkpoint_json("check")["ok"] is True
    assert house.checkpoint_json("track", "-p", pid, "--backend", "content")["backend"] == "content"
    assert target in [found["pid"] for found in house.checkpoint_json("status")["targets"]]
    assert house.checkpoint_json("untrack", "-p", pid)["pid"] == target
    assert house.checkpoint("dump", "-p", pid, "-q").returncode == 0
    assert house.checkpoint_json("show", "latest")["image"]["pid"] == target
    assert house.checkpoint_json("rm", "latest")["image_ids"]


def test_check_says_what_is_in_the_way(house, target):
    assert "Looks good." in house.checkpoint("check").stdout
    done = house.checkpoint("check", "-p", str(target))
    assert done.returncode == 7
    assert "PROBLEM io_uring: in use" in done.stdout
    assert "stop using it" in done.stdout


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["dump", "-p", "4194309"], 4, "no process with pid 4194309"),
        (["dump", "-p", "0"], 2, "not a pid"),
        (["dump", "-p", "TARGET", "--tag", "exec"], 4, "replaced its program"),
        (["dump", "-p", "TARGET", "--tag", "blocked"], 7, "cannot be saved"),
        (["dump", "-p", "TARGET", "--tag", "die"], 1, "killed by SIGKILL"),
        (["dump", "-p", "TARGET", "--tag", "two\nlines"], 2, "cannot be a tag"),
        (["dump", "-p", "TARGET", "--compress", "lzma"], 2, "compression"),
        (["dump", "-p", "TARGET", "--tag", "wait", "--timeout", "1500ms"], 14, "deadline"),
        (["untrack", "-p", "TARGET"], 2, "not tracked"),
        (["restore", "../../etc/passwd"], 2, "does not name an image"),
        (["restore", "latest~9999"], 9, "latest~9999"),
        (["show", "0123456789"], 9, "no image 0123456789"),
        (["rm", "0123456789"], 9, "no image"),
        (["export", "0123456789", "-o", "x"], 9, "no image"),
        (["export", "latest", "--force", "-o", "/dev/zero"], 2, "not a regular file"),
        (["ls", "--store", "/tmp/\udcff"], 2, "is not UTF-8"),
        (["import", "/nonexistent"], 2, "cannot read"),
        (["import", "/dev/null"], 12, "cannot be used"),
        (["ls", "--store", "/nonexistent/store"], 10, "no store"),
        (["watch", "op-none"], 2, "no operation"),
        (["cancel", "op-none"], 2, "no operation"),
        (["status", "--socket", "/tmp/nonexistent-directory/s"], 20, "no service"),
        (["run", "--", "/nonexistent/program"], 2, "cannot run"),
    ],
)
def test_each_mistake_has_its_sentence_and_its_exit_code(house, target, words, status, sentence, tmp_path):
    words = [str(target) if word == "TARGET" else word for word in words]
    done = house.checkpoint(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) >= 2 or status == 15  # the sentence and the next step
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []
    if words[0] != "run":
        done = house.checkpoint(*words, "--json", cwd=tmp_path)
        error = error_of(done)
        assert (done.returncode, error["exit_code"], error["message_type"]) == (status, status, "error")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_cancels_the_dump(house, target, number, status):
    before = house.agent_notes().count("cancel")
    nr_images = len(house.checkpoint_json("ls")["images"])
    command = house.begin("dump", "-p", str(target), "--tag", "wait", "--json")
    with command:
        events_until(command, lambda event: event.get("phase") == "copying")
        command.send_signal(number)
        assert command.wait(30) == status
        error = json.loads(command.stderr.read())
        assert (error["reason"], error["exit_code"]) == ("CANCELLED", status)
    assert house.agent_notes().count("cancel") == before + 1
    assert len(house.checkpoint_json("ls")["images"]) == nr_images


def test_an_interrupt_says_that_it_was_cancelled(house, target):
    with house.begin("dump", "-p", str(target), "--tag", "wait", "-v") as command:
        for line in command.stderr:
            if line == "copying\n":
                break
        command.send_signal(signal.SIGINT)
        assert command.wait(30) == 130
        assert "was cancelled" in command.stderr.read()


def test_a_killed_command_s_dump_can_be_watched_and_cancelled(house, target):
    with house.begin("dump", "-p", str(target), "--tag", "wait", "--json") as command:
        events = events_until(command, lambda event: event.get("phase") == "copying")
        command.kill()
    operation = events[0]["operation_id"]
    with house.begin("watch", operation, "--json") as watching:
        replayed = events_until(watching, lambda event: event.get("phase") == "copying")
        assert [event["message_type"] for event in replayed] == [event["message_type"] for event in events]
        assert house.checkpoint("cancel", operation).stdout == "cancelled\n"
        assert watching.wait(30) == 15
    assert "failed" in house.checkpoint("status").stdout


def test_an_operation_that_has_ended_can_be_watched(house, target):
    done = house.checkpoint("dump", "-p", str(target), "--json")
    operation = json.loads(done.stdout.splitlines()[0])["operation_id"]
    image_id = last_image(house)["id"]
    assert house.checkpoint("watch", operation).stdout.splitlines()[-1] == (
        f"done: dump of image {image_id[:12]}"
    )


def test_an_export_is_private_whole_and_never_replaces_a_file_by_accident(house, target, tmp_path):
    assert house.checkpoint("dump", "-p", str(target)).returncode == 0
    path = tmp_path / "f.ckpt"
    found = house.checkpoint_json("export", "latest", "-o", str(path))
    assert found["bytes"] == path.stat().st_size
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    done = house.checkpoint("export", "latest", "-o", str(path))
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert path.read_bytes() == before
    assert house.checkpoint("export", "latest", "-o", str(path), "--force").returncode == 0
    done = house.checkpoint("export", "latest", "-o", str(tmp_path / "none" / "f"))
    assert (done.returncode, "No such file" in done.stderr) == (1, True)
    assert os.listdir(tmp_path) == ["f.ckpt"]


STOPPED_EXPORT = """
import contextlib, os, signal, sys, time
from checkpoint_cli import main, options

class Client:
    def export(self, image, store):
        yield b"0" * 64
        yield b"memory"
        assert any(name.endswith(".part") for name in os.listdir("."))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

options.Session.client = lambda session: contextlib.nullcontext(Client())
main.run(["export", "latest", "-o", "f.ckpt"])
"""


def test_an_export_that_is_ended_leaves_no_memory_of_others_behind(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_EXPORT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert os.listdir(tmp_path) == []


def test_export_and_import_work_in_a_pipe(house, target, tmp_path):
    assert house.checkpoint("dump", "-p", str(target)).returncode == 0
    with house.begin("export", "latest", "-o", "-") as exporting:
        done = subprocess.run(
            house.command("import", "-", "--store", str(tmp_path / "s"), "--json"),
            stdin=exporting.stdout,
            env=house.environ,
            capture_output=True,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["image"]["nr_pages"] == 5


@pytest.mark.parametrize("reader", ["head -c 100", "true", "sleep 1", "exec <&-; sleep 2"])
def test_an_export_whose_reader_is_gone_says_so(house, target, reader):
    """However small the image: all of it may lie in the pipe when the reader ends."""
    assert house.checkpoint("dump", "-p", str(target)).returncode == 0
    done = subprocess.run(
        [
            *("bash", "-c", f'"$@" | {{ {reader}; }} > /dev/null; exit ${{PIPESTATUS[0]}}', "bash"),
            *house.command("export", "latest", "-o", "-"),
        ],
        env=house.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == (
        "checkpoint: the reader of the standard output is gone: the export is incomplete"
    )
    assert len(done.stderr.splitlines()) == 2


def test_an_export_ends_when_its_slow_reader_has_all(house, target):
    assert house.checkpoint("dump", "-p", str(target)).returncode == 0
    with house.begin("export", "latest", "-o", "-") as exporting:
        select.select([exporting.stdout], [], [])
        with pytest.raises(subprocess.TimeoutExpired):
            exporting.wait(0.5)
        whole = exporting.stdout.buffer.read()
    assert (exporting.returncode, whole[:4]) == (0, b"CKPT")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_import_that_waits_for_more_can_be_interrupted(house, target, number, status):
    """By Ctrl-C at a terminal, or in a pipe whose writer thinks."""
    assert house.checkpoint("dump", "-p", str(target)).returncode == 0
    before = len(house.checkpoint_json("ls")["images"])
    reads, writes = os.pipe()
    try:
        with subprocess.Popen(
            house.command("import", "-"),
            stdin=reads,
            stderr=subprocess.PIPE,
            env=house.environ,
            # what runs in the background of a shell script has Ctrl-C ignored, and so would the command
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as command:
            try:
                os.write(writes, b"CKPT")
                wait_until(lambda: not select.select([reads], [], [], 0)[0], "the command's reading")
                command.send_signal(number)
                assert command.wait(30) == status
            except BaseException:
                command.kill()  # or it would be waited for
                raise
            assert b"Traceback" not in command.stderr.read()
    finally:
        os.close(reads)
        os.close(writes)
    assert len(house.checkpoint_json("ls")["images"]) == before


def test_what_cannot_be_imported_is_named(house, tmp_path):
    done = house.checkpoint("import", str(tmp_path))
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2,
        f"checkpoint: cannot read {tmp_path}: Is a directory",
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("words", [("ls",), ("ls", "--json"), ("--help",), ("check",)])
def test_an_output_that_cannot_be_written_is_a_failure(house, target, words):
    assert house.checkpoint("dump", "-p", str(target)).returncode == 0
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            house.command(*words), stdout=full, stderr=subprocess.PIPE, env=house.environ, text=True
        )
    assert (done.returncode, "cannot write the output: No space left" in done.stderr) == (13, True)
    assert "Traceback" not in done.stderr
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *house.command(*words)],
        stderr=subprocess.PIPE,
        env=house.environ,
        text=True,
    )
    assert (closed.returncode, "cannot write the output: Bad file" in closed.stderr) == (1, True)
    assert "Traceback" not in closed.stderr


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (("track", "-p", "PID"), 0),
        (("dump", "-p", "PID"), 0),
        (("dump", "-p", "PID", "--tag", "slow", "--max-frozen", "1s", "--json"), 1),
    ],
)
def test_an_output_whose_reader_is_gone_is_told(house, target, words, lines):
    words = [str(target) if word == "PID" else word for word in words]
    with house.begin(*words) as command:
        for _ in range(lines):
            command.stdout.readline()
        command.stdout.close()
        said = command.stderr.read()
    assert command.returncode == 1
    if "--json" in words:
        said = json.loads(said)
        assert (said["reason"], said["exit_code"]) == ("FAILED", 1)
        said = f"checkpoint: {said['message']}\n  {said['hint']}\n"
    assert said.removeprefix("checkpoint: a warning\n") == (
        "checkpoint: cannot write the output: its reader is gone\n  what was asked for may have been done\n"
    )


@pytest.mark.parametrize("words", [("ls",), ("ls", "--json"), ("--help",), ("dump", "--help")])
def test_what_only_shows_ends_without_a_word_when_its_reader_is_gone(house, words):
    with house.begin(*words) as command:
        command.stdout.close()
        assert command.stderr.read() == ""
    assert command.returncode == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_messages_that_cannot_be_written_change_nothing(house, target):
    with open("/dev/full", "wb") as full:
        for words, status in (
            (("ls", "--bad"), 2),
            (("show", "0123456789"), 9),
            (("dump", "-p", str(target)), 0),
        ):
            done = subprocess.run(
                house.command(*words), stdout=subprocess.PIPE, stderr=full, env=house.environ, text=True
            )
            assert done.returncode == status
    assert last_image(house)["id"].startswith(done.stdout.split()[1])


def test_without_standard_streams_nothing_else_takes_their_place(house, target):
    done = subprocess.run(
        [
            "sh",
            "-c",
            'exec "$@" <&- >&- 2>&-',
            "sh",
            *house.command("dump", "-p", str(target), "--tag", "mute"),
        ],
        env=house.environ,
    )
    assert done.returncode == 1
    assert last_image(house)["tag"] == "mute"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_named(house, target):
    assert house.checkpoint("dump", "-p", str(target)).returncode == 0
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            house.command("export", "latest", "-o", "-"),
            stdout=full,
            stderr=subprocess.PIPE,
            env=house.environ,
        )
    assert done.returncode == 13
    assert b"no space left for the standard output" in done.stderr


def test_run_tracks_from_the_start_and_exits_as_the_command_does(house):
    done = house.checkpoint(
        "run", "--", sys.executable, "-c", "import sys; input(); sys.exit(7)", input="x\n"
    )
    assert done.returncode == 7
    assert "is tracked by uffd-wp" in done.stderr
    with house.begin("run", "--json", "--", "sleep", "1000") as command:
        tracked = json.loads(command.stderr.readline())
        assert tracked["pid"] in [found["pid"] for found in house.checkpoint_json("status")["targets"]]
        command.send_signal(signal.SIGTERM)
        assert command.wait(30) == 143
        assert is_gone(tracked["pid"])


def test_precise_is_handed_on(house, target):
    """The real agent answers in tests/vm and in test_service_real_agent.py; here the words only."""
    done = house.checkpoint("run", "--precise", "--", sys.executable, "-c", "input()", input="x\n")
    assert (done.returncode, "is tracked by" in done.stderr) == (0, True)
    house.checkpoint("track", "--precise", "-p", str(target))
    assert house.agent_notes().count("track precise") == 2


def test_a_reader_that_goes_away_is_no_reason_for_a_traceback(house, target):
    assert house.checkpoint("dump", "-p", str(target)).returncode == 0
    with house.begin("show", "latest") as command:
        command.stdout.close()
        assert "Traceback" not in command.stderr.read()


def on_a_terminal(house, *words, **environ):
    """What a command prints on a terminal (stdout and stderr)."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        house.command(*words),
        env={**house.environ, "TERM": "xterm", **environ},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as command:
        os.close(theirs)
        data = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                break
            if not part:
                break
            data += part
        command.wait(30)
    os.close(ours)
    return data


def test_progress_is_for_terminals(house, target):
    words = ("dump", "-p", str(target))
    assert b"dump of" in on_a_terminal(house, *words)
    assert b"\x1b[3" in on_a_terminal(house, *words)
    assert b"\x1b[3" not in on_a_terminal(house, *words, NO_COLOR="1")
    assert b"\x1b" not in on_a_terminal(house, *words, TERM="dumb")
    assert b"\x1b" not in on_a_terminal(house, *words, "-q")
    assert house.checkpoint(*words).stderr == "checkpoint: a warning\n"


def test_an_export_is_not_thrown_at_a_terminal(house, target):
    assert house.checkpoint("dump", "-p", str(target)).returncode == 0
    assert b"not for a terminal" in on_a_terminal(house, "export", "latest", "-o", "-")


def test_image_names_are_completed(house, target):
    assert house.checkpoint("dump", "-p", str(target), "--tag", "comp").returncode == 0
    environ = {
        **house.environ,
        "_CHECKPOINT_COMPLETE": "bash_complete",
        "COMP_WORDS": "checkpoint show ",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(house.command(), env=environ, capture_output=True, text=True)
    words = [line.split(",", 1)[1] for line in done.stdout.splitlines()]
    assert "latest" in words
    assert "tag:comp" in words
    assert last_image(house)["id"][:12] in words


def test_serve_runs_in_the_foreground_and_can_be_stopped(tmp_path):
    house = House(tmp_path)
    with house.begin("serve", "--", "--idle-exit", "600") as serving:
        wait_until(
            lambda: house.socket.exists() and house.checkpoint("status").returncode == 0, "the service"
        )
        done = house.checkpoint("serve", "--stop")
        assert f"(pid {serving.pid}) has ended" in done.stdout
        assert serving.wait(30) == 0
    with house.begin("serve") as serving:
        wait_until(
            lambda: house.socket.exists() and house.checkpoint("status").returncode == 0, "the service"
        )
        assert house.checkpoint_json("serve", "--stop") == {"pid": serving.pid, "ended": True}
        assert serving.wait(30) == 0


def test_a_command_loads_what_it_needs_and_nothing_heavy(house, target):
    """Counts modules, which a busy machine does not change, instead of seconds."""
    assert house.checkpoint("dump", "-p", str(target)).returncode == 0
    code = (
        "import sys; from checkpoint_cli.main import run\n"
        "assert run(['ls']) == 0\n"
        "heavy = {'numpy', 'rich', 'zstandard', 'xxhash', 'multiprocessing', 'email'} & set(sys.modules)\n"
        "ours = [name for name in sys.modules if name.startswith('checkpointd.') and name.split('.')[1] not in\n"
        "        ('api', 'client', 'errors', 'location', 'version')]\n"
        "sys.exit(f'{heavy} {ours}' if heavy or ours else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=house.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
