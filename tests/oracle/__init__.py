# SPDX-License-Identifier: Apache-2.0
"""The oracle: any chain of dumps of any program, flattened, equals what a naive full read saw at each freeze.

::

    history     a seeded generator of commands for tests/programs/oracle_target.c; text that can be kept and replayed
    target      builds, starts and drives that program over FIFOs
    truth       the naive reader: maps, pagemap, mem.  Shares no code with checkpointd
    engine      what is asked of an engine
    binding     checkpointd as such an engine: the one module that knows how it is called
    planted     engines with a known mistake: they show that the oracle sees mistakes
    judge       image against truth, byte for byte and hole for hole
    campaign    play a history, dump at every freeze, judge; shrink a history that fails

``python -m tests.oracle --seconds N --backend uffd-wp`` runs until the time is over.
"""
