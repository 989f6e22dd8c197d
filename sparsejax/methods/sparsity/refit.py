"""Refit: weights that make up for what is not multiplied. Of this project; follows any pass that selects activations.

Acts on the kernels of linear maps, block by block, each block fed by the refitted sparse ones before it. With x what would
enter a map if this block were dense, and x~ what is multiplied there instead (zeros where it was dropped, and other values
behind maps of the block that are sparse),

    W' = argmin  E w^2 ||x~ W' - x W||^2 + lambda ||W' - W||^2,   lambda = damping * mean diag E w^2 x~ x~^T
       = (A + lambda I)^-1 (C + lambda I) W,   A = E w^2 x~ x~^T,   C = E w^2 x~ x^T              x[N, in], W[in, out]

so that what is kept speaks for what is dropped and correlated with it. W keeps its shape: nothing more is read. SparseGPT
(arXiv 2301.00774) compensates by the same least squares under a mask of the weights. The damping is the one of `DAMPINGS` that
does best where it was not fitted: on each half of the calibration, fitted to the other; the infinite one leaves W as it is. The
maps of a block are refitted in the order in which they are computed, since one that expects the errors of the map before it
would be wrong once those are mended.

The errors of earlier blocks are not made up for (x is not the dense model's): they are noise in x~, and a regression on noisy
inputs shrinks what it predicts, block after block. On SmolLM2 at 65 % that left smaller errors and a worse perplexity.
w = 1 / rms(h) of a token, h what leaves the block, since norms divide by it; and `FIRST` times that at the first position,
whose outliers every later token attends to: fitted like any other token, it is lost, and the model with it. Sequences have too
few first positions for that (16 of them under a large weight cost SmolLM2 more on other texts than the refit gained), so that
one token in `FIRST_EVERY` of the calibration is also taken as a sequence of its own.
The selections stay as they were fitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Int

from sparsejax.compress.blocks import INPUTS, Blocks
from sparsejax.compress.recipe import COMPENSATION, Pass, Tier, Work
from sparsejax.compress.surgery import chain_at
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS, BATCH_TOKENS, kernel_of, maps_of, with_kernels
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check, register

FIRST, FIRST_EVERY = 2.0, 4
DAMPINGS = (0.1, 0.3, 1.0, 3.0, 10.0, math.inf)
Streams = Sequence[Sequence[Array]]  # h [B, T, D] of the batches of both halves


@register("pass", "refit")
@dataclass
class Refit(Pass):
    """sites: the maps."""

    sites: str = ALL_MAPS
    stage: ClassVar[str] = COMPENSATION
    changes_floats: ClassVar[bool] = True

    def check(self, config: ModelConfig) -> None:
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
        sequences = work.calibration.spec.sequences
        check(sequences >= 2, "calibration.sequences", sequences, "must be at least 2: each half judges what the other gives")
        streams = [[blocks.embed(tokens) for tokens in half] for half in _halves(work.calibration.tokens)]
        kernels: dict[str, np.ndarray] = {}
        dampings: dict[str, float] = {}
        for layer in work.layers("refit", len(blocks)):
            here = [site for site in sites if site.split(".")[1] == str(layer)]
            found = work.piece(f"block-{layer}", partial(self._block, blocks, layer, here, streams))
            dampings |= {site: float(found.pop(f"{site} damping")) for site in here}
            values = with_kernels(blocks.values(layer), found)
            streams = [[blocks.run(layer, h, values=values)[0] for h in half] for half in streams]
            kernels |= found
        work.note("refit", dampings={str(one): list(dampings.values()).count(one) for one in DAMPINGS})
        arrays = {f"{site}.kernel": kernel for site, kernel in kernels.items()}
        return model.rebuilt(model.config, {name: jnp.asarray(a, model.parameter(name).dtype) for name, a in arrays.items()})

    def _block(self, blocks: Blocks, layer: int, sites: Sequence[str], streams: Streams) -> dict[str, np.ndarray]:
        """The kernels of a block's maps, float32 [in, out] by site, fitted to what enters it, and their dampings."""
        found: dict[str, np.ndarray] = {}
        dampings: dict[str, np.ndarray] = {}
        whole = [[blocks.tensors(layer, h, *INPUTS, sparsify=jnp.zeros(h.shape[:2], bool)) for h in half] for half in streams]
        for tap, names in INPUTS.items():
            maps = {site.split(".", 2)[2]: site for site in sites if site.split(".", 2)[2] in names}
            if not maps:
                continue
            values = with_kernels(blocks.values(layer), found)
            moments: dict[str, list[Moments]] = {name: [] for name in maps}  # of each half
            for runs, half in zip(whole, streams, strict=True):
                totals = dict.fromkeys(maps, Moments(0.0, 0.0))
                for (leaving, tensors), h in zip(runs, half, strict=True):
                    kept = blocks.entering(layer, h, *maps, values=values)
                    totals = {name: one + _moments(kept[name], tensors[tap], leaving) for name, one in totals.items()}
                for name, one in totals.items():
                    moments[name].append(one)
            for name, site in maps.items():
                found[site], damping = refitted(kernel_of(blocks.model, site), *moments[name])
                dampings[f"{site} damping"] = np.asarray(damping)
        return found | dampings


