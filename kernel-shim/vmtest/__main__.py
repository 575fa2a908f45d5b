# SPDX-License-Identifier: Apache-2.0
"""``python -m vmtest``: build kernels of the lab, run commands in them.

Exit status of ``run``: that of the command; 124 if the guest was stopped because its time was up, 125 if it
was lost (panic, reset), 126 if the lab itself failed (no kernel, no QEMU). The last three bring a message.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from . import kbuild, vm

EXIT_TIMEOUT, EXIT_LOST, EXIT_LAB = 124, 125, 126


def end_in_order() -> None:
    """Let SIGTERM end compilers and guests too; they are process groups of their own."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vmtest", description="Build kernels, run a command in one of them."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="the kernels there are, and which are built")
    build = actions.add_parser("build", help="build kernels that are not built yet, print their images")
    build.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(kbuild.NAMES)}, BASE-precise@N")
    build.add_argument("--jobs", type=int, default=2)
    run = actions.add_parser("run", help="run a command in a guest")
    run.add_argument("name", metavar="NAME", help="kernel; built first if necessary")
    run.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds, default 600")
    run.add_argument("--memory", type=int, default=2048, metavar="M", help="MiB, default 2048")
    run.add_argument("--cpus", type=int, default=2)
    run.add_argument("--share", type=Path, metavar="DIR", help="directory the guest may write to")
    run.add_argument("--console", type=Path, metavar="FILE", help="keep the kernel's messages here")
    run.add_argument("--append", default="", metavar="WORDS", help="more words for the kernel command line")
    run.add_argument("--image", type=Path, metavar="BZIMAGE", help="boot this image instead, under that name")
    run.usage = "python -m vmtest run [options] NAME -- CMD [ARG...]"
    return parser


def main(argv: list[str] | None = None) -> int:
    """Carry out one action; see the module for the exit status."""
    parser = _parser()
    words = sys.argv[1:] if argv is None else argv
    # by hand: argparse would take options behind NAME for part of the command
    split = words.index("--") if "--" in words else len(words)
    command = words[split + 1 :]
    options = parser.parse_args(words[:split])
    try:
        if options.action == "list":
            for name in kbuild.NAMES:
                image = kbuild.cached_image(name)
                print(f"{name:20} {image or '-'}")
            return 0
        if options.action == "build":
            for name in options.names:
                print(kbuild.build(name, jobs=options.jobs))
            return 0
        if not command:
            parser.error("run needs a command after --")
        image = options.image or kbuild.build(options.name)
        # with KASAN under emulation ACPI's interpreter runs into its own timeouts, and interrupts are not routed
        append = f"acpi=off {options.append}" if options.name.endswith(kbuild.CHECKING) else options.append
        return vm.run(
            image, command, name=options.name, stdout=sys.stdout.buffer, stderr=sys.stderr.buffer,
            timeout_seconds=options.timeout, memory_mib=options.memory, cpus=options.cpus,
            share=options.share, console_log=options.console, append=append,
        )  # fmt: skip
    except vm.GuestTimeout as error:
        print(f"vmtest: {error}", file=sys.stderr)
        return EXIT_TIMEOUT
    except vm.LostGuest as error:
        print(f"vmtest: {error}", file=sys.stderr)
        return EXIT_LOST
    except (vm.VmError, kbuild.BuildError) as error:
        print(f"vmtest: {error}", file=sys.stderr)
        return EXIT_LAB


if __name__ == "__main__":
    end_in_order()
    sys.exit(main())
