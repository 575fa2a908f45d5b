# SPDX-License-Identifier: Apache-2.0
"""The unit file of docs/operating.md: options the service knows, and nothing that would harm restored processes."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointd.service.main import parser

UNIT = Path(__file__).parents[2] / "docs" / "checkpointd.service"


def service_section():
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(UNIT.read_text())
    return unit["Service"]


def test_the_service_knows_its_options():
    _, *words = shlex.split(service_section()["ExecStart"])
    assert parser().parse_args(words).group == "checkpoint"


def test_restored_processes_outlive_the_service_and_see_the_whole_system():
    section = service_section()
    assert (section["Type"], section["KillMode"], section["OOMPolicy"]) == ("notify", "process", "continue")
    assert (section["RuntimeDirectoryMode"], section["StateDirectoryMode"]) == ("0750", "0700")
    assert [name for name in section if name.startswith(("Protect", "Private", "Restrict", "Memory"))] == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_takes_it(tmp_path):
    copy = tmp_path / "checkpointd.service"
    copy.write_text(UNIT.read_text().replace("/usr/local/bin/checkpointd", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )
    about_it = [line for line in done.stderr.splitlines() if "checkpointd.service" in line]
    assert (done.returncode, about_it) == (0, []), done.stderr