class Moments(NamedTuple):
    """Sums over tokens of w^2 x~ x~^T and of w^2 x~ x^T, float64 [in, in], each batch's taken in float32."""

    a: Any
    c: Any

    def __add__(self, more: Any) -> Moments:
        return Moments(*(total + np.asarray(one, np.float64) for total, one in zip(self, more, strict=True)))

    def single(self) -> Moments:
        """In float32."""
        return Moments(*(one.astype(np.float32) for one in self))

    def solved(self, kernel: np.ndarray, damping: float) -> np.ndarray:
        """W' of the module docstring, in the moments' dtype."""
        if not np.isfinite(damping):
            return kernel
        ridge = (damping * np.trace(self.a) / len(self.a) or 1.0) * np.eye(len(self.a), dtype=self.a.dtype)
        return scipy.linalg.solve(self.a + ridge, (self.c + ridge) @ kernel, assume_a="pos", overwrite_a=True, overwrite_b=True)

    def loss(self, kernel: np.ndarray, refit: np.ndarray) -> float:
        """sum w^2 ||x~ W' - x W||^2, less what does not depend on W'."""
        return float(np.sum(refit * (self.a @ refit)) - 2 * np.sum(refit * (self.c @ kernel)))


def refitted(
    kernel: Float[np.ndarray, "in out"], first: Moments, second: Moments
) -> tuple[Float[np.ndarray, "in out"], float]:
    """(W' in float32, its damping), from the moments of two halves of the tokens."""
    halves = first.single(), second.single()  # which damping is best can be told in half the time
    ways = (halves, halves[::-1])
    losses = [sum(judge.loss(kernel, fitted.solved(kernel, one)) for fitted, judge in ways) for one in DAMPINGS]
    damping = DAMPINGS[int(np.argmin(losses))]
    return (first + second).solved(kernel.astype(np.float64), damping).astype(np.float32), damping


def _halves(tokens: Int[np.ndarray, "B T"]) -> list[list[Array]]:
    """Batches of both halves of the sequences, each with its tokens that stand alone."""
    halves = np.array_split(tokens, 2)
    size = max(1, BATCH_TOKENS // tokens.shape[1])
    cut = [[half[at : at + size] for at in range(0, len(half), size)] + [half.reshape(-1, 1)[::FIRST_EVERY]] for half in halves]
    return [[jnp.asarray(batch) for batch in half] for half in cut]


@jax.jit
def _moments(kept: Array, x: Array, leaving: Array) -> tuple[Array, Array]:
    """Of a batch, see `Moments`."""
    weight = jax.lax.rsqrt(jnp.mean(jnp.square(leaving.astype(jnp.float32)), axis=-1, keepdims=True))
    weight = weight.at[:, 0].multiply(FIRST)
    kept, x = ((weight * one.astype(jnp.float32)).reshape(-1, one.shape[-1]) for one in (kept, x))
    return kept.T @ kept, kept.T @ x
