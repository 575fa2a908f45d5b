# SPDX-License-Identifier: Apache-2.0
"""The command line itself: words, help, exit codes, and what is not imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from checkpoint_cli.main import COMMANDS, EXIT_CODES, cli, report, run
from checkpoint_cli.options import DURATION
from checkpoint_cli.output import duration, size

from checkpointd import errors


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [("200ms", 200_000), ("1.5s", 1_500_000), ("7us", 7), ("2m", 120_000_000), ("1 h", 3.6e9)],
)
def test_times_have_units(text, microseconds):
    assert DURATION.convert(text, None, None) == microseconds


@pytest.mark.parametrize("text", ["200", "", "-1s", "1e3s", "ms", "0s", "99999999999999999999h"])
def test_other_times_are_refused(text):
    with pytest.raises(click.BadParameter):
        DURATION.convert(text, None, None)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_takes_json(name, capsys):
    assert run([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "example:" in text
    assert f"checkpoint {name}" in text
    assert "--json" in text


def test_every_exit_code_is_in_the_help(capsys):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    queue = [errors.CheckpointError]
    while queue:
        cls = queue.pop()
        queue += cls.__subclasses__()
        assert any(line.strip().startswith(f"{cls.exit_code} ") for line in text.splitlines()), cls
    assert "130" in EXIT_CODES


TLS = ("--tls-cert", "c", "--tls-key", "k", "--tls-ca", "a")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["dmp"], "Did you mean 'dump'?"),
        (["--store", "x", "ls"], "options follow the command: checkpoint COMMAND --store"),
        (["dump"], "Missing option"),
        (["dump", "-p", "x"], "not a valid integer"),
        (["dump", "-p", "1", "--backend", "magic"], "is not one of"),
        (["dump", "-p", "1", "--max-frozen", "200"], "write a number and its unit"),
        (["dump", "-p", "1", "--parent", "latest"], "--parent goes with --incremental"),
        (["dump", "-p", "1", "--delta"], "--delta goes with --incremental"),
        (["ls", "--connect", "127.0.0.1", *TLS], "127.0.0.1 is not HOST:PORT"),
        (["ls", "--connect", "127.0.0.1:70000", *TLS], "there is no port 70000"),
        (["ls", *TLS], "give --connect HOST:PORT too"),
        (["restore"], "Missing argument"),
        (["rm"], "Missing argument"),
    ],
)
def test_wrong_words_exit_with_2_and_a_sentence(words, sentence, capsys):
    assert run(words) == 2
    assert sentence in capsys.readouterr().err


def test_wrong_words_are_json_when_json_was_asked_for(capsys):
    assert run(["dump", "--json"]) == 2
    assert '"message_type": "error"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        errors.Unsupported("no", hint="what next", blockers=["one", "two"], blockers_left_out=7),
        errors.RestoreConflict("no", hint="what next", conflicts=["one", "two"], conflicts_left_out=7),
        errors.NotPermitted("no", hint="what next", reasons=["one", "two"], reasons_left_out=7),
        errors.ImageDamaged("no", hint="what next", problems=["one", "two"], problems_left_out=7),
    ],
)
def test_all_reasons_are_told(error, capsys):
    report(error, as_json=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["checkpoint: no", "  - one", "  - two", "  - and 7 more", "  what next"]


def test_a_written_report_is_private(tmp_path):
    record = Path(__file__).parent.parent / "data" / "measurement-v1.jsonl"
    before = os.umask(0o022)
    try:
        assert run(["report", str(record), "-o", str(tmp_path / "out.csv"), "-q"]) == 0
    finally:
        os.umask(before)
    assert (tmp_path / "out.csv").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell, capsys):
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_CHECKPOINT_COMPLETE" in script
    assert run(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shell": shell, "script": script.removesuffix("\n")}


def test_sizes_and_times_read_well():
    assert [size(n) for n in (0, 512, 1536, 5 << 30)] == ["0 B", "512 B", "1.5 KiB", "5.0 GiB"]
    assert [duration(n) for n in (850, 3100, 2_400_000)] == ["850 us", "3.1 ms", "2.4 s"]


@pytest.mark.parametrize("words", [["--help"], ["dump", "--help"], ["--version"]])
def test_nothing_heavy_is_imported_before_it_is_needed(words):
    code = (
        "import sys; from checkpoint_cli.main import run\n"
        f"run({words!r})\n"
        "heavy = {'grpc', 'numpy', 'rich', 'google.protobuf', 'zstandard'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_command_does_not_look_for_garbage_in_what_it_imported():
    """Counts objects, which a busy machine does not change, instead of seconds."""
    code = (
        "import atexit, gc, sys; from checkpoint_cli.main import main\n"
        "sys.argv[1:] = ['ls', '--help']; before = [found['collections'] for found in gc.get_stats()]\n"
        "def tell():\n"
        "    after = [found['collections'] for found in gc.get_stats()]\n"
        "    print(gc.get_freeze_count() > 10_000, after == before, gc.isenabled())\n"
        "atexit.register(tell); main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "True True True"), done.stderr


def test_lists_commands_once():
    assert len(cli.list_commands(click.Context(cli))) == len(set(COMMANDS))


def test_what_would_steer_a_terminal_is_escaped(capsys):
    from checkpoint_cli.output import as_json, print_table, printable_lines

    print_table(("NAME", "TAG"), [("\x1b]0;pwned\x07", "a\nb"), ("caf\udce9", "\u00fcber")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert r"\x1b]0;pwned\x07  a\nb" in lines[1]
    assert r"caf\udce9" in lines[2]
    assert "\u00fcber" in lines[2]
    assert printable_lines("one\ntwo\x1b") == "one\ntwo\\x1b"
    assert as_json({"name": "caf\udce9"}) == r'{"name": "caf\udce9"}'
    assert as_json({"name": "\u00fcber"}) == '{"name": "\u00fcber"}'


@pytest.mark.parametrize(
    ("zone", "when"), [("Asia/Tokyo", "9999-12-31T23:59:59Z"), ("America/New_York", "0001-01-01T00:00:00Z")]
)
def test_a_time_at_the_end_of_the_calendar_can_be_shown(zone, when, monkeypatch):
    from checkpoint_cli.output import local_time

    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert local_time(when).endswith(":59:59" if "9999" in when else ":00:00")
    finally:
        monkeypatch.undo()
        time.tzset()
