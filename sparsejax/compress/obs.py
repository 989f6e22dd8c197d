"""Optimal brain surgery of a linear map, input by input: what SparseGPT prunes by and GPTQ quantizes by.

With X[N, in] what enters a map W[in, out], replacing row i by q_i costs least when the rows after it make up for the error:

    H = X^T X / N + lambda I,   H^-1 = U^T U with U upper triangular,   lambda = damping * mean diag H
    e_i = (w_i - q_i) / U_ii,      w_j <- w_j - U_ij e_i   for j > i

Papers: SparseGPT (Frantar and Alistarh, 2023, arXiv 2301.00774), GPTQ (Frantar et al., 2022, arXiv 2210.17323). Both walk the
columns of a weight [out, in]; here these are the rows of a kernel [in, out].

The errors are kept, and taken in when a row is reached (w_j - sum_i U_ij e_i, by blocks within blocks) rather than spread as
they arise: the same sums, read once instead of read and written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import scipy.linalg

from sparsejax.plugs import ConfigError

# Rows whose errors are taken in by one product; and, inside them, by one smaller product.
BLOCK, TILE = 128, 16
# Damping is multiplied by 10 until the factor exists, at most this often.
ATTEMPTS = 6


class Factor(NamedTuple):
    """The factor of an inverse Hessian.

    Fields:
      upper: U, float64 [in, in].
      dead: bool[in], inputs that are always zero; their rows of the weight are zeroed.
      damping: the damping that was needed.
    """

    upper: np.ndarray
    dead: np.ndarray
    damping: float


Settle = Callable[[int, np.ndarray], np.ndarray]


class Decide(Protocol):
    """What a row becomes: pruned, quantized or both.

    `decide(rows, pivots, first)` is called when the sweep reaches each `group` of rows, with their values as compensated so far
    (float64 [group, out]), U's diagonal there [group], and the number of the first. It returns `settle(i, row)`, called for
    i = 0, 1, ... of the group with row i as compensated then: the values [out] that it takes.
    """

    @property
    def group(self) -> int: ...

    def __call__(self, rows: np.ndarray, pivots: np.ndarray, first: int) -> Settle: ...


def factor(hessian: np.ndarray, damping: float = 0.01) -> Factor:
    """The damped inverse of a Hessian as U^T U; where rounding leaves H indefinite the damping grows tenfold.

    Args:
      hessian: [in, in], the mean (or any multiple) of x x^T.
      damping: share of the mean diagonal that is added to it.
    Raises:
      ConfigError: not even 10^5 times the damping makes it definite: it holds values that are not finite.
    """
    h = np.array(hessian, np.float64)
    diagonal = np.einsum("ii->i", h)  # a view
    dead = diagonal == 0
    diagonal[dead] = 1
    mean, undamped = diagonal.mean(), diagonal.copy()
    for _ in range(ATTEMPTS):
        diagonal[:] = undamped + damping * mean
        try:
            # H = R R^T with R upper, from the usual factor of H turned upside down; then U = R^-1, and H is never inverted.
            lower = scipy.linalg.cholesky(h[::-1, ::-1], lower=True)
        except (np.linalg.LinAlgError, ValueError):
            damping *= 10
            continue
        upper = scipy.linalg.solve_triangular(lower, np.eye(len(h)), lower=True)[::-1, ::-1]
        return Factor(np.ascontiguousarray(upper), dead, damping)
    raise ConfigError("the Hessian of a map's inputs cannot be factored: its calibration activations are not finite")


def obs_sweep(weight: np.ndarray, inverse: Factor, decide: Decide, block: int = BLOCK) -> np.ndarray:
    """The weight after every row was settled by `decide`, its error made up for by the rows that follow.

    Args:
      weight: [in, out].
      inverse: `factor` of what enters the map.
      decide: see `Decide`.
      block: rows per product; changes speed alone.
    Returns:
      float64 [in, out].
    """
    w = np.array(weight, np.float64)
    w[inverse.dead] = 0
    upper, settled, errors = inverse.upper, np.empty_like(w), np.empty_like(w)
    pivots = np.diag(upper)
    sizes = _nested(decide.group, block)

    def sweep(low: int, rows: np.ndarray, depth: int, settle: Settle | None, first: int) -> None:
        """Settle `rows`, those from `low` on, which hold the errors of all rows before `low` already."""
        for start in range(low, low + len(rows), sizes[depth]):
            stop = min(start + sizes[depth], low + len(rows))
            piece = rows[start - low : stop - low] - upper[low:start, start:stop].T @ errors[low:start]
            if sizes[depth] == decide.group:
                settle, first = decide(piece, pivots[start:stop], start), start
            if sizes[depth] > 1:
                sweep(start, piece, depth + 1, settle, first)
                continue
            assert settle is not None
            settled[start] = settle(start - first, piece[0])
            errors[start] = (piece[0] - settled[start]) / pivots[start]

    sweep(0, w, 0, None, 0)
    return settled


def _nested(group: int, block: int) -> list[int]:
    """Sizes of the pieces within pieces: the group among them, each border of the group a border of what holds it."""
    around = [max(1, block // group) * group] if group < block else []
    return sorted({*around, group, *(size for size in (block, TILE, 1) if size < group), 1}, reverse=True)
