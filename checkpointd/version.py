# SPDX-License-Identifier: Apache-2.0
"""The product's version.  A plain constant: asking the package metadata costs 20 ms at each start."""

VERSION = "0.1.0"
