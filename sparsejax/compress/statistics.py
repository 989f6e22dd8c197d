"""What is measured of calibration activations, on the host: exact quantiles and second moments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# Entries that are sorted at most; a longer sample is thinned to every n-th row first.
LARGEST_SAMPLE = 2**27


class Quantiles:
    """Quantiles of a sample of scores: t = inf {t : P(score <= t) >= s}, so that score > t keeps 1 - s of the sample."""

    def __init__(self, scores: Any):
        """Sort them.

        Args:
          scores: float[..., F], not negative.
        """
        sample = np.asarray(scores, np.float32)
        sample = sample.reshape(-1, sample.shape[-1]) if sample.ndim > 1 else sample.reshape(-1, 1)
        self.sorted = np.sort(sample[:: math.ceil(sample.size / LARGEST_SAMPLE)], axis=None)

    def __call__(self, sparsity: float) -> float:
        """The threshold that drops this share of the sample; -1 (everything is kept) at 0."""
        rank = math.ceil(sparsity * len(self.sorted))
        return float(self.sorted[rank - 1]) if rank else -1.0


def second_moment(x: Any, skip_first: int = 0) -> np.ndarray:
    """float64 [F, F]: the mean of x x^T over tokens.

    Args:
      x: float[B, T, F].
      skip_first: tokens of each sequence that are left out.
    """
    rows = np.asarray(x, np.float64)[:, skip_first:].reshape(-1, np.shape(x)[-1])
    return rows.T @ rows / len(rows)
