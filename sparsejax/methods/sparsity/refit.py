"""Refit: weights that make up for what is not multiplied. Of this project; follows any pass that selects activations.

Acts on the kernels of linear maps, block by block, each block fed by the refitted sparse ones before it. With x what would
enter a map if this block were dense, and x~ what is multiplied there instead (zeros where it was dropped, and other values
behind maps of the block that are sparse),

    W' = argmin  E w^2 ||x~ W' - x W||^2 + lambda ||W' - W||^2,   lambda = damping * mean diag E w^2 x~ x~^T
       = (A + lambda I)^-1 (C + lambda I) W,   A = E w^2 x~ x~^T,   C = E w^2 x~ x^T              x[N, in], W[in, out]

so that what is kept speaks for what is dropped and correlated with it. W keeps its shape: nothing more is read. SparseGPT
(arXiv 2301.00774) compensates by the same least squares under a mask of the weights. The maps of a block are refitted in the
order in which they are computed, since one that expects the errors of the map before it would be wrong once those are mended.

The errors of earlier blocks are not made up for (x is not the dense model's): they are noise in x~, and a regression on noisy
inputs shrinks what it predicts, block after block. On SmolLM2 at 65 % that left smaller errors and a worse perplexity.
w = 1 / rms(h) of a token, h what leaves the block, since norms divide by it; and `FIRST` times that at the first position,
whose outliers every later token attends to: fitted like any other token, it is lost, and the model with it. Sequences have too
few first positions for that (16 of them under a large weight cost SmolLM2 more on other texts than the refit gained), so that
one token in `FIRST_EVERY` of the calibration is also taken as a sequence of its own.
The selections stay as they were fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from sparsejax.compress.blocks import INPUTS, Blocks
from sparsejax.compress.recipe import COMPENSATION, Pass, Tier, Work
from sparsejax.compress.surgery import chain_at
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS, batches_of, kernel_of, maps_of, with_kernels
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check, register

FIRST, FIRST_EVERY = 4.0, 16


@register("pass", "refit")
@dataclass
class Refit(Pass):
    """damping: of the least squares, as a share of the mean square of an input; sites: the maps."""

    damping: float = 0.3
    sites: str = ALL_MAPS
    stage: ClassVar[str] = COMPENSATION

    def check(self, config: ModelConfig) -> None:
        check(self.damping > 0, "refit: damping", self.damping, "must be positive")
        for site in maps_of(config, self.sites):
            held = chain_at(config, "weights", site)
            check(not held, f"refit: {site}", held, "is what the map multiplies, beside or in place of its kernel")

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x 6 passes of {tier.sequences * tier.length:,} tokens, and a linear system per map"

    def apply(self, model: Model, work: Work) -> Model:
        self.check(model.config)
        if not (model.config.inputs or model.config.neurons):
            return model  # nothing is dropped
        blocks, sites = Blocks(model), maps_of(model.config, self.sites)
        first = work.calibration.tokens.reshape(-1, 1)[::FIRST_EVERY]
        streams = [blocks.embed(tokens) for tokens in (*batches_of(work.calibration), first)]
        kernels: dict[str, np.ndarray] = {}
        for layer in work.layers("refit", len(blocks)):
            here = [site for site in sites if site.split(".")[1] == str(layer)]
            found = work.piece(f"block-{layer}", partial(self._block, blocks, layer, here, streams))
            values = with_kernels(blocks.values(layer), found)
            streams = [blocks.run(layer, h, values=values)[0] for h in streams]
            kernels |= found
        arrays = {f"{site}.kernel": kernel for site, kernel in kernels.items()}
        return model.rebuilt(model.config, {name: jnp.asarray(a, model.parameter(name).dtype) for name, a in arrays.items()})

    def _block(self, blocks: Blocks, layer: int, sites: Sequence[str], streams: Sequence[Array]) -> dict[str, np.ndarray]:
        """The kernels of a block's maps, float32 [in, out] by site, fitted to what enters it."""
        found: dict[str, np.ndarray] = {}
        whole = [blocks.tensors(layer, h, *INPUTS, sparsify=jnp.zeros(h.shape[:2], bool)) for h in streams]
        for tap, names in INPUTS.items():
            maps = {site.split(".", 2)[2]: site for site in sites if site.split(".", 2)[2] in names}
            if not maps:
                continue
            values = with_kernels(blocks.values(layer), found)
            totals = {name: (np.zeros(()), np.zeros(())) for name in maps}  # in float64, each batch's in float32
            for (leaving, tensors), h in zip(whole, streams, strict=True):
                _, kept = blocks.tensors(layer, h, *maps, values=values)
                for name, (a, c) in totals.items():
                    more_a, more_c = _moments(kept[name], tensors[tap], leaving)
                    totals[name] = a + np.asarray(more_a, np.float64), c + np.asarray(more_c, np.float64)
            for name, site in maps.items():
                found[site] = refitted(kernel_of(blocks.model, site), *totals[name], self.damping)
        return found


def refitted(
    kernel: Float[np.ndarray, "in out"], a: Float[np.ndarray, "in in"], c: Float[np.ndarray, "in in"], damping: float
) -> Float[np.ndarray, "in out"]:
    """W' of the module docstring, float32; `c`: rows by what is kept, columns by the dense input."""
    ridge = (damping * np.trace(a) / len(a) or 1.0) * np.eye(len(a))
    return scipy.linalg.solve(a + ridge, (c + ridge) @ kernel.astype(np.float64), assume_a="pos").astype(np.float32)


@jax.jit
def _moments(kept: Array, x: Array, leaving: Array) -> tuple[Array, Array]:
    """Sums over tokens of w^2 x~ x~^T and w^2 x~ x^T, float32 [in, in]."""
    weight = jax.lax.rsqrt(jnp.mean(jnp.square(leaving.astype(jnp.float32)), axis=-1, keepdims=True))
    weight = weight.at[:, 0].multiply(FIRST)
    kept, x = ((weight * one.astype(jnp.float32)).reshape(-1, one.shape[-1]) for one in (kept, x))
    return kept.T @ kept, kept.T @ x
