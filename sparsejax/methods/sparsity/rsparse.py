"""R-Sparse: the few important channels meet the weight itself, all others a low-rank copy of it.

"R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference" (Zhang et al., 2025, arXiv 2504.19449). Acts on the input
and the weight of every linear map of a block:

    y = (x * m) W + (x * (1 - m)) A B,   m = |x_j| c_j > t,   c_j = ||W[j, :]||_2        x[in], W[in, out], A[in, r], B[r, out]

A B is the best approximation of W of rank r. A sparsity s and a ratio rho share the bytes of W between both terms:

    n_c = floor(in (1 - s) rho) channels,  r = floor((in out (1 - s) - n_c out) / (in + out)),  P(|x| c <= t) = 1 - (1 - s) rho

so that rho = 1 is the threshold form of WINA's score and rho = 0 a truncated SVD. With `search` each map has a rho of its own,
found by evolution for the loss on calibration tokens.

Published defaults: rho .95 everywhere is reported to be near the searched optimum; search on 16 x 4096 tokens.
Differs from the released code: |x| c is the score for every rho (theirs drops c at rho = 1); the budget of k and v follows
their own shape; which tokens are sparse is the evaluation's business (theirs leaves the first 90 % dense).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparsejax import nnx_compat, plugs
from sparsejax.arrays import LowRank, Residual, dense
from sparsejax.compress.allocate import evolve
from sparsejax.compress.allocators import allocation_tokens
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.recipe import ACTIVATIONS, Pass, Tier, Work, check_sparsity
from sparsejax.compress.statistics import Quantiles, input_quantiles
from sparsejax.compress.surgery import Placed, chain_at, place, sites_of
from sparsejax.context import Context
from sparsejax.evaluate.scoring import token_scores
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.teal import check_input_sites
from sparsejax.methods.sparsity.wina import channel_norms
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.nnx_compat import Weight, weight

Rho = Mapping[str, float]


@plugs.register("weight_op", "low_rank_residual")
@dataclass(frozen=True)
class LowRankResidual:
    """Entries that activation sparsity drops meet A B instead of nothing; a map of less rank has columns of zeros."""

    rank: int

    def __post_init__(self) -> None:
        plugs.check(self.rank >= 1, "low_rank_residual: rank", self.rank, "must be at least 1")

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """a [in, rank] and b [rank, out], in the compute dtype."""
        *lead, rows, columns = shape
        return {
            "a": weight(jnp.zeros((*lead, rows, self.rank), jnp.float32), (*axes[:-1], None), "adapter"),
            "b": weight(jnp.zeros((*lead, self.rank, columns), jnp.float32), (*axes[:-2], None, axes[-1]), "adapter"),
        }

    def __call__(self, arrays: dict[str, Array], w: Any, ctx: Context) -> Residual:
        return Residual(w, LowRank(arrays["a"], arrays["b"]), None)


@plugs.register("pass", "rsparse")
@dataclass
class RSparse(Pass):
    """sparsity: share of each weight's bytes that a token does not read, the low-rank factors counted as read.

    rho: share of the rest that goes to channels; where the search starts.
    search: one rho per map, by evolution over the tier's generations.
    seed: of the search.
    """

    sparsity: float = 0.5
    rho: float = 0.95
    search: bool = False
    seed: int = 0
    sites: str = "blocks.*.{attn,mlp}.*"
    stage: ClassVar[str] = ACTIVATIONS

    def check(self, config: ModelConfig) -> None:
        check_sparsity(self.sparsity, "rsparse: sparsity")
        plugs.check(0 <= self.rho <= 1, "rsparse: rho", self.rho, "must be in [0, 1]")
        check_input_sites(config, self.sites, "rsparse: sites")

    def apply(self, model: Model, work: Work) -> Model:
        if self.sparsity == 0:
            return model
        fit = Fit(model, work, sites_of(model.config, "inputs", self.sites), self.sparsity)
        rho = dict.fromkeys(fit.sites, self.rho)
        if self.search:
            rho, history = fit.searched(rho, work, self.seed)
            work.note("rsparse", loss_by_generation=history)
        ranks = {site: fit.budget(site, rho[site])[1] for site in fit.sites}
        work.note("rsparse", rho={site: round(value, 4) for site, value in rho.items()}, ranks=ranks)
        return fit.placed(rho, fit.static_ranks([rho]))

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        genomes = tier.population + tier.generations * (tier.population - max(2, tier.population // 4))
        return f"{genomes} losses of {tier.allocation_tokens} tokens" if self.search else ""


def budget(n_in: int, n_out: int, sparsity: float, rho: float) -> tuple[int, int]:
    """(channels n_c, rank r) of the module docstring: n_c out + r (in + out) <= in out (1 - sparsity)."""
    channels = math.floor(n_in * (1 - sparsity) * rho + 1e-9)
    rank = math.floor((n_in * n_out * (1 - sparsity) - channels * n_out) / (n_in + n_out) + 1e-9)
    return channels, max(0, min(rank, n_in, n_out))


def best_low_rank(kernel: Any, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """a [in, rank] and b [rank, out], float32: the product of that rank nearest to the kernel, largest singular values first.

    From the eigenvectors of the smaller Gram matrix, float64: a fifth of the time of an SVD.
    """
    w = np.asarray(kernel, np.float64)
    wide = w.shape[0] <= w.shape[1]
    basis = np.linalg.eigh(w @ w.T if wide else w.T @ w)[1][:, ::-1][:, :rank]
    a, b = (basis, basis.T @ w) if wide else (w @ basis, basis.T)
    return a.astype(np.float32), b.astype(np.float32)


class Fit:
    """What R-Sparse needs of a model at one sparsity: scores' quantiles, and low-rank factors as large as asked for."""

    def __init__(self, model: Model, work: Work, sites: Sequence[str], sparsity: float):
        self.model, self.sites, self.sparsity = model, tuple(sites), sparsity
        self.shapes = {site: rule_sites(model.config)["inputs"][site] for site in sites}
        self.scales = {site: channel_norms(model, site) for site in sites}
        self.quantiles: dict[str, Quantiles] = input_quantiles(Blocks(model), work, sites, self.scales)
        self._factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def budget(self, site: str, rho: float) -> tuple[int, int]:
        """(channels, rank) at a site."""
        return budget(*self.shapes[site], self.sparsity, rho)

    def static_ranks(self, all_rho: Sequence[Rho]) -> dict[str, int]:
        """By site the largest rank that its kind of map has in any layer under any of these: layers share one program."""
        largest: dict[str, int] = {}
        for site in self.sites:
            kind = site.split(".", 2)[2]
            largest[kind] = max(largest.get(kind, 0), *(self.budget(site, rho[site])[1] for rho in all_rho))
        return {site: largest[site.split(".", 2)[2]] for site in self.sites}

    def placed(self, rho: Rho, ranks: Mapping[str, int]) -> Model:
        """The model under these ratios, factors padded with zeros to `ranks`; kinds of maps of rank 0 get none."""
        selected = {site: Placed("threshold:score=weighted", {"threshold": self.threshold(site, rho[site]),
                                                              "scale": self.scales[site]}) for site in self.sites}
        weights = {site: Placed(f"low_rank_residual:{rank}", self.factors(site, rho[site], rank))
                   for site, rank in ranks.items() if rank}
        model = place(self.model, "inputs", selected)
        return place(model, "weights", weights) if weights else model

    def threshold(self, site: str, rho: float) -> np.float32:
        """t of the module docstring; infinity where no channel is in the budget."""
        channels, _ = self.budget(site, rho)
        return np.float32(self.quantiles[site](1 - (1 - self.sparsity) * rho) if channels else np.inf)

    def factors(self, site: str, rho: float, padded: int) -> dict[str, Array]:
        """a and b at a site, zeros beyond its own rank."""
        if site not in self._factors or self._factors[site][0].shape[1] < padded:
            self._factors[site] = best_low_rank(dense(self.model.parameter(f"{site}.kernel")), padded)
        rank, dtype = self.budget(site, rho)[1], self.model.config.dtype
        a, b = self._factors[site]
        used = np.arange(padded) < rank
        return {"a": jnp.asarray(a[:, :padded] * used, dtype), "b": jnp.asarray(b[:padded] * used[:, None], dtype)}

    def searched(self, start: Rho, work: Work, seed: int) -> tuple[dict[str, float], list[float]]:
        """(ratios found by evolution, least loss after each generation); the finished search is kept."""
        tier, genes = work.tier, np.array([start[site] for site in self.sites])

        def search() -> dict[str, np.ndarray]:
            loss = self._loss(work)
            genomes = tier.population + tier.generations * (tier.population - max(2, tier.population // 4))
            with work.progress("search for rho", genomes) as advance:
                settings: dict[str, Any] = dict(population=tier.population, generations=tier.generations, seed=seed)
                best, history = evolve(loss, genes, advance=advance, **settings)
            return {"rho": best, "history": np.array(history)}

        found = work.piece(f"rho-{self.sparsity:g}-{seed}", search)
        return dict(zip(self.sites, map(float, found["rho"]), strict=True)), [float(loss) for loss in found["history"]]

    def _loss(self, work: Work) -> Callable[[np.ndarray], float]:
        """The mean loss on the tokens of an allocation as a function of a genome; compiled once, at the ranks of rho = 0."""
        tokens = jnp.asarray(allocation_tokens(work))
        ranks = self.static_ranks([dict.fromkeys(self.sites, 0.0)])
        placed = self.placed(dict.fromkeys(self.sites, 1.0), ranks)
        measure = jax.jit(lambda values: mean_loss(placed, values, tokens))

        def name(site: str, field: str, array: str) -> str:
            return f"{site}.{field}.{len(chain_at(self.model.config, field, site))}.{array}"

        def loss(genome: np.ndarray) -> float:
            rho = dict(zip(self.sites, map(float, genome), strict=True))
            arrays: dict[str, Any] = {name(site, "inputs", "threshold"): self.threshold(site, rho[site]) for site in self.sites}
            for site in self.sites:
                factors = self.factors(site, rho[site], ranks[site]) if ranks[site] else {}
                arrays |= {name(site, "weights", array): value for array, value in factors.items()}
            return float(measure(placed.rebuilt(placed.config, arrays).values))

        return loss


def mean_loss(model: Model, values: Any, tokens: Array) -> Array:
    """Mean -log p (nats) of the tokens [B, T] but the first of each row; traceable."""
    module = nnx_compat.merge(model.structure, values)
    h, _, _ = module.features({"tokens": tokens[:, :-1]}, Context(mode="prefill"))
    nll, _ = token_scores(module.logits, h.reshape(-1, h.shape[-1]), tokens[:, 1:].reshape(-1), model.config.vocab_size)
    return jnp.mean(nll)
