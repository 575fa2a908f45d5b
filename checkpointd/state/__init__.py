# SPDX-License-Identifier: Apache-2.0
"""The state of a process other than page contents, as frozen values that survive JSON.

`target/` fills these in (state out), `image/` stores them without looking inside, `restore/` brings them back
(state in).  One module per kind of state; `codec` turns any of them into plain JSON types and back, refusing
what does not fit.  Nothing here does I/O.

::

    ProcessState            process.py     identity, mm layout, credentials, limits, ...
    ├── vmas                memory.py      VmaState[], SharedObject[]
    ├── threads             threads.py     registers, masks, TLS, pending signals, restart blocks
    ├── signals, timers     signals.py
    └── files               files.py       descriptions, descriptors, per-kind detail
"""
