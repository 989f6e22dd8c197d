"""HAWQ, HAWQ-V2: more bits where the loss is curved.

"HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision" (Dong et al., 2019, arXiv 1905.03696), "HAWQ-V2:
Hessian Aware trace-Weighted Quantization of Neural Networks" (Dong et al., 2019, arXiv 1911.03852). A bit allocator for the
weights of linear maps W_i, n_i of them, with the Hessian H_i of the mean loss with respect to W_i:

    loss of map i in format k = s_i / 2 ||Q_k(W_i) - W_i||^2      s_i:  V2  tr(H_i) / n_i     HAWQ  lambda_max(H_i)

V2's sum predicts what all of them add, in nats, at a minimum of the loss; HAWQ's is what each adds at worst. V2 takes the
choice of least loss within a size; here `compress.bits` does, exactly. Where a trace is not above its own error it is taken to
be the error: noise must not make a map free.

    curvature=trace       Hutchinson's draws, one product of H and a random vector each for all maps at once
    curvature=fisher      the Gauss-Newton trace from labels drawn from the model: a gradient per draw, never negative
    curvature=eigenvalue  HAWQ's, by power iteration for each group of maps that share a format (to 1e-3, at most 100 steps)

V2 on activations, and HAWQ's second order for fine-tuning block by block, are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sparsejax.compress.allocators import allocation_tokens
from sparsejax.compress.bit_allocation import Additive, BitProblem, in_pieces, tied_maps
from sparsejax.compress.curvature import Curvature, estimate
from sparsejax.compress.recipe import Tier
from sparsejax.plugs import check, check_choice

CURVATURES = ("trace", "fisher", "eigenvalue")


@dataclass(frozen=True)
class Hawq(Additive):
    """curvature: of `CURVATURES`; draws: of traces, on each calibration sequence; budget, menu, tied: see `Additive`."""

    curvature: str = "trace"
    draws: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("hawq: curvature", self.curvature, CURVATURES)
        check(self.draws >= 1, "hawq: draws", self.draws, "must be at least 1")

    def cost(self, sites: Sequence[str], tier: Tier) -> str:
        if self.curvature == "eigenvalue":
            groups = len(tied_maps(sites)) if self.tied else len(sites)
            return f"{groups} x at most 100 products with the Hessian of {tier.allocation_tokens} tokens"
        work = "gradients" if self.curvature == "fisher" else "products with the Hessian"
        return f"{self.draws * tier.sequences} {work} of {tier.length} tokens"

    def losses(self, problem: BitProblem) -> Float[np.ndarray, "N K"]:
        eigenvalue = self.curvature == "eigenvalue"
        per_weight = self._eigenvalues(problem) if eigenvalue else self._traces(problem) / problem.sizes
        return per_weight[:, None] / 2 * problem.squared_errors

    def _traces(self, problem: BitProblem) -> Float[np.ndarray, " N"]:
        of_model = functools.cache(lambda: Curvature(problem.model, problem.sites))
        tokens, key = problem.work.calibration.tokens, self.key(problem, self.curvature, self.draws)

        def measure(row: int) -> np.ndarray:
            draw = of_model().fisher if self.curvature == "fisher" else of_model().traces
            seeds = range(row * self.draws, (row + 1) * self.draws)
            return np.mean([draw(tokens[row : row + 1], seed) for seed in seeds], axis=0)

        names = [f"{self.curvature}-{key}-{row}" for row in range(len(tokens))]
        found = estimate(np.stack(in_pieces(problem, f"{self.curvature} of every map", names, measure)))
        error = np.nan_to_num(found.error)
        told = zip(problem.sites, found.mean.tolist(), error.tolist(), strict=True)
        problem.work.note(self.name, trace_and_error_of={site: [mean, deviation] for site, mean, deviation in told})
        return np.maximum(found.mean, error)

    def _eigenvalues(self, problem: BitProblem) -> Float[np.ndarray, " N"]:
        (values,) = eigenvalues(problem, [allocation_tokens(problem.work)], self.key(problem))
        problem.work.note(self.name, eigenvalue_of=dict(zip(problem.sites, values.tolist(), strict=True)))
        return np.abs(values)


def eigenvalues(problem: BitProblem, splits: Sequence[Int[np.ndarray, "B T"]], key: str) -> Float[np.ndarray, "splits N"]:
    """lambda_max of each map's group on each split of the tokens, with its sign; a piece of work by group and split.

    Args:
      key: of the pieces.
    """
    of_model = functools.cache(lambda: Curvature(problem.model, problem.sites))
    turns = [(split, group) for split in range(len(splits)) for group in range(len(problem.groups))]

    def measure(turn: int) -> np.ndarray:
        split, group = turns[turn]
        return np.array(of_model().eigenvalue(splits[split], problem.groups[group]))

    names = [f"eigenvalue-{key}-{group}-{split}" for split, group in turns]
    values = np.empty((len(splits), len(problem.sites)))
    for (split, group), found in zip(turns, in_pieces(problem, "top eigenvalues", names, measure), strict=True):
        values[split, list(problem.groups[group])] = found[0]
    return values
