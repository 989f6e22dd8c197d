"""ProAct: activations above a trained bound become zero, so that a flipped bit does no harm (2024, arXiv 2406.06313).

    x' = x sigma(beta (bound - |x|))          beta 20; bound a number, or [in] with `per_channel`

the released code's max(0, x - x sigma(beta (x - bound))) for an input that is not negative, and the same for both signs
otherwise. Clipping to zero beats clipping to the bound: a value that an exponent bit made huge carries no information. An
infinite or undefined value becomes 0 too. The paper's layers have one bound each and its last layer one per neuron; they start
from the largest activation on calibration data (`BoundActivations`, with a margin) and are trained with the weights frozen:

    --config.init=DIR --config.optimizer.train=nonlinearity

As a non-linearity to train from scratch: `proact` in `sparsejax.ops.learned_activations`.
Faults are independent flips of stored bits (`flip_bits`). Not here: distillation, and training one layer after another.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparsejax.arrays import SparseActivation, dense
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.recipe import ACTIVATIONS, Pass, Work
from sparsejax.compress.surgery import Placed, place, sites_of
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Weight, weight
from sparsejax.plugs import check, register


@register("activation_op", "proact")
@dataclasses.dataclass(frozen=True)
class ProAct:
    """bound: its initial value (6 is ours); steepness: beta; per_channel: one bound for each channel."""

    bound: float = 6.0
    steepness: float = 20.0
    per_channel: bool = False

    def __post_init__(self) -> None:
        check(0 < self.bound < float("inf"), "proact: bound", self.bound, "must be positive")
        check(self.steepness > 0, "proact: steepness", self.steepness, "must be positive")

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """bound [] or [in], trained."""
        size, names = (shape[-2:-1], axes[-2:-1]) if self.per_channel else ((), ())
        return {"bound": weight(jnp.full(size, self.bound, jnp.float32), names, "nonlinearity")}

    def __call__(self, arrays: dict[str, Array], x: Any, ctx: Context) -> Any:
        values = dense(x.values) if isinstance(x, SparseActivation) else dense(x)
        clipped = clip_to_zero(values, arrays["bound"], self.steepness)
        return dataclasses.replace(x, values=clipped) if isinstance(x, SparseActivation) else clipped


def clip_to_zero(x: Array, bound: Array, steepness: float) -> Array:
    """x where |x| is well below the bound, 0 well above it, and where x is no finite number."""
    finite = jnp.isfinite(x)
    wide = jnp.where(finite, x, 0).astype(jnp.float32)  # before the product: 0 times infinity has no value and no gradient
    bound = bound.reshape((1,) * (x.ndim - bound.ndim) + bound.shape)
    return jnp.where(finite, wide * jax.nn.sigmoid(steepness * (bound - jnp.abs(wide))), 0).astype(x.dtype)


@dataclasses.dataclass
class BoundActivations(Pass):
    """Places `proact` at `sites` with the largest calibration activation times `margin` as its bound.

    A small calibration set misses legitimate outliers, so the margin should be above 1.
    """

    margin: float = 1.2
    sites: str = "blocks.*.mlp.down"
    stage: ClassVar[str] = ACTIVATIONS

    def check(self, config: ModelConfig) -> None:
        check(self.margin > 0, "margin", self.margin, "must be positive")
        sites_of(config, "inputs", self.sites)

    def apply(self, model: Model, work: Work) -> Model:
        blocks, plan = Blocks(model), {}
        sites = sites_of(model.config, "inputs", self.sites)
        h = blocks.embed(work.calibration.tokens)  # type: ignore[arg-type]
        for layer in work.layers("bounds of activations", len(blocks)):
            local = [site.partition(f"blocks.{layer}.")[2] for site in sites if site.startswith(f"blocks.{layer}.")]
            h, tensors = blocks.tensors(layer, h, *local)
            for name, tensor in tensors.items():
                bound = np.float32(self.margin * float(jnp.max(jnp.abs(tensor))))
                plan[f"blocks.{layer}.{name}"] = Placed("proact", {"bound": bound})
        work.note(self.name, bounds={site: float(placed.arrays["bound"]) for site, placed in plan.items()})
        return place(model, "inputs", plan)


def flip_bits(key: Array, values: Any, rate: float) -> Any:
    """A tree of float32 arrays in which each stored bit is flipped with probability `rate`, independently."""
    leaves, treedef = jax.tree.flatten(values)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(treedef, [_flipped(k, leaf, rate) for k, leaf in zip(keys, leaves, strict=True)])


def _flipped(key: Array, x: Array, rate: float) -> Array:
    check(x.dtype == jnp.float32, "flip_bits", str(x.dtype), "expected float32 arrays")

    def add(mask: Array, bit: Array) -> tuple[Array, None]:
        hit = jax.random.bernoulli(jax.random.fold_in(key, bit), rate, x.shape)
        return mask | (hit.astype(jnp.uint32) << bit), None

    mask, _ = jax.lax.scan(add, jnp.zeros(x.shape, jnp.uint32), jnp.arange(32, dtype=jnp.uint32))
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32) ^ mask, jnp.float32)
