"""Quantization-aware training with symmetric integers (Krishnamoorthi, 1806.08342; ranges per token as in LLM-QAT, 2305.17888).

Acts on the input of a linear map (activation op `int8`) and on its weight (weight ops `int8`, `int4`):

    s = max |x| / q_max         per token for x [..., in]; per output channel for w [in, out]; q_max = 127 or 7
    q = clip(round(x / s), -q_max, q_max)         round half to even; narrow range, so that -x quantizes to -q
    y = (q_x @ q_w) * s_x * s_w                   int32 accumulator

Backward: straight through, dL/dx = dL/dx_hat; nothing is clipped when s is the maximum, so no mask is needed.
`start`: steps before which the op leaves its operand as it is (delayed quantization; published: the first 1 to 5 %).
The forward pass of training is that of serving: the same integers, the same product, whether the weight is quantized in
the step or was exported (`sparsejax.compress.export`).
Not here: learned or averaged ranges, per-tensor activations, asymmetric grids.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax.arrays import QTensor, QuantizedActivation, SparseActivation, pack_int4
from sparsejax.context import Context
from sparsejax.plugs import check, register

# Below this a channel counts as zero: its scale must not underflow to 0, nor its codes become nan.
LEAST_MAGNITUDE = 1e-30


def symmetric_codes(
    x: Float[Array, "*group"], magnitude: Float[Array, "*group"], greatest: int
) -> tuple[Int[Array, "*group"], Float[Array, "*group"]]:
    """(int8 codes, float32 scale) of x on the grid of scale = magnitude / greatest.

    Args:
      x: to be quantized.
      magnitude: max |x| of each group, with its dimensions kept; a group of zeros gives codes 0.
      greatest: the largest code, 127 or 7.
    """
    # Times the reciprocal: a division by a constant is compiled to either, so eager and jit would differ in the last bit.
    scale = jnp.maximum(magnitude.astype(jnp.float32), LEAST_MAGNITUDE) * jnp.float32(1 / greatest)
    codes = jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -greatest, greatest)
    return codes.astype(jnp.int8), scale


def _check_start(start: int) -> None:
    check(start >= 0, "start", start, "must not be negative")


@register("activation_op", "int8")
@dataclasses.dataclass(frozen=True)
class Int8Activation:
    """x as int8 with one scale per token; of a SparseActivation the kept values set the scale."""

    start: int = 0

    def __post_init__(self) -> None:
        _check_start(self.start)

    def __call__(self, x: Any, ctx: Context) -> Any:
        if not ctx.reached(self.start):
            return x
        if isinstance(x, SparseActivation):
            return dataclasses.replace(x, values=_quantize_tokens(x.values, jnp.where(x.mask, x.values, 0), ctx))
        return _quantize_tokens(x, x, ctx)


def _quantize_tokens(x: Array, counted: Array, ctx: Context) -> QuantizedActivation:
    fixed = jax.lax.stop_gradient
    magnitude = jnp.max(jnp.abs(fixed(counted)), axis=-1, keepdims=True)
    codes, scale = symmetric_codes(fixed(x), magnitude, 127)
    return QuantizedActivation(codes, scale, x if ctx.mode == "train" else None, x.dtype)


@dataclasses.dataclass(frozen=True)
class IntegerWeight:
    """w as integers with one scale per output channel; a weight that was exported (a QTensor) stays as it is."""

    start: int = 0
    bits: ClassVar[int]

    def __post_init__(self) -> None:
        _check_start(self.start)

    def __call__(self, w: Any, ctx: Context) -> Any:
        if isinstance(w, QTensor) or not ctx.reached(self.start):
            return w
        return dataclasses.replace(self.encode(jax.lax.stop_gradient(w)), surrogate=w if ctx.mode == "train" else None)

    def encode(self, w: Float[Array, "*lead in out"]) -> QTensor:
        """The packed weight that serving multiplies."""
        magnitude = jnp.max(jnp.abs(w), axis=-2, keepdims=True)
        codes, scale = symmetric_codes(w, magnitude, 2 ** (self.bits - 1) - 1)
        codes = pack_int4(codes) if self.bits == 4 else codes
        return QTensor(codes, scale, None, self.bits, (w.shape[-2], w.shape[-1]), w.dtype)


@register("weight_op", "int8")
@dataclasses.dataclass(frozen=True)
class Int8Weight(IntegerWeight):
    """Codes in [-127, 127]."""

    bits: ClassVar[int] = 8


@register("weight_op", "int4")
@dataclasses.dataclass(frozen=True)
class Int4Weight(IntegerWeight):
    """Codes in [-7, 7], two to a byte."""

    bits: ClassVar[int] = 4
