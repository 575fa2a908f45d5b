# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: what is promised, beside the physical limit measured in the same run (`python -m benchmarks`).

::

    target.c    holds memory and dirties exactly the share that is asked for
    limits.c    the limits, in the fewest instructions that do the same to the memory
    bench       the cases
    report      medians, ratios, markdown and JSON
"""
