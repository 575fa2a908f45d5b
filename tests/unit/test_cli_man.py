# SPDX-License-Identifier: Apache-2.0
"""The man pages build and leave no command, option or exit code out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from checkpoint_cli.main import COMMANDS, EXIT_CODES, cli

from checkpointd.service.main import parser

MAN = Path(__file__).parents[2] / "cli" / "man"


@pytest.mark.parametrize("page", ["checkpoint.1", "checkpointd.8"])
def test_the_page_builds_without_a_warning(page):
    pytest.importorskip("docutils", reason="docutils is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "docutils", "--writer=manpage", "--halt=2", str(MAN / f"{page}.rst")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert ".TH" in done.stdout


def test_every_command_and_option_is_described():
    text = (MAN / "checkpoint.1.rst").read_text()
    context = click.Context(cli)
    for name in COMMANDS:
        assert f"\n**{name}**" in text, name
        command = cli.get_command(context, name)
        for parameter in command.params:
            for option in parameter.opts if isinstance(parameter, click.Option) else ():
                assert option in text, (name, option)


def test_every_exit_code_is_described_in_the_same_words():
    text = " ".join((MAN / "checkpoint.1.rst").read_text().split())
    for line in EXIT_CODES.splitlines():
        code, _, words = line.strip().partition("  ")
        if code.isdigit() and int(code) < 128:
            assert f"{code} {words.strip()}" in text, code


def test_every_option_of_the_service_is_described():
    text = (MAN / "checkpointd.8.rst").read_text()
    for action in parser()._actions:
        assert all(option in text for option in action.option_strings), action.option_strings


def test_everybody_is_told_that_an_imported_image_is_code():
    warning = "Restoring an imported image runs the code in it with the credentials it names"
    helped = cli.get_command(click.Context(cli), "import").get_help(click.Context(cli, info_name="import"))
    pages = [MAN / "checkpoint.1.rst", MAN / "checkpointd.8.rst", MAN.parents[1] / "docs" / "image-format.md"]
    for text in (helped, *(page.read_text() for page in pages)):
        assert warning in " ".join(text.split())
