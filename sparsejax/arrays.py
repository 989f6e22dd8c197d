"""Operand types, and the one `matmul` that chooses its kernel from them.

x is an Array, a SparseActivation, a QuantizedActivation or an OutlierActivation; w an Array, QTensor, NMSparse, LowRank, Sum
or Residual. They nest: `SparseActivation.values` may be a QuantizedActivation, `Sum.base` a QTensor. A pair is looked up by its
exact nested types; failing that the outer type is peeled by its defining identity (a SparseActivation is its values with zeros
outside the mask, a Sum the sum of two products, an OutlierActivation the product of its few columns and that of the rest), then
quantized operands are dequantized.
A SparseActivation says by which executor it wants to be multiplied: "masked" multiplies its zeros, "gathered" reads the rows of
w that count (`kernels_pallas.sparse_gemv`), where there are few rows of x.
Whatever pair is given, the result is the same up to the float tolerance of the executors.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.sparse_gemv import sparse_gemv, sparse_gemv_loop
from sparsejax.quantized_arrays import QTensor
from sparsejax.quantized_rows import integer_rows_of, rows_of
from sparsejax.sparse_arrays import NMSparse

log = logging.getLogger(__name__)

EXECUTORS = ("masked", "gathered")
FEW_ROWS = 4  # of x that are gathered for at most: several together soon read all rows of w; and that multiply a QTensor as it
# is stored, on CPU: its loops take longer to compile, and from some rows on it is better dequantized once


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale", "surrogate"], meta_fields=["dtype"])
@dataclasses.dataclass
class QuantizedActivation:
    """x = codes * scale, one scale per token.

    codes: int8[..., in]; scale: float32[..., 1]; dtype: that of the tensor it stands for.
    surrogate: while training, the float tensor that receives the straight-through gradient; None when serving.
    """

    codes: Int[Array, "... in"]
    scale: Float[Array, "... 1"]
    surrogate: Any
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def dequantize(self) -> Array:
        return (self.codes.astype(jnp.float32) * self.scale).astype(self.dtype)

    def keep(self, mask: Array) -> QuantizedActivation:
        """Zeros outside the mask; the surrogate is left whole, its gradient is masked by who masks."""
        return dataclasses.replace(self, codes=jnp.where(mask, self.codes, 0))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "mask"], meta_fields=["gradient", "most", "executor"]
)
@dataclasses.dataclass
class SparseActivation:
    """A tensor of which only the entries under the mask count.

    values: [..., in], unmasked, so that a residual path can still see what was dropped; Array or QuantizedActivation.
    mask: bool[..., in]; carries no gradient.
    gradient: "masked" (dropped entries receive none) or "straight_through" (they receive the kept entries' gradient).
    most: no token keeps more entries than this; None: unknown.
    executor: one of EXECUTORS; linear maps set it to their context's.
    """

    values: Any
    mask: Bool[Array, "... in"]
    gradient: str = "masked"
    most: int | None = None
    executor: str = "masked"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mask.shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def dense(self) -> Array:
        """The tensor with its zeros, differentiable as `gradient` says."""
        values = dense(self.values)
        if self.gradient == "straight_through":
            return _zero_straight_through(values, self.mask)
        return jnp.where(self.mask, values, 0)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "outliers", "columns"], meta_fields=[])
@dataclasses.dataclass
class OutlierActivation:
    """A tensor of which a few columns stay floats: x = values, with `outliers` in place of its zeros at `columns`.

    values: QuantizedActivation[..., in], zeros at the columns, which its scales do not count.
    outliers: float[..., m]. columns: int32[m]; one of `in` or more names no column, and its outliers are zeros.
    """

    values: QuantizedActivation
    outliers: Float[Array, "... m"]
    columns: Int[Array, " m"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def dequantize(self) -> Array:
        return self.values.dequantize().at[..., self.columns].set(self.outliers, mode="drop")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=[])
@dataclasses.dataclass
class LowRank:
    """A weight of low rank: w = a @ b.

    a: [..., in, r]; b: [..., r, out]; arrays or QTensors.
    """

    a: Any
    b: Any

    @property
    def dtype(self) -> Any:
        return self.a.dtype

    def dense(self) -> Array:
        return dense(self.a) @ dense(self.b)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "update"], meta_fields=[])
@dataclasses.dataclass
class Sum:
    """w = base + update, multiplied as two products: an adapter beside a weight of any type.

    base: any weight operand [..., in, out]; update: another, e.g. a LowRank.
    """

    base: Any
    update: Any

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def dense(self) -> Array:
        return dense(self.base) + dense(self.update)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "dropped", "mean"], meta_fields=[])
@dataclasses.dataclass
class Residual:
    """A weight that also says what becomes of the entries that a SparseActivation drops: x with its mask m gives

        y = (x - mean) * m @ base + mean @ base + (x - mean) * (1 - m) @ dropped

    base: any weight operand [in, out]; dropped: a LowRank, or None: they are lost; mean: float[in] or a number, or None: zero.
    A dense x gives x @ base.
    """

    base: Any
    dropped: Any
    mean: Any

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def dense(self) -> Array:
        return dense(self.base)


# Types of stored weights by name, for the folders that hold them.
WEIGHT_ARRAYS: dict[str, type] = {"QTensor": QTensor, "NMSparse": NMSparse}


def dense(x: Any) -> Array:
    """Any operand as the plain Array that it stands for."""
    if isinstance(x, SparseActivation | LowRank | Sum | Residual):
        return x.dense()
    if isinstance(x, NMSparse):
        return x.scattered(dense(x.values))
    return x.dequantize() if isinstance(x, QuantizedActivation | OutlierActivation | QTensor) else x


@jax.custom_vjp
def _zero_straight_through(values: Array, mask: Array) -> Array:
    return jnp.where(mask, values, 0)


_zero_straight_through.defvjp(lambda values, mask: (jnp.where(mask, values, 0), None), lambda _, g: (g, None))


def matmul(
    x: Any,
    w: Any,
    *,
    groups: Int[Array, " E"] | None = None,
    outputs: Bool[Array, "... out"] | None = None,
    out_dtype: Any = None,
) -> Array:
    """y = x @ w by the kernel that fits the operands' types.

    Args:
      x: [..., in], or [E, C, in] against a w with a leading expert axis, or rows [N, in] sorted by expert with `groups`.
      w: [in, out] or [E, in, out].
      groups: rows of x per expert; rows beyond their sum give zeros.
      outputs: the outputs that are wanted; the others are zeros.
      out_dtype: of the result; default x's. Products are accumulated in float32 (int32 for integers) whatever it is.
    Returns:
      [..., out]. While an operand carries a surrogate, gradients go straight through its quantizer (fake-quant gradients).
    """
    product = _dispatch if _surrogate(x) is None and _surrogate(w) is None else _straight_through
    y = product(x, w, groups, out_dtype)
    return y if outputs is None else jnp.where(outputs, y, 0)


def expert_of_rows(groups: Int[Array, " E"], rows: int) -> Int[Array, " rows"]:
    """Which expert each of `rows` sorted rows belongs to; E for rows beyond the groups."""
    return jnp.searchsorted(jnp.cumsum(groups), jnp.arange(rows), side="right")


def kind(operand: Any) -> str:
    """The nested type name that dispatch sees, e.g. `SparseActivation[QuantizedActivation]`.

    A QTensor that no product of integers multiplies names its format: `QTensor[nf4:group=64]`.
    """
    if isinstance(operand, SparseActivation):
        inner = kind(operand.values)
        return "SparseActivation" if inner == "Array" else f"SparseActivation[{inner}]"
    if isinstance(operand, NMSparse):
        return f"NMSparse[{kind(operand.values)}]"
    if isinstance(operand, QTensor) and not operand.spec.multiplies_as_integers:
        return f"QTensor[{operand.spec}]"
    named = QuantizedActivation | OutlierActivation | QTensor | LowRank | Sum | Residual
    return type(operand).__name__ if isinstance(operand, named) else "Array"


def _dispatch(x: Any, w: Any, groups: Any, out_dtype: Any) -> Array:
    kernel = _KERNELS.get((kind(x), kind(w)))
    if kernel is not None:
        return kernel(x, w, groups, out_dtype)
    if isinstance(w, LowRank | Sum | Residual):
        return _composed(x, w, groups, out_dtype)
    if isinstance(x, OutlierActivation):
        return _with_outliers(x, w, groups, out_dtype)
    if _reads_rows(x, w, groups):
        return _stored_product(out_dtype or x.dtype, x, w)
    _log_reference(kind(x), kind(w))
    if isinstance(x, SparseActivation):
        return _dispatch(_peeled(x), w, groups, out_dtype)
    return _dispatch(dense(x), dense(w), groups, out_dtype)


def _peeled(x: SparseActivation) -> Any:
    """Its values with zeros outside the mask."""
    return x.values.keep(x.mask) if isinstance(x.values, QuantizedActivation) else x.dense()


def _count(x: Any) -> int:
    """Rows of an operand."""
    return math.prod(x.shape[:-1])


def _reads_rows(x: Any, w: Any, groups: Any) -> bool:
    """Whether w is multiplied as it is stored: few rows of x, and no product of integers that would be exact."""
    few = isinstance(w, QTensor) and w.ndim == 2 and groups is None and 0 < _count(x) <= FEW_ROWS
    values = x.values if isinstance(x, SparseActivation) else x
    return few and not (isinstance(values, QuantizedActivation) and w.spec.multiplies_as_integers)


def _composed(x: Any, w: LowRank | Sum | Residual, groups: Any, out_dtype: Any) -> Array:
    """A weight made of others, by its defining identity."""
    product = functools.partial(matmul, groups=groups, out_dtype=out_dtype)
    if isinstance(w, LowRank):
        return matmul(matmul(x, w.a, groups=groups), w.b, groups=groups, out_dtype=out_dtype)
    if isinstance(w, Sum):
        return product(x, w.base) + product(x, w.update)
    if not isinstance(x, SparseActivation):
        return product(x, w.base)
    values = dense(x.values)
    mean = jnp.zeros_like(values) if w.mean is None else jnp.broadcast_to(w.mean.astype(values.dtype), values.shape)
    kept = x if w.mean is None else jnp.where(x.mask, values, mean)
    y = product(kept, w.base)
    if w.dropped is None:
        return y
    return y + product(jnp.where(x.mask, 0, values - mean), w.dropped)


def _with_outliers(x: OutlierActivation, w: Any, groups: Any, out_dtype: Any) -> Array:
    """Two products: integers of all columns but a few, and floats of these."""
    product = functools.partial(matmul, groups=groups, out_dtype=jnp.float32)
    y = product(x.values, w) + product(x.outliers, _at_inputs(w, x.columns))
    return y.astype(out_dtype or x.dtype)


def _at_inputs(w: Any, columns: Int[Array, " m"]) -> Any:
    """The weight [..., m, out] of some inputs only; any rows stand for inputs that there are not."""
    if isinstance(w, QTensor) and w.spec.granularity in ("channel", "tensor"):  # scales that all inputs share
        codes = jnp.take(w.codes, columns, axis=-2, mode="clip")
        return dataclasses.replace(w, codes=codes, shape=(len(columns), w.shape[1]))
    return jnp.take(dense(w), columns, axis=-2, mode="clip")


@functools.cache
def _log_reference(x_kind: str, w_kind: str) -> None:
    log.info("matmul(%s, %s): no kernel of its own, reference path", x_kind, w_kind)


def _product(x: Array, w: Array, groups: Any, accumulator: Any) -> Array:
    if groups is not None:
        return grouped_matmul(x, w, groups, preferred_element_type=accumulator)
    if w.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating):
        return _dense_product(accumulator, x, w)
    return jnp.matmul(x, w, preferred_element_type=accumulator)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense_product(accumulator: Any, x: Float[Array, "... in"], w: Float[Array, "in out"]) -> Array:
    """x @ w whose weight gradient is asked for with the narrower operand first.

    XLA:CPU writes a transposed copy of the first operand of such a product. JAX's own rule always puts the output's gradient
    first: 16 % of a training step with a GELU FFN of 256 x 1024 goes into copying that of the wide hidden vector.
    """
    return _undirected_product(accumulator, x, w)


def _undirected_product(accumulator: Any, x: Float[Array, "... in"], w: Float[Array, "in out"]) -> Array:
    """The same without a rule for gradients of its own, so that a gradient has a derivative too (`compress.curvature`)."""
    plain = functools.partial(jnp.matmul, preferred_element_type=accumulator)
    if x.size == x.shape[-1] and x.dtype == jnp.bfloat16:
        return jax.lax.platform_dependent(x, w, cpu=lambda x, w: _product_of_two(plain, x, w), default=plain)
    return plain(x, w)


def _product_of_two(product: Callable[[Array, Array], Array], x: Array, w: Array) -> Array:
    """`product` of the one row in x, taken from that of the row twice over.

    XLA:CPU has a bfloat16 kernel for two rows and more; for a single one it widens w to a float32 copy first (decoding SmolLM2,
    these products take 6 to 8 times as long).
    """
    return product(jnp.broadcast_to(x.reshape(1, -1), (2, x.size)), w)[:1].reshape(*x.shape[:-1], -1)


def _dense_product_backward(accumulator: Any, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    g = g.astype(x.dtype)  # float32 logits over bfloat16 operands: products of equal types are the fast ones
    rows = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(g, w, (((g.ndim - 1,), (1,)), ((), ())), preferred_element_type=x.dtype)
    first, second = (x, g) if x.shape[-1] <= g.shape[-1] else (g, x)
    dw = jax.lax.dot_general(first, second, ((rows, rows), ((), ())), preferred_element_type=w.dtype)
    return dx, dw if first is x else dw.T


_dense_product.defvjp(lambda accumulator, x, w: (_undirected_product(accumulator, x, w), (x, w)), _dense_product_backward)


def _array_array(x: Array, w: Array, groups: Any, out_dtype: Any) -> Array:
    return _product(x, w.astype(x.dtype), groups, out_dtype or x.dtype)


def _int_int(x: QuantizedActivation, w: QTensor, groups: Any, out_dtype: Any) -> Array:
    """Integer accumulators are exact, the scales follow in a fixed order: training and serving agree bit for bit."""
    total = _integer_product(x.codes, w, groups).astype(jnp.float32)
    scale = w.qparams.scale.astype(jnp.float32)
    if groups is not None:
        scale = scale[:, 0].at[expert_of_rows(groups, x.shape[0])].get(mode="fill", fill_value=0)
    elif w.ndim == 2:
        scale = scale[0]
    scale = scale.reshape((1,) * (total.ndim - scale.ndim) + scale.shape)
    return (total * x.scale * scale).astype(out_dtype or x.dtype)


def _integer_product(codes: Array, w: QTensor, groups: Any) -> Int[Array, "... out"]:
    """On CPU few rows read the packed rows of w one by one: XLA widens the whole weight for each of them."""

    def whole(codes: Array, w: QTensor) -> Array:
        return _product(codes, w.unpacked(), groups, jnp.int32)

    def loop(codes: Array, w: QTensor) -> Array:
        return sparse_gemv_loop(codes.astype(jnp.int32), None, integer_rows_of(w))

    if w.ndim != 2 or groups is not None or not 0 < _count(codes) <= FEW_ROWS:
        return whole(codes, w)
    return jax.lax.platform_dependent(codes, w, cpu=loop, default=whole)


def _sparse_array(x: SparseActivation, w: Array, groups: Any, out_dtype: Any) -> Array:
    if x.executor == "masked" or groups is not None or w.ndim != 2:
        return _array_array(x.dense(), w, groups, out_dtype)
    if _count(x) > FEW_ROWS:
        _log_many_rows(_count(x))
        return _array_array(x.dense(), w, groups, out_dtype)
    return _gathered_product(out_dtype, (x.gradient, x.most), x.values, x.mask, w)


@functools.cache
def _log_many_rows(rows: int) -> None:
    log.info("matmul: %d rows are too many to gather for (at most %d): zeros are multiplied", rows, FEW_ROWS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered_product(out_dtype: Any, how: tuple[str, int | None], values: Array, mask: Array, w: Array) -> Array:
    return sparse_gemv(values, mask, w, most=how[1], preferred_element_type=out_dtype or values.dtype)


def _gathered_forward(out_dtype: Any, how: Any, *operands: Array) -> tuple[Array, Any]:
    return _gathered_product(out_dtype, how, *operands), operands


def _gathered_backward(out_dtype: Any, how: tuple[str, int | None], operands: Any, g: Array) -> tuple[Any, ...]:
    """The masked product's: nothing is trained by gathering."""
    values, mask, w = operands
    masked = functools.partial(_array_array, groups=None, out_dtype=out_dtype)
    _, pull = jax.vjp(lambda values, w: masked(SparseActivation(values, mask, how[0]).dense(), w), values, w)
    dx, dw = pull(g)
    return dx, None, dw


_gathered_product.defvjp(_gathered_forward, _gathered_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stored_product(out_dtype: Any, x: Any, w: QTensor) -> Array:
    """Few rows times a weight in its format. On CPU its packed rows are read one by one: dequantized first, the weight would be
    written and read as floats for every token. Elsewhere XLA fuses what it can."""
    return _stored_forward(out_dtype, x, w)


def _stored_forward(out_dtype: Any, x: Any, w: QTensor) -> Array:
    loop = functools.partial(_stored_rows, out_dtype)
    return jax.lax.platform_dependent(x, w, cpu=loop, default=functools.partial(_dequantized_product, out_dtype))


def _dequantized_product(out_dtype: Any, x: Any, w: QTensor) -> Array:
    return _array_array(dense(x), w.dequantize(), None, out_dtype)


def _stored_rows(out_dtype: Any, x: Any, w: QTensor) -> Array:
    """Rows that only zeros of a gathered SparseActivation meet are not read."""
    gathered = isinstance(x, SparseActivation) and x.executor == "gathered"
    values, mask = (dense(x.values), x.mask) if gathered else (dense(x), None)
    return sparse_gemv_loop(values, mask, rows_of(w), preferred_element_type=out_dtype)


def _stored_backward(out_dtype: Any, operands: tuple[Any, QTensor], g: Array) -> Any:
    """The dequantized product's."""
    _, pull = jax.vjp(lambda x, w: _dequantized_product(out_dtype, x, w), *operands)
    return pull(g)


_stored_product.defvjp(lambda out_dtype, x, w: (_stored_forward(out_dtype, x, w), (x, w)), _stored_backward)

_KERNELS: dict[tuple[str, str], Callable[..., Array]] = {
    ("Array", "Array"): _array_array,
    ("SparseActivation", "Array"): _sparse_array,
    ("QuantizedActivation", "QTensor"): _int_int,
}


def _surrogate(operand: Any) -> Any:
    if isinstance(operand, SparseActivation | OutlierActivation):
        return _surrogate(operand.values)
    return operand.surrogate if isinstance(operand, QuantizedActivation | QTensor) else None


def _differentiable(operand: Any) -> Array:
    """The float tensor whose gradient the product's gradient is; a mask's own rule is part of it."""
    if isinstance(operand, SparseActivation):
        return dataclasses.replace(operand, values=_differentiable(operand.values)).dense()
    surrogate = _surrogate(operand)
    return dense(operand) if surrogate is None else surrogate


def _without_surrogate(operand: Any) -> Any:
    if isinstance(operand, SparseActivation | OutlierActivation):
        return dataclasses.replace(operand, values=_without_surrogate(operand.values))
    if isinstance(operand, QuantizedActivation | QTensor):
        return dataclasses.replace(operand, surrogate=None)
    return operand


def _straight_through(x: Any, w: Any, groups: Any, out_dtype: Any) -> Array:
    encoded = jax.tree.map(jax.lax.stop_gradient, (_without_surrogate(x), _without_surrogate(w)))
    return _fake_quant_product(out_dtype, _differentiable(x), _differentiable(w), *encoded, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_quant_product(out_dtype: Any, x_float: Array, w_float: Array, x: Any, w: Any, groups: Any) -> Array:
    return _dispatch(x, w, groups, out_dtype)


def _fake_quant_forward(out_dtype: Any, x_float: Array, w_float: Array, x: Any, w: Any, groups: Any) -> tuple[Array, Any]:
    # The residuals are the encoded operands: int8 where they are int8, not the float tensors.
    empty = (jnp.zeros((0,), x_float.dtype), jnp.zeros((0,), w_float.dtype))
    return _dispatch(x, w, groups, out_dtype), (x, w, groups, *empty)


def _fake_quant_backward(out_dtype: Any, residuals: Any, g: Array) -> tuple[Any, ...]:
    x, w, groups, x_like, w_like = residuals
    _, pull = jax.vjp(lambda a, b: _dispatch(a, b, groups, out_dtype), dense(x), dense(w))
    dx, dw = pull(g)
    return dx.astype(x_like.dtype), dw.astype(w_like.dtype), None, None, None


_fake_quant_product.defvjp(_fake_quant_forward, _fake_quant_backward)
