# SPDX-License-Identifier: Apache-2.0
"""`checkpoint completion`."""

from __future__ import annotations

import click

EPILOG = """\b
example:
  checkpoint completion bash > ~/.local/share/bash-completion/completions/checkpoint
"""


@click.command("completion", short_help="Print a completion script for a shell.", epilog=EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print a completion script for a shell."""
    from click.shell_completion import get_completion_class  # noqa: PLC0415

    from checkpoint_cli.main import cli  # noqa: PLC0415 - main imports this module

    completion = get_completion_class(shell)
    assert completion is not None
    click.echo(completion(cli, {}, "checkpoint", "_CHECKPOINT_COMPLETE").source())
