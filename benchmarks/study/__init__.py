# SPDX-License-Identifier: Apache-2.0
"""`make study`: dirty trackers on real programs under their own load, natively and in kernels of the lab.

Each program is started afresh, loaded by a generator of its own kind and measured by `checkpointd.measure`.  What was
measured is kept in benchmarks/study/records, in the repository, and made only once: an interrupted study goes on where
it was, in any clone.  `render` makes docs/savings.md from the records and from nothing else.
"""
