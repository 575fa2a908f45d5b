# SPDX-License-Identifier: Apache-2.0
"""Named points of the code at which tests stage races and failures."""

from __future__ import annotations


def hit(name: str) -> None:
    """The code reached the point `name`; does nothing in production."""
