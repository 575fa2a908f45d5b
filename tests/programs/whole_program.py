# SPDX-License-Identifier: Apache-2.0
"""Keeps a ledger in memory, checks it at every step, and writes each step to the file named on its command line.

A second thread counts too.  A step writes one line "step N ok"; a wrong ledger writes "broken" and ends.
"""

import hashlib
import sys
import threading
import time

SIZE = 4 << 20


def main() -> None:
    ledger = bytearray(SIZE)
    expected: dict[int, int] = {}
    beats = [0]

    def beat() -> None:
        while True:
            beats[0] += 1
            time.sleep(0.005)

    threading.Thread(target=beat, daemon=True).start()
    with open(sys.argv[1], "a", buffering=1) as log:
        step, seen = 0, 0
        while True:
            step += 1
            for n in range(16):
                at = (
                    int.from_bytes(hashlib.blake2b(b"%d.%d" % (step, n), digest_size=8).digest(), "little")
                    % SIZE
                )
                value = (step * 31 + n) % 251 + 1
                ledger[at] = value
                expected[at] = value
            if any(ledger[at] != value for at, value in expected.items()) or beats[0] < seen:
                log.write("broken\n")
                return
            seen = beats[0]
            log.write(f"step {step} ok\n")
            time.sleep(0.01)


main()
