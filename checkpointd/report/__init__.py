# SPDX-License-Identifier: Apache-2.0
"""From a recorded measurement to reports: a table, CSV, one HTML page.  Pure: nothing is measured again.

A figure that was not measured is shown as missing, never as zero.  Errors: UsageError for a file that is no
record or of an unknown version.
"""
