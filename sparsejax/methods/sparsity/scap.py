"""SCAP: entries near the mode of a tensor are replaced by it (Chua et al., 2024, arXiv 2412.07174).

"Post-training statistical calibration for higher activation sparsity". Acts on the input x of linear maps whose entries peak
at mu, which need not be 0 (behind SiLU or GELU without a gate it is not):

    m = |x - mu| > t,    y = ((x - mu) * m) W + mu W          mu, t: [], one of each per tensor

mu W is a constant that an executor adds as a bias: rows of W outside m are not read. t is the `sparsity`-quantile of |x - mu|
on calibration data; mu = 0 is TEAL's threshold.
mu is the half-sample mode (Robertson and Cryer, 1974), which has no bandwidth; the paper's is that of a kernel density.
Not here: its search over the sparsities of up and down; both are given.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.arrays import Residual
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.recipe import ACTIVATIONS, Pass, Tier, Work, check_sparsity
from sparsejax.compress.statistics import Quantiles, tensor_of
from sparsejax.compress.surgery import Placed, place, sites_of
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.activity import token_rows
from sparsejax.methods.sparsity.selection import Arrays, fitted
from sparsejax.methods.sparsity.teal import check_input_sites
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Weight
from sparsejax.plugs import register

LARGEST_SAMPLE = 2**20  # entries of a tensor that its mode is taken of


@register("weight_op", "centred")
@dataclass(frozen=True)
class Centred:
    """The weight, told that dropped entries of its input stand for `mean`."""

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """mean []."""
        return {"mean": fitted(None)}

    def __call__(self, arrays: Arrays, w: Any, ctx: Context) -> Residual:
        return Residual(w, None, arrays["mean"])


@register("pass", "scap")
@dataclass
class Scap(Pass):
    """One sparsity of all inputs that `sites` names."""

    sparsity: float = 0.5
    sites: str = "blocks.*.mlp.*"
    stage: ClassVar[str] = ACTIVATIONS

    def check(self, config: ModelConfig) -> None:
        check_sparsity(self.sparsity)
        check_input_sites(config, self.sites, "scap: sites")

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x {tier.sequences} x {tier.length} tokens, once"

    def apply(self, model: Model, work: Work) -> Model:
        if self.sparsity == 0:
            return model
        blocks, sites = Blocks(model), sites_of(model.config, "inputs", self.sites)
        maps = tuple(dict.fromkeys(site.split(".", 2)[2] for site in sites))
        tensors = tuple(dict.fromkeys(map(tensor_of, maps)))
        skip, h, found = work.calibration.spec.skip_first, blocks.embed(jnp.asarray(work.calibration.tokens)), {}
        for layer in work.layers("modes and thresholds", len(blocks)):
            h, entering = blocks.tensors(layer, h, *tensors)
            rows = {name: token_rows(x, skip) for name, x in entering.items()}
            piece = work.piece(f"block-{layer}", functools.partial(self._fit, rows))
            found.update({f"blocks.{layer}.{name}": piece[tensor_of(name)] for name in maps})
        found = {site: fit for site, fit in found.items() if site in sites}
        work.note(self.name, modes={site: float(mode) for site, (mode, _) in found.items()})
        modes = {site: {"mean": jnp.asarray(mode)} for site, (mode, _) in found.items()}
        fits = {site: {**modes[site], "threshold": jnp.asarray(threshold)} for site, (_, threshold) in found.items()}
        model = place(model, "inputs", {site: Placed("threshold:score=centred", arrays) for site, arrays in fits.items()})
        return place(model, "weights", {site: Placed("centred", arrays) for site, arrays in modes.items()})

    def _fit(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """(mode, threshold) of each tensor, float32."""
        fits = {}
        for name, x in rows.items():
            mode = np.float32(half_sample_mode(x.reshape(-1)))
            fits[name] = np.array([mode, Quantiles(np.abs(x - mode))(self.sparsity)], np.float32)
        return fits


def half_sample_mode(sample: Float[np.ndarray, " N"]) -> float:
    """The mode of a sample: the shortest interval that holds half of it, and within that again, until two are left."""
    flat = np.asarray(sample, np.float64)
    left = np.sort(flat[:: -(-flat.size // LARGEST_SAMPLE)])
    while len(left) > 2:
        half = -(-len(left) // 2)
        widths = left[half - 1 :] - left[: len(left) - half + 1]
        start = int(np.argmin(widths))
        left = left[start : start + half]
    return float(left.mean())
