"""The online Hadamard transform: x H at the input of a linear map, its inverse merged into the kernel.

    y = x W = (x H) (H^T W),      H = I_heads kron H_n,   H_n the Kronecker product of `basis.orthogonal_factors(n)`

H_n is applied factor by factor (a fast transform); of a width that no product of Hadamard matrices reaches one factor is a
Hartley matrix, as in `hadamard_basis`. The transform is linear and spreads every channel over all others, so that one
scale per token suits it: QuaRot's R4 (arXiv 2404.00456). What it gives has no zeros where x had some: it cannot stand behind
what selects hidden units or entries (`OnlineHadamard.rotates`, refused by `models.site_rules`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.compress.basis import orthogonal_factors
from sparsejax.compress.packed import float_kernel
from sparsejax.compress.surgery import Placed, chain_at, place, with_op
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.layers.op import SiteRules
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.plugs import check, register

# Neighbouring factors are multiplied out up to this width: few dense products instead of many passes over x.
WIDEST_FACTOR = 64


@functools.partial(jax.jit, static_argnames="heads")
def hadamard_transform(x: Float[Array, "... F"], heads: int = 1) -> Float[Array, "... F"]:
    """x (I kron H_n): each of `heads` equal parts of the last axis times `hadamard_basis(n)`, n = F / heads.

    Computed in float32 and rounded once to x's dtype; the transpose of the matrix is its inverse.
    """
    width = x.shape[-1] // heads
    factors = _fast_factors(width)
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], heads, *map(len, factors))
    for number, factor in enumerate(factors):
        axis = y.ndim - len(factors) + number
        product = jax.lax.dot_general(y, jnp.asarray(factor), (((axis,), (0,)), ((), ())), precision="highest")
        y = jnp.moveaxis(product, -1, axis)
    return y.reshape(x.shape).astype(x.dtype)


@functools.cache
def _fast_factors(width: int) -> tuple[np.ndarray, ...]:
    """float32 factors of H_width in the order of their Kronecker product."""
    merged: list[np.ndarray] = []
    for factor in orthogonal_factors(width):
        if merged and len(merged[-1]) * len(factor) <= WIDEST_FACTOR:
            merged[-1] = np.kron(merged[-1], factor)
        else:
            merged.append(factor)
    return tuple(factor.astype(np.float32) for factor in merged)


def transform_rows(kernel: Float[np.ndarray, "*lead in out"], heads: int = 1) -> np.ndarray:
    """H^T W in float64, what a map multiplies x H with."""
    inputs, out = kernel.shape[-2:]
    factors = orthogonal_factors(inputs // heads)
    y = np.asarray(kernel, np.float64).reshape(-1, heads, *map(len, factors), out)
    for number, factor in enumerate(factors):
        y = np.moveaxis(np.tensordot(y, factor, (number + 2, 0)), -1, number + 2)
    return y.reshape(kernel.shape)


@register("activation_op", "hadamard")
@dataclass(frozen=True)
class OnlineHadamard:
    """x H, by `heads` equal parts of the input.

    rotates: what enters the map has its channels mixed (`models.site_rules` refuses what this breaks).
    merged: the kernel holds its inverse, so that without the op the model is another function.
    """

    heads: int = 1
    rotates: ClassVar[bool] = True
    merged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self.heads >= 1, "heads", self.heads, "must be at least 1")

    def validate(self, features: int, field: str) -> None:
        """Refuse a width that does not split into the heads, and skip paths, whose inverse no kernel takes up."""
        check(not field.startswith("model.residuals"), field, "hadamard", "acts on what enters linear maps, `model.inputs`")
        check(features % self.heads == 0, field, self.heads, f"does not divide the {features} channels of this input")

    def __call__(self, x: Float[Array, "... in"], ctx: Context) -> Float[Array, "... in"]:
        return hadamard_transform(x, self.heads)


def check_online(config: ModelConfig, plan: Mapping[str, int]) -> ModelConfig:
    """The config with an online transform at each site of `plan`, {site: heads}.

    Raises:
      ConfigError: names the site: its map is not linear or is fitted to its present input, an op selects hidden units there,
        heads that do not divide its inputs.
    """
    inputs = rule_sites(config)["inputs"]
    for site in plan:
        check(site in inputs, "online rotation: site", site, "is no linear map of this model")
        for field in ("inputs", "weights"):
            ops = "|".join(chain_at(config, field, site))
            check(not ops, f"{site}: model.{field}", ops, "acts here, so that no rotation can be merged into the kernel; "
                  "rotate first")
    return with_op(config, "inputs", {site: _text(heads) for site, heads in plan.items()})


def check_unrotated(config: ModelConfig, name: str) -> None:
    """Refuse what works by zeros of hidden units, in a model whose `down` maps read them rotated.

    Raises:
      ConfigError: names the first such map.
    """
    rules = SiteRules.of(config)
    downs = (site for site in rule_sites(config)["inputs"] if site.endswith(".down"))
    rotated = next((site for site in downs if any(getattr(op, "rotates", False) for op in rules.at("inputs", site))), "")
    check(not rotated, f"{rotated}: model.inputs", "|".join(chain_at(config, "inputs", rotated)) if rotated else "",
          f"rotates the hidden units, so that the zeros which {name} makes would be lost; use one of the two")


def rotate_online(model: Model, plan: Mapping[str, int]) -> Model:
    """The same function with the inputs of maps transformed and the inverse merged into their kernels.

    Args:
      plan: heads by site, of `rule_sites(config)["inputs"]`; experts are transformed one by one.
    Raises:
      ConfigError: see `check_online`; a kernel that is packed.
    """
    check_online(model.config, plan)
    kernels: dict[str, Any] = {}
    for site, heads in plan.items():
        kernel = float_kernel(model, site)
        kernels[f"{site}.kernel"] = jnp.asarray(transform_rows(np.asarray(kernel, np.float64), heads), kernel.dtype)
    turned = model.rebuilt(model.config, kernels)
    return place(turned, "inputs", {site: Placed(_text(heads)) for site, heads in plan.items()})


def _text(heads: int) -> str:
    return f"hadamard:heads={heads}" if heads > 1 else "hadamard"
