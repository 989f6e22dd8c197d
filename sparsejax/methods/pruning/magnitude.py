"""Magnitude pruning: the weights of least absolute value become zero (Han et al., 2015, arXiv 1506.02626).

Acts on the kernels of linear maps; nothing is calibrated and nothing retrained:

    keep_ij = |w_ij| among the largest of its output, of its map, or of all maps        W[in, out]

Published: one threshold by map (its standard deviation times a quality factor), then retraining. The baseline of the pruning
papers compares within a map, which is the default here. n:m keeps the n largest of every m consecutive inputs.
Not here: retraining; for pruning while training see `sr_ste`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from sparsejax.compress.recipe import WEIGHTS, Pass, Work
from sparsejax.io.model import Model
from sparsejax.methods.pruning.pattern import COMPARISONS, Pattern, keep_highest, kept_globally
from sparsejax.methods.pruning.sequential import ALL_MAPS, finished, kernel_of, maps_of
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check, check_choice


@dataclass
class Magnitude(Pass):
    """pattern: share of zeros, or `n:m`; comparison: output | layer | global; sites: of the maps."""

    pattern: str = "0.5"
    comparison: str = "layer"
    sites: str = ALL_MAPS
    stage: ClassVar[str] = WEIGHTS

    def check(self, config: ModelConfig) -> None:
        pattern = Pattern.parse(self.pattern)
        pattern.check(config, maps_of(config, self.sites))
        check_choice("comparison", self.comparison, COMPARISONS)
        globally = self.comparison == "global"
        check(not (pattern.m and globally), "comparison", self.comparison, f"{self.pattern} is kept within every output")

    def apply(self, model: Model, work: Work) -> Model:
        pattern, sites = Pattern.parse(self.pattern), maps_of(model.config, self.sites)
        if pattern.everything:
            return model

        def score(site: str) -> np.ndarray:
            return np.abs(kernel_of(model, site))

        counts = kept_globally(score, sites, pattern.sparsity) if self.comparison == "global" else {}
        kernels = {}
        for number in work.layers(self.name, len(sites)):
            site = sites[number]
            scores = jnp.asarray(score(site))
            keep = keep_highest(scores, counts[site]) if counts else pattern.keep(scores, self.comparison)
            kernels[site] = np.where(np.asarray(keep), kernel_of(model, site), 0)
        return finished(model, work, self.name, kernels)
