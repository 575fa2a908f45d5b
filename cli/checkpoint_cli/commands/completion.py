# SPDX-License-Identifier: Apache-2.0
"""`checkpoint completion`."""

from __future__ import annotations

import click

from checkpoint_cli.output import print_document

EPILOG = """\b
example:
  checkpoint completion bash > ~/.local/share/bash-completion/completions/checkpoint
"""


@click.command("completion", short_help="Print a completion script for a shell.", epilog=EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.option("--json", "as_json", is_flag=True, help="Print it as a JSON document.")
def command(shell: str, as_json: bool) -> None:
    """Print a completion script for a shell."""
    from click.shell_completion import get_completion_class  # noqa: PLC0415

    from checkpoint_cli.main import cli  # noqa: PLC0415 - main imports this module

    completion = get_completion_class(shell)
    assert completion is not None
    script = completion(cli, {}, "checkpoint", "_CHECKPOINT_COMPLETE").source()
    if as_json:
        print_document({"shell": shell, "script": script})
    else:
        click.echo(script)
