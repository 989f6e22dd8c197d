"""Random numbers that are a pure function of where they are used: a counter-based generator per (seed, stream, index).

No state is carried from one batch to the next, so that a run can resume at any step on any number of hosts.
"""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, stream: str, index: int = 0, subindex: int = 0) -> np.random.Generator:
    """Philox generator whose key is (seed, stream) and whose counter starts at (index, subindex).

    The low half of the 256-bit counter is left for the draws, so that two indices never share a number.

    Args:
      seed: any integer (taken modulo 2**64).
      stream: what the numbers are for, e.g. `"train/order"`; streams are independent.
      index, subindex: position in the stream, each in [0, 2**64).
    """
    key = np.array([seed % 2**64, zlib.crc32(stream.encode())], np.uint64)
    counter = np.array([0, 0, index, subindex], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
