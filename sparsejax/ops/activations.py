"""The non-linearities between an FFN's maps: registry kind "nonlinearity", each with its equation and published defaults.

z is the pre-activation; a gated form sees g (from the gate map) and u (from the up map). `spec(params, z)`, or
`spec(params, g, u)`, returns the hidden vector in z's dtype, with `params` the dict that `spec.parameters(F)` initialised.
relu'(0) = 0 throughout. A form without an arXiv id is the field's common property.
Not here: augmented shortcuts (PanGu-pi, a residual op), and layers that need more than a row, such as KAN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import sparsejax.ops.learned_activations  # noqa: F401  registers the learned forms
from sparsejax import plugs
from sparsejax.ops.nonlinearity import (
    NORMAL,
    Elementwise,
    Nonlinearity,
    Params,
    density,
    quadrature,
    tail_second_moment,
    wide,
)
from sparsejax.ops.selectors import block_topk_mask, check_fraction, kept_count, stat_topk, topk_mask


def quick_gelu(z: Array) -> Array:
    """z sigma(1.702 z), which CLIP uses."""
    return z * jax.nn.sigmoid(1.702 * z)


def mish(z: Array) -> Array:
    """z tanh(softplus(z)) (Misra, 2019, arXiv 1908.08681)."""
    return z * jnp.tanh(jax.nn.softplus(z))


def hard_swish(z: Array) -> Array:
    """z clip(z + 3, 0, 6) / 6 (MobileNetV3, arXiv 1905.02244)."""
    return z * jnp.clip(z + 3, 0, 6) / 6


def squared_relu(z: Array) -> Array:
    """max(z, 0)^2 (Primer, arXiv 2109.08668; preferred for sparsity by "ReLU^2 wins", arXiv 2402.03804)."""
    return jnp.square(jax.nn.relu(z))


def gelu(z: Array) -> Array:
    """z Phi(z), exact (Hendrycks & Gimpel, 2016, arXiv 1606.08415)."""
    return jax.nn.gelu(z, approximate=False)


def gelu_tanh(z: Array) -> Array:
    """z (1 + tanh(sqrt(2 / pi) (z + .044715 z^3))) / 2, within 4.7e-4 of the exact form."""
    return jax.nn.gelu(z, approximate=True)


def identity(z: Array) -> Array:
    """z."""
    return z


def _register(
    name: str, function: Callable[[Array], Array], second_moment: float, exact_zeros: bool = False, gated: bool = False
) -> None:
    spec = Elementwise(function, second_moment, exact_zeros, gated)
    plugs.register("nonlinearity", name)(lambda: spec)


# "gelu" is the exact form, as in torch and Hugging Face; jax.nn.gelu by itself is the tanh form.
_register("identity", identity, 1.0)
_register("relu", jax.nn.relu, 0.5, exact_zeros=True)
_register("relu2", squared_relu, 1.5, exact_zeros=True)
_register("gelu", gelu, 0.42522)
_register("gelu_tanh", gelu_tanh, 0.42519)
_register("quick_gelu", quick_gelu, 0.42195)
_register("silu", jax.nn.silu, 0.35578)
_register("mish", mish, 0.45234)
_register("hard_swish", hard_swish, 0.33157, exact_zeros=True)
_register("softplus", jax.nn.softplus, 0.92125)
_register("sigmoid", jax.nn.sigmoid, 0.29338)
_register("glu", jax.nn.sigmoid, 0.29338, gated=True)
_register("bilinear", identity, 1.0, gated=True)
_register("reglu", jax.nn.relu, 0.5, exact_zeros=True, gated=True)
_register("geglu", gelu, 0.42522, gated=True)
_register("geglu_tanh", gelu_tanh, 0.42519, gated=True)
_register("swiglu", jax.nn.silu, 0.35578, gated=True)
_register("relu2glu", squared_relu, 1.5, exact_zeros=True, gated=True)


@plugs.register("nonlinearity", "drelu")
@dataclass(frozen=True)
class DRelu(Nonlinearity):
    """h = max(g, 0) * max(u, 0): both branches rectified, 3/4 zeros at the start (Turbo Sparse, 2024, arXiv 2406.05955)."""

    gated = True
    exact_zeros = True
    second_moment = 0.25

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        return jax.nn.relu(z) * jax.nn.relu(u)


@plugs.register("nonlinearity", "simple_gate")
@dataclass(frozen=True)
class SimpleGate(Nonlinearity):
    """h = z_1 * z_2 with z_1, z_2 the halves of z[..., 2 F]: no activation at all (NAFNet, 2022, arXiv 2204.04676)."""

    halves = True
    second_moment = 1.0

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        first, second = jnp.split(z, 2, axis=-1)
        return first * second


@plugs.register("nonlinearity", "leaky_relu")
@dataclass(frozen=True)
class LeakyRelu(Nonlinearity):
    """h = z if z > 0 else slope * z."""

    slope: float = 0.01

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        return (1 + self.slope**2) / 2

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        return jnp.where(z > 0, z, self.slope * z)


@plugs.register("nonlinearity", "shifted_relu")
@dataclass(frozen=True)
class ShiftedRelu(Nonlinearity):
    """h = max(z - shift, 0) ("ReLU strikes back", Mirzadeh et al., 2023, arXiv 2310.04564; shift 1 for Llama)."""

    shift: float = 1.0
    exact_zeros = True

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        b = self.shift
        return (1 + b * b) * (1 - NORMAL.cdf(b)) - b * density(b)

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        return jax.nn.relu(z - self.shift)


@plugs.register("nonlinearity", "fatrelu")
@dataclass(frozen=True)
class FatRelu(Nonlinearity):
    """h = z if z >= threshold and z > 0, else 0: no shrinkage, h(t) = t (FATReLU in ProSparse, 2024, arXiv 2402.13516).

    The threshold is a constant: h jumps there and has no gradient for it; `jumprelu` learns one.
    """

    threshold: float = 0.01
    exact_zeros = True

    def __post_init__(self) -> None:
        plugs.check(self.threshold >= 0, "fatrelu: threshold", self.threshold, "must not be negative")

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        return tail_second_moment(self.threshold)

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        return jnp.where((z >= self.threshold) & (z > 0), z, 0)


class _RectifiedGate(Nonlinearity):
    """h = a * u with a rectified function a of the gate: rows of up and down are needed only where a > 0."""

    gated = True
    has_gate_out = True  # type: ignore[assignment]

    def gate_out(self, params: Params, g: Array) -> Array:
        return super().__call__(params, g)  # type: ignore[safe-super]

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        return self.gate_out(params, z) * u


@plugs.register("nonlinearity", "shifted_reglu")
@dataclass(frozen=True)
class ShiftedReglu(_RectifiedGate, ShiftedRelu):
    """h = max(g - shift, 0) * u (arXiv 2310.04564)."""


@plugs.register("nonlinearity", "fatreglu")
@dataclass(frozen=True)
class FatReglu(_RectifiedGate, FatRelu):
    """h = a * u with a = g if g >= threshold and g > 0, else 0 (ProSparse, arXiv 2402.13516)."""


@plugs.register("nonlinearity", "topk")
@dataclass(frozen=True)
class TopK(Nonlinearity):
    """h = TopK_k(max(z, 0)): the k largest stay, exactly k where as many are positive, gradient through them alone.

    "The lazy neuron phenomenon" (Li et al., 2022, arXiv 2210.06313), whose ViT-B/16 keeps 128 of 3072. k is
    max(1, round(fraction * F)) unless given. Behind any other non-linearity: `sparsejax.methods.sparsity.selection`.
    """

    fraction: float = 128 / 3072
    k: int = 0
    rowwise = True
    exact_zeros = True

    def __post_init__(self) -> None:
        check_fraction("topk", self.fraction)
        plugs.check(self.k >= 0, "topk: k", self.k, "must not be negative")

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        """Of a long row at `fraction`."""
        return 0.5 if self.fraction >= 0.5 else tail_second_moment(NORMAL.inv_cdf(1 - self.fraction))

    def validate(self, features: int, field: str) -> None:
        kept_count(features, self.fraction, self.k, f"{field}: topk.k")

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        h = jax.nn.relu(z)
        k = kept_count(z.shape[-1], self.fraction, self.k)
        return h if k == z.shape[-1] else jnp.where(topk_mask(h, k), h, 0)


@plugs.register("nonlinearity", "block_topk")
@dataclass(frozen=True)
class BlockTopK(Nonlinearity):
    """h = max(z, 0) in the max(1, round(fraction * F / block)) blocks of `block` units with the largest sum of squares, else 0.

    Top-k in the granularity that a tiled kernel can skip. The defaults are ours, none are published.
    """

    fraction: float = 0.25
    block: int = 16
    rowwise = True
    exact_zeros = True

    def __post_init__(self) -> None:
        check_fraction("block_topk", self.fraction)
        plugs.check(self.block >= 1, "block_topk: block", self.block, "must be at least 1")

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        """Of a long row, by 2 ** 16 seeded draws of a block: within 1 %."""
        energy = np.square(np.maximum(np.random.default_rng(0).standard_normal((2**16, self.block)), 0)).mean(axis=1)
        return float(np.sort(energy)[::-1][: max(1, round(self.fraction * energy.size))].sum() / energy.size)

    def validate(self, features: int, field: str) -> None:
        plugs.check(features % self.block == 0, f"{field}: block_topk.block", self.block, f"must divide the width {features}")

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        h = jax.nn.relu(z)
        self.validate(z.shape[-1], "nonlinearity")
        blocks = z.shape[-1] // self.block
        kept = kept_count(blocks, self.fraction)
        return h if kept == blocks else jnp.where(block_topk_mask(jnp.square(wide(h)), kept, self.block), h, 0)


@plugs.register("nonlinearity", "stat_topk")
@dataclass(frozen=True)
class StatTopK(Nonlinearity):
    """h = max(z - theta, 0), theta = mean(z) + std(z) Phi^-1(1 - fraction): top-k by two sums.

    Spark Transformer (2025, arXiv 2506.06644). About `fraction` of a Gaussian row stays; 1 keeps z itself. The gradient
    passes through mean and std too, unless `through_statistics` is off.
    """

    fraction: float = 0.08
    through_statistics: bool = True
    rowwise = True
    exact_zeros = True

    def __post_init__(self) -> None:
        check_fraction("stat_topk", self.fraction)

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        return 1.0 if self.fraction == 1 else ShiftedRelu(NORMAL.inv_cdf(1 - self.fraction)).second_moment

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        return stat_topk(z, 1 - self.fraction, through_statistics=self.through_statistics)


@plugs.register("nonlinearity", "stat_topk_geglu")
@dataclass(frozen=True)
class StatTopKGeglu(StatTopK):
    """h = gelu_tanh(StatTopK(g)) * u, the FFN of Gemma 3n's first layers and of Spark Transformer (arXiv 2506.06644).

    Gemma 3n keeps 5 %. Spark feeds g and u from disjoint parts of x: that is the maps' business.
    """

    fraction: float = 0.05
    gated = True

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        theta = NORMAL.inv_cdf(1 - self.fraction) if self.fraction < 1 else -math.inf

        def h(z: np.ndarray) -> np.ndarray:
            kept = np.maximum(z - theta, 0) if self.fraction < 1 else z
            return kept * (1 + np.tanh(math.sqrt(2 / math.pi) * (kept + 0.044715 * kept**3))) / 2

        return quadrature(h)

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        return gelu_tanh(super().__call__(params, z)) * u
