"""Inter-layer Hessian: which maps can do with few bits, seen together with those that have them already.

"Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization" (Schaefer et al., 2023,
arXiv 2306.04879). A bit allocator between two formats. With d_i = Q_low(W_i) - W_i and the Hessian H of the mean loss

    loss of a set S in the low format = sum_{i in S} I_ii / 2 + sum_{i < j in S} I_ij        I_ij = d_i^T H d_j

Groups of maps that share a format are ordered: next is the one that adds least, I_ii / 2 + sum_{j in S} I_ij, for the bytes
that it saves. How many of them get the low format is found by bisection, the rest in the high one: as many as keep the loss,
measured of the whole rounded model, within `rise` of the float one. So the budget is one of
quality, and few models are evaluated.

The paper estimates its terms from differences of the loss; I_ij by products with the Hessian is exact. Of a model off its
minimum H has negative eigenvalues and the gradient counts too: the order is then worse, the bound, which is measured, holds.
Left out: latency.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sparsejax.compress import bits
from sparsejax.compress.allocators import allocation_tokens
from sparsejax.compress.bit_allocation import (
    BitAllocator,
    BitProblem,
    described,
    in_pieces,
    sizes_of,
    stored_bytes,
    tied_maps,
)
from sparsejax.compress.curvature import Curvature, Stacks
from sparsejax.compress.packed import float_kernel
from sparsejax.compress.recipe import Tier, Work
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check


@dataclass(frozen=True)
class Interlayer(BitAllocator):
    """rise: of the mean loss of the tier's allocation tokens, nats; low, high: the formats; tied: see `Additive`."""

    rise: float = 0.1
    low: str = "int3:asym,group=64"
    high: str = "int8:asym,group=64"
    tied: bool = True

    def __post_init__(self) -> None:
        check(self.rise > 0, "interlayer: rise", self.rise, "must be positive")

    @property
    def specs(self) -> tuple[FormatSpec, ...]:
        return tuple(FormatSpec.parse(text, f"interlayer: {name}") for name, text in (("low", self.low), ("high", self.high)))

    def check(self, config: ModelConfig, sites: Sequence[str]) -> None:
        super().check(config, sites)
        low, high = stored_bytes(config, sites, self.specs).sum(0)
        check(low < high, "interlayer: low", self.low, f"is not smaller than {self.high}: {low:.0f} bytes and {high:.0f}")

    def cost(self, sites: Sequence[str], tier: Tier) -> str:
        groups = len(tied_maps(sites)) if self.tied else len(sites)
        trials = int(np.ceil(np.log2(groups + 1))) + 2
        return f"{groups} products with the Hessian and {trials} evaluations of {tier.allocation_tokens} tokens"

    def plan(self, model: Model, work: Work, sites: Sequence[str]) -> dict[str, FormatSpec]:
        low, high = self.specs
        groups = tuple(tuple(group) for group in bits.groups_of(len(sites), tied_maps(sites) if self.tied else []))
        problem = BitProblem(model, work, tuple(sites), (low, high), groups)
        measure = _Measures(problem, self.key(problem, "pairs"))
        dense = measure.loss(-1)
        rise = measure.loss(0) - dense
        check(rise <= self.rise, "interlayer: rise", self.rise, f"is less than that of {self.high} at all maps, {rise:.4f}")
        pairs = measure.pairs()
        sizes = stored_bytes(model.config, sites, self.specs)
        saved = np.array([(sizes[list(group), 1] - sizes[list(group), 0]).sum() for group in groups])
        measure.order = order_by_marginal(pairs, saved)
        count = largest(len(groups), lambda count: measure.loss(count) - dense <= self.rise)
        chosen = measure.lowered(count)
        plan = {site: low if number in chosen else high for number, site in enumerate(sites)}
        stored = sum(sizes[number, 0 if number in chosen else 1] for number in range(len(sites)))
        work.note(self.name, rise=self.rise, measured_rise=measure.loss(count) - dense, dense_loss=dense,
                  predicted_rise_of_low=float(predicted(pairs, measure.order[:count])),
                  bits_per_weight=float(8 * stored / sizes_of(model.config, sites).sum()), **described(plan),
                  pairs=pairs.tolist(), groups=[[sites[number] for number in group] for group in groups])  # fmt: skip
        return plan


class _Measures:
    """What is measured of a model: pieces of work. order: of groups; the first `count` of them get the low format."""

    def __init__(self, problem: BitProblem, key: str):
        self.problem, self.key, self.order = problem, key, np.arange(len(problem.groups))
        self.tokens = allocation_tokens(problem.work)
        self.of_model = functools.cache(lambda: Curvature(problem.model, problem.sites))

    def loss(self, count: int) -> float:
        """Mean loss with so many groups in the low format and the others in the high one; -1: of the float model."""
        found = self.problem.work.piece(f"loss-{self.key}-{count}", lambda: {"loss": np.asarray(self._loss(count))})
        return float(found["loss"])

    def _loss(self, count: int) -> float:
        if count < 0:
            return self.of_model().loss(self.tokens)
        lowered, (low, high) = self.lowered(count), self.problem.specs
        sites = enumerate(self.problem.sites)
        kernels = {site: self.problem.rounded(site, low if number in lowered else high) for number, site in sites}
        return self.of_model().loss(self.tokens, kernels)

    def lowered(self, count: int) -> set[int]:
        """Numbers of the maps in the low format."""
        return {number for group in self.order[:count] for number in self.problem.groups[group]}

    def pairs(self) -> Float[np.ndarray, "G G"]:
        """I, made symmetric."""
        problem = self.problem
        low = problem.specs[0]

        @functools.cache
        def moves() -> Stacks:
            kernels = {site: float_kernel(problem.model, site) for site in problem.sites}
            return self.of_model().stacked({site: problem.rounded(site, low) - kernel for site, kernel in kernels.items()})

        def measure(number: int) -> np.ndarray:
            return self.of_model().pairs(self.tokens, moves(), problem.groups[number])

        names = [f"pairs-{self.key}-{number}" for number in range(len(problem.groups))]
        rows = np.stack(in_pieces(problem, "pairs of moves", names, measure))
        found = np.stack([rows[:, list(group)].sum(1) for group in problem.groups], 1)
        return (found + found.T) / 2


def predicted(pairs: Float[np.ndarray, "G G"], chosen: Sequence[int] | Int[np.ndarray, " S"]) -> float:
    """What the groups of a set add to the loss together: half the sum of their pairs."""
    return float(pairs[np.ix_(chosen, chosen)].sum()) / 2


def order_by_marginal(pairs: Float[np.ndarray, "G G"], saved: Float[np.ndarray, " G"]) -> Int[np.ndarray, " G"]:
    """The groups in the order in which each adds least to the loss, beside those before it, per byte that it saves."""
    left, order = list(range(len(pairs))), []
    added = np.diag(pairs) / 2
    while left:
        best = min(left, key=lambda group: added[group] / saved[group])
        left.remove(best)
        order.append(best)
        added = added + pairs[:, best]
    return np.array(order, np.int64)


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest count that fits, by bisection; 0 is known to, and what does not fit is taken not to fit when it is larger."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
