"""Relative importance: a weight by the share that it contributes to its output, over the data (2024, arXiv 2410.16151).

Acts on the kernels of linear maps, block by block, each block fed by the pruned blocks before it; no weight is updated:

    R_ij(x) = |w_ij x_i| / (sum_k |w_kj x_k| + |b_j|)        W[in, out]; sum_i R_ij <= 1, and = 1 without a bias
    score_ij = mean_x R_ij + kappa * std_x R_ij

The lowest scores of each output ("output"), of each map, or of all maps together ("global") become zero. A token counts the
same whatever its norm, and an output whatever its scale; without the division and averaged in L2 this is Wanda's score.
The abstract fixes that each weight's contribution is followed over the data set and that pruning uses its distribution. Which
statistic is our reading: the mean, and kappa > 0 so that a weight that matters rarely but much may stay.
With D = |X| |W| + |b| the mean is |W| * (|X|^T D^-1) / N: two products, and no [N, in, out] tensor.
Not here: the regulariser of the paper's pruning-aware training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.compress.recipe import WEIGHTS, Pass, Tier, Work
from sparsejax.context import Context, Stat
from sparsejax.io.model import Model
from sparsejax.io.name_map import parameter_slots
from sparsejax.methods.pruning.pattern import COMPARISONS, Pattern, keep_highest, kept_globally
from sparsejax.methods.pruning.sequential import ALL_MAPS, Statistic, finished, maps_of, prune_in_order, visit_in_order
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check, check_choice


class Contributions(NamedTuple):
    """Mean of R over tokens and the sum of squared distances from it, each [in, out], of `tokens` tokens."""

    mean: np.ndarray
    squares: np.ndarray
    tokens: int

    def joined(self, other: Contributions) -> Contributions:
        """Of both samples together (Welford's update for batches, Chan et al., 1983)."""
        tokens = self.tokens + other.tokens
        shift = other.mean - self.mean
        squares = self.squares + other.squares + shift**2 * (self.tokens * other.tokens / tokens)
        return Contributions(self.mean + shift * (other.tokens / tokens), squares, tokens)

    def score(self, kappa: float) -> Float[np.ndarray, "in out"]:
        """mean + kappa * std."""
        return self.mean + kappa * np.sqrt(self.squares / self.tokens) if kappa else self.mean


def contributions(
    x: Float[Array, "N in"], weight: Float[np.ndarray, "in out"], bias: Float[Array, " out"] | None = None
) -> Contributions:
    """Of a batch of inputs; where nothing reaches an output its weights contribute 0."""
    mean, squares = _contributions(x, weight, bias)
    return Contributions(np.asarray(mean), np.asarray(squares), len(x))


@jax.jit
def _contributions(x: Array, weight: Any, bias: Array | None) -> tuple[Array, Array]:
    x, weight = jnp.abs(x).astype(jnp.float32), jnp.abs(weight).astype(jnp.float32)
    # Tokens are scaled to a largest entry of 1 first: R does not see it, and squares of tiny tokens would underflow.
    largest = jnp.max(x, axis=1, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    reached = x @ weight
    if bias is not None:
        reached += jnp.abs(bias).astype(jnp.float32)[None] / jnp.where(largest > 0, largest, 1)
    inverse = jnp.where(reached > 0, 1 / jnp.where(reached > 0, reached, 1), 0)
    mean = weight * (x.T @ inverse) / x.shape[0]
    second = jnp.square(weight) * (jnp.square(x).T @ jnp.square(inverse))
    return mean, jnp.maximum(second - x.shape[0] * jnp.square(mean), 0)


def _rows(skip: int, tensor: Array, ctx: Context) -> dict[str, Stat]:
    return {"rows": Stat(tensor[:, skip:].reshape(-1, tensor.shape[-1]))}


@dataclass
class RelativeImportance(Pass):
    """pattern: share of zeros, or `n:m`; comparison: output | layer | global; kappa: weight of the deviation; sites."""

    pattern: str = "0.5"
    comparison: str = "output"
    kappa: float = 0.0
    sites: str = ALL_MAPS
    stage: ClassVar[str] = WEIGHTS

    def check(self, config: ModelConfig) -> None:
        pattern = Pattern.parse(self.pattern)
        pattern.check(config, maps_of(config, self.sites))
        check_choice("comparison", self.comparison, COMPARISONS)
        globally = self.comparison == "global"
        check(not (pattern.m and globally), "comparison", self.comparison, f"{self.pattern} is kept within every output")
        check(self.kappa >= 0, "kappa", self.kappa, "must not be negative")

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x 4 passes of {tier.sequences * tier.length:,} tokens"

    def apply(self, model: Model, work: Work) -> Model:
        pattern, sites = Pattern.parse(self.pattern), maps_of(model.config, self.sites)
        if pattern.everything:
            return model
        statistic = Statistic(partial(_rows, work.calibration.spec.skip_first), _fold(model))

        def score(site: str, kernel: np.ndarray, found: dict[str, Contributions]) -> np.ndarray:
            return found[site].score(self.kappa)

        def prune(site: str, kernel: np.ndarray, found: dict[str, Contributions]) -> np.ndarray:
            keep = pattern.keep(jnp.asarray(score(site, kernel, found)), self.comparison)
            return np.where(np.asarray(keep), kernel, 0)

        if self.comparison != "global":
            return prune_in_order(model, work, sites, self.name, statistic, prune)
        scores = visit_in_order(model, work, sites, self.name, statistic, score, replace=False)
        counts = kept_globally(scores.__getitem__, sites, pattern.sparsity)
        kernels = {}
        for site in sites:
            keep = np.asarray(keep_highest(jnp.asarray(scores[site]), counts[site]))
            kernels[site] = np.where(keep, np.asarray(model.parameter(f"{site}.kernel"), np.float32), 0)
        return finished(model, work, self.name, kernels)


def _fold(model: Model) -> Callable[..., dict[str, Contributions]]:
    """Contributions by site, with the biases of the model."""
    slots = parameter_slots(model.module(), model.structure.paths)

    def fold(
        total: dict[str, Contributions] | None, found: Mapping[str, Array], kernels: Mapping[str, np.ndarray]
    ) -> dict[str, Contributions]:
        joined = {}
        for site, kernel in kernels.items():
            bias = model.parameter(f"{site}.bias") if f"{site}.bias" in slots else None
            here = contributions(found["rows"], kernel, bias)
            joined[site] = here if total is None else total[site].joined(here)
        return joined

    return fold
