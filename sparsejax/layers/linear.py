"""The linear map that everything is made of: y = matmul(inputs(x, ctx), weight(kernel, ctx)) + bias."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparsejax import plugs
from sparsejax.arrays import SparseActivation, expert_of_rows, matmul
from sparsejax.context import Context, Stat
from sparsejax.layers.op import SiteRules, apply, chain
from sparsejax.nnx_compat import Module, Weight, weight


@dataclasses.dataclass(frozen=True)
class Init:
    """How kernels are drawn: `fan_in` is N(0, 1/in), the default because N(0, .02) flips the ranking of activations at small
    width (measured, see the activation cards); `normal:STD` is for reproducing published models."""

    std: float = 0.0  # 0: fan-in

    @classmethod
    def parse(cls, text: str, field: str = "model.init") -> Init:
        name, _, std = text.partition(":")
        plugs.check_choice(field, name, ("fan_in", "normal"))
        try:
            return cls(float(std) if name == "normal" else 0.0)
        except ValueError as error:
            raise plugs.ConfigError(f"{field} = {text!r}: expected 'fan_in' or 'normal:STD'") from error

    def __call__(self, key: Array, shape: tuple[int, ...]) -> Array:
        """float32 draws of `shape` = (..., in, out)."""
        return jax.random.normal(key, shape, jnp.float32) * (self.std or shape[-2] ** -0.5)


class Linear(Module):
    """A kernel [in, out] (or [E, in, out]) with its bias, and the chains of ops at its input and on its weight.

    out_dtype: of the result; "": the input's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        key: Array,
        site: str,
        axes: tuple[str | None, str | None],
        rules: SiteRules = SiteRules(),
        init: Init = Init(),
        bias: bool = False,
        experts: int = 0,
        role: str = "matrix",
        out_dtype: str = "",
    ):
        lead, lead_axes = ((experts,), ("expert",)) if experts else ((), ())
        self.kernel = weight(init(key, (*lead, in_features, out_features)), (*lead_axes, *axes), role)
        zeros = jnp.zeros((*lead, out_features), jnp.float32)
        self.bias: Weight | None = weight(zeros, (*lead_axes, axes[1]), "bias") if bias else None
        shape, all_axes = (*lead, in_features, out_features), (*lead_axes, *axes)
        # Keys of their own: what an op draws leaves the kernel's draw as it was.
        self.inputs = chain(rules.at("inputs", site), shape, all_axes, jax.random.fold_in(key, 1))
        self.weights = chain(rules.at("weights", site), shape, all_axes, jax.random.fold_in(key, 2))
        self.out_dtype = out_dtype

    def encode(self, x: Any, ctx: Context) -> Any:
        """The operand that `product` multiplies: x after the activation ops of this site."""
        operand = apply(self.inputs, x, ctx)
        return dataclasses.replace(operand, executor=ctx.executor) if isinstance(operand, SparseActivation) else operand

    def product(
        self,
        operand: Any,
        ctx: Context,
        groups: Array | None = None,
        outputs: Array | None = None,
        out_dtype: Any = None,
    ) -> Array:
        """operand @ weight + bias; `groups`, `outputs` and `out_dtype` (default: the map's own) as in `arrays.matmul`."""
        w = apply(self.weights, self.kernel.get_value(), ctx)
        y = matmul(operand, w, groups=groups, outputs=outputs, out_dtype=out_dtype or self.out_dtype or None)
        if self.bias is None:
            return y
        bias = self.bias.get_value().astype(y.dtype)
        if groups is not None:  # a product, since the gradient of a gather is a scatter-add, not deterministic on GPU
            return y + jax.nn.one_hot(expert_of_rows(groups, y.shape[0]), bias.shape[0], dtype=y.dtype) @ bias
        return y + (bias[:, None] if bias.ndim == 2 else bias.reshape((1,) * (y.ndim - 1) + bias.shape))

    def __call__(self, x: Any, ctx: Context, groups: Array | None = None) -> Array:
        return self.product(self.encode(x, ctx), ctx, groups)

    def measured(
        self, x: Any, ctx: Context, site: str, groups: Array | None = None, outputs: Array | None = None
    ) -> tuple[Array, dict[str, dict[str, Stat]]]:
        """(y, what probes of `site` measured of the operand that was multiplied)."""
        operand = self.encode(x, ctx)
        return self.product(operand, ctx, groups, outputs), ctx.measure(site, operand)
