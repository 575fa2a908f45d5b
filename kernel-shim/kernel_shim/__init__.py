# SPDX-License-Identifier: Apache-2.0
"""Exact soft-dirty tracking: the patched kernel's switch, a probe, and what stands in for it elsewhere.

* ``switch``: turn precise tracking on and off, for oneself, for a program to be started, or as a description
  of the system call for somebody who can make another process execute it.
* ``probe``: what this kernel can do, found by trying.
* ``emulation``: the merge barrier for kernels without the patch. Pure: it decides, the caller acts.
* ``limits``: how close a process is to the kernel's limit of mappings.

The package imports nothing of checkpointd.
"""
