# SPDX-License-Identifier: Apache-2.0
"""How accurate dirty trackers are on a running program, against a byte comparison of two full reads.

Promise: the target is frozen once an epoch, read in full and let go; no tracker's word is taken for the truth.
The truth (`truth`) shares no presence or tracking code with what is being judged.  A tracker is judged by what a
restore made of its report would hold: *missed* is every page that would come back wrong.  Numbers that were not
measured are absent, not zero.

What is measured disturbs itself in two ways, both recorded: the full read prolongs every freeze (`truth_us`), and
trackers that look at the same page table bits, or at the merging of VMAs, cannot run side by side.  Those get runs
of their own (`plan`).  Reading content disturbs nobody, so `content` runs beside every other.

`engine` conducts on the thread that traces; `reader` holds both copies of the memory in a process of its own;
`account` is pure.  Records go out as `checkpointd.report.record` describes them.

Errors: everything of checkpointd/errors.py that a freeze may raise; KernelLacks for a backend asked for in vain;
Busy when the memory for two copies is not there.
"""
