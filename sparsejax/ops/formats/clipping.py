"""Scales by search: extents of groups shrunk to where rounding loses least, as the scales of any format are computed from them.

The largest entries of a group then saturate, and all others get finer steps. Over the ratios p = 1, .99, ..., .21 (80 of them)
each group takes by itself the one with the least

    mse        sum |x_hat(p) - x|^2.4                the grid and exponent of GPTQ's released quantizer (2210.17323)
    hessian    sum h_k (x_hat(p) - x)^2              h: what an error at row k costs, diag X^T X of a kernel's inputs

x_hat includes the rounding of the scale for storage. p = 1 is the first candidate and equals are not taken, so that no group
ends above the objective of its extremes (`absmax`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.ops.formats.quantize import Extent, decode, extent, quantize
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, check_choice

GRID, CANDIDATES = 100, 80
EXPONENT = 2.4
SEARCHES = ("absmax", "mse", "hessian")


def check_search(search: str, spec: FormatSpec, allowed: tuple[str, ...] = SEARCHES) -> None:
    """Refuse a search, or one for a format whose groups cannot be searched by themselves.

    Raises:
      ConfigError: another name; scales that are quantized together (`double`), are means or calibrated; random rounding.
    """
    check_choice("scales", search, allowed)
    if search == "absmax":
        return
    check(spec.second != "double", "scales", search, f"{spec} quantizes scales in blocks, so that no group has its own")
    check(spec.statistic != "mean", "scales", search, f"{spec} has scales of the mean, not of extremes that can be clipped")
    check(not spec.static, "scales", search, f"the scales of {spec} come from calibration")
    check(spec.rounding != "stochastic", "scales", search, f"{spec} rounds at random, which has no least error")


def searched_extent(
    x: Float[Array, "*lead rows columns"],
    spec: FormatSpec,
    search: str,
    *,
    weights: Float[Array, " rows"] | None = None,
    second: Float[Array, "*lead 1 1"] | None = None,
) -> Extent:
    """The extents that scales of x are to be computed from, `qparams(x, spec, within=...)`.

    Args:
      x: to be quantized.
      spec: of those that `check_search` lets pass.
      search: of `SEARCHES`.
      weights: h of `hessian`, which needs them.
      second: G of a `two_level` format, which is not searched.
    """
    full = extent(x, spec)
    if search == "absmax":
        return full
    # The mean of a group's costs is the extent of a format whose statistic is the mean of magnitudes.
    means = FormatSpec("binary", spec.granularity, spec.size, spec.axis, spec.ragged)
    x = x.astype(jnp.float32)

    def shrunk(ratio: Array) -> Extent:
        return Extent(full.high * ratio, None if full.low is None else full.low * ratio)

    def cost(ratio: Array) -> Array:
        codes, parameters = quantize(x, spec, within=shrunk(ratio), second=second)
        error = jnp.abs(decode(codes, parameters, spec, x.shape[-2:]) - x)
        if search == "mse":
            return extent(error**EXPONENT, means).high
        assert weights is not None
        return extent(jnp.square(error) * weights[:, None], means).high

    def step(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        best, least = state
        ratio = 1 - number.astype(jnp.float32) / GRID
        now = cost(ratio)
        return jnp.where(now < least, ratio, best), jnp.minimum(now, least)

    first = cost(jnp.float32(1))
    best, _ = jax.lax.fori_loop(1, CANDIDATES, step, (jnp.ones_like(first), first))
    return shrunk(best)
