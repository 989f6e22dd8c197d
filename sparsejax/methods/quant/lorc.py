"""LoRC: the error of rounded weights, added back as a product of low rank.

"ZeroQuant-V2: Exploring Post-training Quantization in LLMs" (Yao et al., 2023, arXiv 2303.08302). Wraps whatever rounds the
kernels of linear maps (`Rtn`, `Gptq`, `Hqq`, ...):

    y = x W^ + (x A) B,   D = W - W^       W[in, out], A[in, m], B[m, out] as int8 with a scale for each of the m components

    plain      A B = U_m S_m V_m^T, of D = U S V^T               the least ||D - A B||^2 of rank m (published)
    weighted   A B = L^-T U_m S_m V_m^T, of L^T D = U S V^T      the least tr (D - A B)^T H (D - A B), H = L L^T

with H = X^T X / N + lambda I of what enters the map once the maps before it are compensated, lambda = damping * mean diag H:
the least error of the map's outputs. Costs m (in + out) bytes a map and as many products a token (`bits_per_weight` of the
notes). Published: m = 8. It helps as far as the error is structured: little with small groups at 4 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from sparsejax import nnx_compat
from sparsejax.arrays import LowRank, Sum, dense
from sparsejax.compress.blocks import INPUTS, Blocks
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.recipe import FORMATS, Pass, Tier, Work
from sparsejax.compress.surgery import Placed, chain_at, place
from sparsejax.context import Context, Probe
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import Moment, batches_of, kernel_of, maps_of, second_moments
from sparsejax.methods.quant.gptq import Gptq
from sparsejax.methods.quant.omniquant import OmniQuant
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.methods.sparsity.rsparse import best_low_rank
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.nnx_compat import Weight, weight
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, register
from sparsejax.quantized_arrays import QTensor, qtensor

# One scale for each column of A and each row of B.
OF_A, OF_B = FormatSpec("int8"), FormatSpec("int8", "token")


@register("weight_op", "low_rank")
@dataclass(frozen=True)
class LowRankUpdate:
    """w + A B, multiplied as two products beside the weight's own."""

    rank: int

    def __post_init__(self) -> None:
        check(self.rank >= 1, "low_rank: rank", self.rank, "must be at least 1")

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """a [in, rank] and b [rank, out], at first zeros; QTensors in their place are multiplied as they lie."""
        *lead, rows, columns = shape
        return {
            "a": weight(jnp.zeros((*lead, rows, self.rank), jnp.float32), (*axes[:-1], None), "adapter"),
            "b": weight(jnp.zeros((*lead, self.rank, columns), jnp.float32), (*axes[:-2], None, axes[-1]), "adapter"),
        }

    def __call__(self, arrays: dict[str, Any], w: Any, ctx: Context) -> Sum:
        return Sum(w, LowRank(arrays["a"], arrays["b"]))


def compensation(
    error: Float[np.ndarray, "in out"], rank: int, hessian: Float[np.ndarray, "in in"] | None = None
) -> tuple[Float[np.ndarray, "in rank"], Float[np.ndarray, "rank out"]]:
    """A and B of the module docstring, float32: weighted where a positive definite H is given, else plain."""
    if hessian is None:
        return best_low_rank(error, rank)
    lower = np.linalg.cholesky(hessian)
    a, b = best_low_rank(lower.T @ error, rank)
    return scipy.linalg.solve_triangular(lower, a, lower=True, trans="T").astype(np.float32), b


def damped(moment: Float[np.ndarray, "in in"], damping: float) -> Float[np.ndarray, "in in"]:
    """H: the moment and a ridge, which is the identity for inputs that are always zero."""
    ridge = damping * float(np.trace(moment)) / len(moment)
    return moment + (ridge or 1.0) * np.eye(len(moment))


@dataclass
class Lorc(Pass):
    """base: the pass that rounds; rank: m; weighted: by the second moment of inputs, else plain; damping: of that moment."""

    base: Pass = field(default_factory=Rtn)
    rank: int = 8
    weighted: bool = True
    damping: float = 0.01
    stage: ClassVar[str] = FORMATS

    def check(self, config: ModelConfig) -> None:
        glob = getattr(self.base, "sites", "")
        stands = isinstance(self.base, Rtn | Gptq | OmniQuant)  # what it stores stands for the kernel as it was
        check(stands and glob, "lorc: base", self.base, "does not only round kernels; allowed are Rtn, Hqq, Gptq, OmniQuant")
        self.base.check(config)
        check(self.rank >= 1, "lorc: rank", self.rank, "must be at least 1")
        check(self.damping > 0, "lorc: damping", self.damping, "must be positive")
        shapes = rule_sites(config)["weights"]
        for site in maps_of(config, glob):
            least = min(shapes[site])
            check(self.rank <= least, f"lorc: {site}: rank", self.rank, f"is above {least}, the rank of the map itself")

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        self.base.check_inputs(model, calibration)

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        runs = f", {config.num_layers} blocks x 5 passes of {tier.sequences * tier.length:,} tokens" if self.weighted else ""
        return f"{self.base.cost(config, tier)}{runs}, a decomposition for each map".lstrip(", ")

    def apply(self, model: Model, work: Work) -> Model:
        sites = maps_of(model.config, self.base.sites)  # type: ignore[attr-defined]
        fit = _Fit(self, model, self.base.apply(model, work), sites, work)
        found: dict[str, Any] = {}
        for layer in work.layers(self.name, len(fit.blocks)):
            here = [site for site in sites if site.split(".")[1] == str(layer)]
            factors = work.piece(f"factors{layer}", partial(fit.block, layer, here)) if here else {}
            found |= factors
            fit.leave(layer, factors)
        factors = {name: value for name, value in found.items() if isinstance(value, QTensor)}
        left = {site: float(found[f"{site}:left"]) for site in sites}
        added = sum(tensor.nbytes for tensor in factors.values())
        kernels = [fit.placed.parameter(f"{site}.kernel") for site in sites]
        stored, weights = sum(kernel.nbytes for kernel in kernels), sum(np.prod(kernel.shape) for kernel in kernels)
        work.note(self.name, rank=self.rank, weighted=self.weighted, factor_bytes=added,
                  bits_per_weight=float(8 * (stored + added) / weights), error_left_of=left)  # fmt: skip
        return fit.placed.rebuilt(fit.placed.config, factors)


