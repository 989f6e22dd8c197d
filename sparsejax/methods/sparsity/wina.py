"""WINA: entries are chosen by their magnitude times the norm of the weights that they meet.

"WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference" (Chen et al., 2025, arXiv 2505.19427).
Acts on the input of every linear map of a block:

    y = (x * m) W,   m = top-k of |x_j| c_j,   c_j = ||W[j, :]||_2        x[in], W[in, out]

||(x - x * m) W||^2 = sum of x_j^2 c_j^2 over the dropped j wherever the rows of the kernel are orthogonal, and then no mask is
better for any x. The paper makes them orthogonal by rotating into the singular vectors of its k and gate weights: a pass of its
own, which stands before this one in a recipe. Without it the score is free.

Published defaults: top-k, TEAL's greedy allocation with steps of .025. The released code weighs k and gate alone (c = 1 at the
others): `weights="released"`. Left out: its subtraction of the embedding's mean, which changes the function of RMSNorm models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsejax.arrays import dense
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.teal import Teal
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check_choice

WEIGHTS = ("all", "released")


@dataclass
class Wina(Teal):
    """weights: "all": the norms count at every site; "released": at k and gate, as in the paper's code."""

    select: str = "topk"
    weights: str = "all"

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        check_choice("wina: weights", self.weights, WEIGHTS)

    def scales(self, model: Model, sites: Sequence[str]) -> dict[str, np.ndarray]:
        chosen = [site for site in sites if self.weights == "all" or site.endswith((".attn.k", ".gate"))]
        return {site: channel_norms(model, site) for site in chosen}


def channel_norms(model: Model, site: str) -> np.ndarray:
    """c_j: the norm of row j of a site's kernel, float32[in]; of experts, which share it, the root of the mean square."""
    kernel = np.asarray(dense(model.parameter(f"{site}.kernel")), np.float64)
    squares = np.sum(kernel**2, axis=-1)
    return np.sqrt(squares.mean(axis=0) if squares.ndim == 2 else squares).astype(np.float32)
