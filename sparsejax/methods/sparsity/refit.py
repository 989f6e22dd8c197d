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
A threshold keeps the share that it drops of the dense model's input: it moves to that quantile of what enters here, before its
map is refitted. (Left where it was, it drops 68 % where 65 % were asked for: the sparse model's inputs are smaller.) Other
selections stay as they were fitted.
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

from sparsejax import nnx_compat
from sparsejax.compress.blocks import INPUTS, Blocks
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.recipe import COMPENSATION, Pass, Tier, Work
from sparsejax.compress.statistics import Quantiles, tensor_of
from sparsejax.compress.surgery import chain_at
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS, BATCH_TOKENS, batches_of, kernel_of, maps_of
from sparsejax.methods.sparsity.selection import Threshold, score_of
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check, register, resolve_chain

FIRST, FIRST_EVERY = 2.0, 4
DAMPINGS = (0.1, 0.3, 1.0, 3.0, 10.0, math.inf)
KEEPS_ALL = np.asarray(-1, np.float32)  # as a threshold
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

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        count = calibration.spec.sequences
        check(count >= 2, "calibration.sequences", count, "must be at least 2: each half judges what the other gives")

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x 10 passes of {tier.sequences * tier.length:,} tokens, and a linear system per map"

    def apply(self, model: Model, work: Work) -> Model:
        self.check(model.config)
        if not (model.config.inputs or model.config.neurons):
            return model  # nothing is dropped
        blocks, sites = Blocks(model), maps_of(model.config, self.sites)
        dense = [blocks.embed(tokens) for tokens in batches_of(work.calibration)]
        streams = [[blocks.embed(tokens) for tokens in half] for half in _halves(work.calibration.tokens)]
        found: dict[str, np.ndarray] = {}
        dampings: list[float] = []
        for layer in work.layers("refit", len(blocks)):
            here = [site for site in sites if site.split(".")[1] == str(layer)]
            refit = work.piece(f"block-{layer}", partial(_block, blocks, layer, here, dense, streams))
            dampings += [float(refit.pop(f"{site} damping")) for site in here]
            values = _with(blocks.values(layer), refit)
            dense = [blocks.run(layer, h, sparsify=_nowhere(h))[0] for h in dense]
            streams = [[blocks.run(layer, h, values=values)[0] for h in half] for half in streams]
            found |= refit
        work.note("refit", dampings={str(one): dampings.count(one) for one in DAMPINGS})
        return model.rebuilt(model.config, {name: jnp.asarray(a, model.parameter(name).dtype) for name, a in found.items()})


def _block(
    blocks: Blocks, layer: int, sites: Sequence[str], dense: Sequence[Array], streams: Streams
) -> dict[str, np.ndarray]:
    """By name, the kernels of a block's maps, float32 [in, out], the thresholds in front of them, and `SITE damping`."""
    found: dict[str, np.ndarray] = {}
    dampings: dict[str, np.ndarray] = {}
    whole = [[blocks.tensors(layer, h, *INPUTS, sparsify=_nowhere(h)) for h in half] for half in streams]
    followed = _thresholds(blocks, sites)
    shares = _shares(blocks, layer, followed, dense)
    for tap, names in INPUTS.items():
        maps = {site.split(".", 2)[2]: site for site in sites if site.split(".", 2)[2] in names}
        if not maps:
            continue
        moving = {site: followed[site] for site in maps.values() if site in followed}
        found |= _moved(blocks, layer, moving, shares, _with(blocks.values(layer), found), streams)
        values = _with(blocks.values(layer), found)
        moments: dict[str, list[Moments]] = {name: [] for name in maps}  # of each half
        for runs, half in zip(whole, streams, strict=True):
            totals = dict.fromkeys(maps, Moments(0.0, 0.0))
            for (leaving, tensors), h in zip(runs, half, strict=True):
                kept = blocks.entering(layer, h, *maps, values=values)
                totals = {name: one + _moments(kept[name], tensors[tap], leaving) for name, one in totals.items()}
            for name, one in totals.items():
                moments[name].append(one)
        for name, site in maps.items():
            found[f"{site}.kernel"], damping = refitted(kernel_of(blocks.model, site), *moments[name])
            dampings[f"{site} damping"] = np.asarray(damping)
    return found | dampings


def _thresholds(blocks: Blocks, sites: Sequence[str]) -> dict[str, Threshold]:
    """The op at the input of each map where a threshold of its own is all that acts there."""
    chains = {site: resolve_chain("activation_op", "|".join(chain_at(blocks.model.config, "inputs", site))) for site in sites}
    alone = {site: chain[0] for site, chain in chains.items() if len(chain) == 1}
    return {site: op for site, op in alone.items() if isinstance(op, Threshold) and not op.channels}


def _scores(blocks: Blocks, site: str, op: Threshold, x: Array) -> np.ndarray:
    """Of x [B, T, in] at a map, float32 [B T, in]."""
    _, layer, part, name = site.split(".")
    arrays = nnx_compat.at(blocks.values(int(layer)), (part, name, "inputs", "0"))
    return np.asarray(score_of(x, op.score, arrays), np.float32).reshape(-1, x.shape[-1])


def _shares(blocks: Blocks, layer: int, followed: dict[str, Threshold], dense: Sequence[Array]) -> dict[str, float]:
    """What each threshold drops of the dense model's inputs."""
    dropped: dict[str, list[float]] = {site: [] for site in followed}
    for h in dense if followed else ():
        entering = blocks.tensors(layer, h, *INPUTS, sparsify=_nowhere(h))[1]
        for site, op in followed.items():
            scores = _scores(blocks, site, op, entering[tensor_of(site.split(".", 2)[2])])
            dropped[site].append(float(np.mean(scores <= np.asarray(blocks.model.parameter(f"{site}.inputs.0.threshold")))))
    return {site: float(np.mean(parts)) for site, parts in dropped.items()}


def _moved(
    blocks: Blocks, layer: int, moving: dict[str, Threshold], shares: dict[str, float], values: Any, streams: Streams
) -> dict[str, np.ndarray]:
    """By name, the thresholds of maps of one tensor at which its sequences drop these shares."""
    if not moving:
        return {}
    opened = _with(values, {f"{site}.inputs.0.threshold": KEEPS_ALL for site in moving})
    name = next(iter(moving)).split(".", 2)[2]
    entering = [blocks.entering(layer, h, name, values=opened)[name] for half in streams for h in half[:-1]]
    found = {}
    for site, op in moving.items():
        scores = np.concatenate([_scores(blocks, site, op, x) for x in entering])
        found[f"{site}.inputs.0.threshold"] = np.asarray(Quantiles(scores)(shares[site]), np.float32)
    return found


def _nowhere(h: Array) -> Array:
    """Sparsity at no token, see `Context.sparsify`."""
    return jnp.zeros(h.shape[:2], bool)


def _with(values: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A block's parameters with others in their place, by name."""
    values = jax.tree.map(lambda a: a, values)  # new dicts, the same arrays
    for name, array in arrays.items():
        path = tuple(name.split(".")[2:])
        nnx_compat.put(values, path, jnp.asarray(array, nnx_compat.at(values, path).dtype))
    return values


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