class _Fit:
    """Factors block by block, each block fed by those that are compensated already."""

    def __init__(self, options: Lorc, model: Model, rounded: Model, sites: Sequence[str], work: Work):
        self.options, self.model, self.rounded, self.work = options, model, rounded, work
        self.at = {site: f"{site}.weights.{len(chain_at(rounded.config, 'weights', site))}" for site in sites}
        shapes = rule_sites(model.config)["weights"]
        plan = {site: Placed(f"low_rank:{options.rank}", self._none(*shapes[site])) for site in sites}
        self.placed = place(rounded, "weights", plan)
        self.blocks = Blocks(self.placed)
        self.statistic = second_moments(work, full=True)
        self.streams = [self.blocks.embed(tokens) for tokens in batches_of(work.calibration)] if options.weighted else []

    def block(self, layer: int, sites: Sequence[str]) -> dict[str, Any]:
        """The factors of a block by parameter name, and `SITE:left`, the share of the (weighted) squared error that stays."""
        found: dict[str, Any] = {}
        for tap, names in INPUTS.items():
            here = [site for site in sites if site.split(".", 2)[2] in names]
            hessian = self._hessian(layer, tap, found) if here and self.options.weighted else None
            for site in here:
                error = kernel_of(self.model, site) - np.asarray(dense(self.rounded.parameter(f"{site}.kernel")), np.float32)
                a, b = compensation(error, self.options.rank, hessian)
                factors = self._stored(a, b)
                rest = error - np.asarray(LowRank(factors["a"], factors["b"]).dense(), np.float32)
                whole = _square(error, hessian)
                found |= {f"{self.at[site]}.{name}": factor for name, factor in factors.items()}
                found[f"{site}:left"] = np.float64(_square(rest, hessian) / whole if whole else 0.0)
        return found

    def leave(self, layer: int, factors: Mapping[str, Any]) -> None:
        """Go on to what the block gives with these factors."""
        if layer + 1 < len(self.blocks):
            values = self._with(layer, factors)
            self.streams = [self.blocks.run(layer, h, values=values)[0] for h in self.streams]

    def _hessian(self, layer: int, tap: str, factors: Mapping[str, Any]) -> np.ndarray:
        values, total = self._with(layer, factors), None
        for h in self.streams:
            _, stats = self.blocks.run(layer, h, values=values, probes=(Probe(tap, self.statistic.measure),))
            total = self.statistic.fold(total, {name: stat.value for name, stat in stats[tap].items()}, {})
        assert isinstance(total, Moment)
        return damped(total.mean, self.options.damping)

    def _with(self, layer: int, factors: Mapping[str, Any]) -> dict[str, Any]:
        values = jax.tree.map(lambda a: a, self.blocks.values(layer))  # new dicts, the same arrays
        for name, factor in factors.items():
            if isinstance(factor, QTensor):
                nnx_compat.put(values, tuple(name.split(".")[2:]), factor)
        return values

    def _stored(self, a: np.ndarray, b: np.ndarray) -> dict[str, QTensor]:
        factors = {"a": qtensor(jnp.asarray(a, jnp.float32), OF_A), "b": qtensor(jnp.asarray(b, jnp.float32), OF_B)}
        dtype = jnp.dtype(self.model.config.dtype)  # of what is multiplied: rounded once, from float32
        return {name: dataclasses.replace(factor, dtype=dtype) for name, factor in factors.items()}

    def _none(self, inputs: int, outputs: int) -> dict[str, QTensor]:
        rank = self.options.rank
        return self._stored(np.zeros((inputs, rank)), np.zeros((rank, outputs)))


def _square(error: np.ndarray, hessian: np.ndarray | None) -> float:
    """||D||^2, or tr D^T H D."""
    return float(np.sum(error * (error if hessian is None else hessian @ error), dtype=np.float64))
