"""SparseGPT: pruning in one shot with weights that make up for those removed (Frantar and Alistarh, 2023, arXiv 2301.00774).

Acts on the kernels of linear maps, block by block, each block fed by the pruned blocks before it:

    H = 2 X^T X / N + lambda I,   lambda = .01 mean diag H,   H^-1 = U^T U       X[N, in], W[in, out]
    score_ij = w_ij^2 / U_ii^2

Inputs are walked in order (`compress.obs`). For each block of 128 inputs the share `sparsity` of lowest scores, over all its
inputs and outputs, is chosen with the weights as compensated so far; for n:m, m - n of every m inputs when their group is
reached. A weight that goes passes its error on to the inputs after it.
Published: 128 sequences of 2,048 tokens of C4, blocks of 128, damping .01. The factor 2 of H cancels and is left out. Inputs
that are always zero lose their weights. Where H cannot be factored the damping grows tenfold.
Not here: quantizing what is kept in the same sweep; `obs_sweep` takes any decision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from sparsejax.compress.obs import BLOCK, Factor, Settle, factor, obs_sweep
from sparsejax.compress.recipe import WEIGHTS, Pass, Tier, Work
from sparsejax.io.model import Model
from sparsejax.methods.pruning.pattern import Pattern
from sparsejax.methods.pruning.sequential import ALL_MAPS, Moment, maps_of, prune_in_order, second_moments
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check


@dataclass(frozen=True)
class Prune:
    """What `obs_sweep` decides: a weight stays or becomes zero, by the pattern; `block`: inputs whose weights are compared."""

    pattern: Pattern
    block: int = BLOCK

    @property
    def group(self) -> int:
        return self.pattern.m or self.block

    def __call__(self, rows: np.ndarray, pivots: np.ndarray, first: int) -> Settle:
        score = np.square(rows / pivots[:, None])
        keep = _keep_n_of_m(score, self.pattern.n) if self.pattern.m else _keep_share(score, self.pattern.sparsity)
        return lambda i, row: np.where(keep[i], row, 0)


def _keep_n_of_m(score: Float[np.ndarray, "m out"], n: int) -> np.ndarray:
    order = np.argsort(-score, axis=0, kind="stable")
    keep = np.zeros(score.shape, bool)
    np.put_along_axis(keep, order[:n], True, axis=0)
    return keep


def _keep_share(score: Float[np.ndarray, "block out"], sparsity: float) -> np.ndarray:
    count = int(sparsity * score.size)
    keep = np.ones(score.size, bool)
    if count:
        keep[np.argpartition(score, count - 1, axis=None)[:count]] = False
    return keep.reshape(score.shape)


def sparsegpt(weight: Float[np.ndarray, "in out"], inverse: Factor, pattern: Pattern, block: int = BLOCK) -> np.ndarray:
    """The pruned and compensated weight, float64; weights that went are exactly 0."""
    return obs_sweep(weight, inverse, Prune(pattern, block))


@dataclass
class SparseGPT(Pass):
    """pattern: share of zeros, or `n:m`; block: inputs compared together; damping: of the Hessian; sites: of the maps."""

    pattern: str = "0.5"
    block: int = BLOCK
    damping: float = 0.01
    sites: str = ALL_MAPS
    stage: ClassVar[str] = WEIGHTS

    def check(self, config: ModelConfig) -> None:
        Pattern.parse(self.pattern).check(config, maps_of(config, self.sites))
        check(self.block >= 1, "block", self.block, "must be at least 1")
        check(self.damping > 0, "damping", self.damping, "must be positive")

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        passes = f"{config.num_layers} blocks x 2 passes of {tier.sequences * tier.length:,} tokens"
        return f"{passes}, and a sweep over the inputs of every map"

    def apply(self, model: Model, work: Work) -> Model:
        pattern = Pattern.parse(self.pattern)
        if pattern.everything:
            return model
        latest: list[tuple[Moment, Factor]] = []  # maps of one input share its factor

        def prune(site: str, kernel: np.ndarray, found: Moment) -> np.ndarray:
            if not latest or latest[0][0] is not found:
                latest[:] = [(found, factor(found.mean, self.damping))]
            return sparsegpt(kernel, latest[0][1], pattern, self.block).astype(np.float32)

        sites = maps_of(model.config, self.sites)
        return prune_in_order(model, work, sites, self.name, second_moments(work, full=True), prune)
