"""Wanda: pruning by weights and activations (Sun et al., 2023, arXiv 2306.11695).

Acts on the kernels of linear maps, block by block, each block fed by the pruned blocks before it; no weight is updated:

    S_ij = |w_ij| * ||x_i||_2        W[in, out]; x_i: all calibration values of input i

Within every output the share `sparsity` of lowest scores becomes zero, or all but n of every m consecutive inputs. That outputs
do not compete with each other is the decisive detail. Equals optimal brain surgery with a diagonal Hessian.
Published: 128 sequences of 2,048 tokens of C4, all maps of all blocks. Inputs that are scaled up while their weights are scaled
down leave the choice as it is.
Not here: the released code's search for a share per output (`use_variant`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from sparsejax.compress.recipe import WEIGHTS, Pass, Tier, Work
from sparsejax.io.model import Model
from sparsejax.methods.pruning.pattern import Pattern
from sparsejax.methods.pruning.sequential import ALL_MAPS, Moment, maps_of, prune_in_order, second_moments
from sparsejax.models.config import ModelConfig


def wanda_mask(
    weight: Float[np.ndarray, "in out"], norms: Float[np.ndarray, " in"], pattern: Pattern
) -> Bool[np.ndarray, "in out"]:
    """True where a weight is kept; `norms` are those of the inputs, up to a common factor."""
    score = jnp.abs(jnp.asarray(weight, jnp.float32)) * jnp.asarray(norms, jnp.float32)[:, None]
    return np.asarray(pattern.keep(score, "output"))


@dataclass
class Wanda(Pass):
    """pattern: share of zeros, or `n:m`; sites: of the maps."""

    pattern: str = "0.5"
    sites: str = ALL_MAPS
    stage: ClassVar[str] = WEIGHTS

    def check(self, config: ModelConfig) -> None:
        Pattern.parse(self.pattern).check(config, maps_of(config, self.sites))

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x 2 passes of {tier.sequences * tier.length:,} tokens"

    def apply(self, model: Model, work: Work) -> Model:
        pattern = Pattern.parse(self.pattern)
        if pattern.everything:
            return model

        def prune(site: str, kernel: np.ndarray, found: Moment) -> np.ndarray:
            return np.where(wanda_mask(kernel, np.sqrt(found.mean), pattern), kernel, 0)

        sites = maps_of(model.config, self.sites)
        return prune_in_order(model, work, sites, self.name, second_moments(work, full=False), prune)
