# SPDX-License-Identifier: Apache-2.0
"""Trains a small network by stochastic gradient descent, for ever; a step's count is the first word of argv[1]."""

import mmap
import struct
import sys
import time

import numpy as np

with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    counter = mmap.mmap(file.fileno(), 4096)

scale = int(sys.argv[2])
rng = np.random.default_rng(1)
data = rng.standard_normal((4000 * scale, 256), dtype=np.float32)
wanted = np.tanh(data @ rng.standard_normal((256, 8), dtype=np.float32))
weights = [
    rng.standard_normal(shape, dtype=np.float32) * 0.05 for shape in ((256, 256 * scale), (256 * scale, 8))
]
moments = [np.zeros_like(weight) for weight in weights]
step = 0
while True:
    rows = rng.integers(0, len(data), 64)
    x = data[rows]
    hidden = np.tanh(x @ weights[0])
    error = hidden @ weights[1] - wanted[rows]
    gradients = [x.T @ ((error @ weights[1].T) * (1 - hidden**2)), hidden.T @ error]
    for weight, moment, gradient in zip(weights, moments, gradients, strict=True):
        moment *= 0.9
        moment += gradient
        weight -= 1e-4 * moment
    step += 1
    counter[:8] = struct.pack("Q", step)
    time.sleep(0.005)
