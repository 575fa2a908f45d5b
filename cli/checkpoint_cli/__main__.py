# SPDX-License-Identifier: Apache-2.0
"""`python -m checkpoint_cli` is `checkpoint`."""

from __future__ import annotations

from checkpoint_cli.main import main

main()
