"""Which hidden units of an FFN count as active at a token: what predictors are taught and frequencies are counted of.

An FFN whose non-linearity gives exact zeros says so itself: unit j is active where h_j is not 0. Any other needs a size:

    active_j = |h_j| ||W_down[j]||_2 >= t,   t such that a share `density` of all (token, unit) pairs is active
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Bool, Float

from sparsejax import plugs
from sparsejax.compress.statistics import Quantiles
from sparsejax.models.config import ModelConfig


def has_exact_zeros(config: ModelConfig) -> bool:
    """Whether hidden vectors of this model are sparse by themselves."""
    return bool(plugs.resolve("nonlinearity", config.ffn.activation, "model.ffn.activation").exact_zeros)


def contribution(h: Float[np.ndarray, "N F"], down: Float[np.ndarray, "F D"]) -> Float[np.ndarray, "N F"]:
    """|h_j| ||W_down[j]||: how far the output moves where unit j is left out."""
    return np.abs(h) * np.linalg.norm(np.asarray(down, np.float32), axis=1)[None]


def active(sizes: Float[np.ndarray, "N F"], exact: bool, density: float) -> Bool[np.ndarray, "N F"]:
    """Of contributions; `density` is not read where zeros are exact."""
    return sizes > (0.0 if exact else Quantiles(sizes)(1 - density))


def token_rows(tensor: Float[Array, "B T F"], skip_first: int) -> Float[np.ndarray, "N F"]:
    """float32 rows of all tokens but the first `skip_first` of each sequence."""
    tensor = tensor[:, skip_first:]
    return np.asarray(tensor.reshape(-1, tensor.shape[-1]), np.float32)
