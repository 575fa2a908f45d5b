# SPDX-License-Identifier: Apache-2.0
"""`make study`: dirty trackers on real programs under their own load, natively and in kernels of the lab.

Each program is started afresh, loaded by a generator of its own kind and measured by `checkpointd.measure`; records are
kept under build/study/WHERE/PROGRAM-N.jsonl and made only once, so that an interrupted study goes on where it was.
`render` makes docs/savings.md from the records and from nothing else.
"""
