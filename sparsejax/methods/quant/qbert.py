"""Q-BERT: more bits where the loss is curved, or where parts of the data do not agree on how much.

"Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT" (Shen et al., 2019, arXiv 1909.05840). A bit allocator; with
lambda_j the top eigenvalue of a group's Hessian on the j-th part of the calibration,

    loss of map i in format k = s_i / 2 ||Q_k(W_i) - W_i||^2        s_i = |mean_j lambda_j| + std_j lambda_j

Published: ten parts. The paper ranks by s and chooses bits by hand; the budget is met here as by HAWQ-V2. Its groups along the
outputs of a map (by head) are formats: `int4:asym,group=64,axis=-1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sparsejax.compress.bit_allocation import Additive, BitProblem, tied_maps
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.recipe import Tier
from sparsejax.io.model import Model
from sparsejax.methods.quant.hawq import eigenvalues
from sparsejax.plugs import check


@dataclass(frozen=True)
class Qbert(Additive):
    """parts: of the calibration's sequences; budget, menu, tied: see `Additive`."""

    parts: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.parts >= 2, "qbert: parts", self.parts, "must be at least 2")

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        count = len(calibration.tokens)
        check(count >= self.parts, "qbert: parts", self.parts,
              f"are more than the {count} calibration sequences; raise --calibration-sequences")  # fmt: skip

    def cost(self, sites: Sequence[str], tier: Tier) -> str:
        groups = len(tied_maps(sites)) if self.tied else len(sites)
        tokens = tier.sequences * tier.length // self.parts
        return f"{groups} x {self.parts} parts x at most 100 products with the Hessian of {tokens} tokens"

    def losses(self, problem: BitProblem) -> Float[np.ndarray, "N K"]:
        parts = np.array_split(problem.work.calibration.tokens, self.parts)
        found = eigenvalues(problem, parts, self.key(problem, self.parts))
        mean, spread = found.mean(0), found.std(0)
        told = zip(problem.sites, mean.tolist(), spread.tolist(), strict=True)
        problem.work.note(self.name, eigenvalue_mean_and_std_of={site: [m, s] for site, m, s in told})
        return (np.abs(mean) + spread)[:, None] / 2 * problem.squared_errors
