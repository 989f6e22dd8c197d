"""Non-linearities that learn: JumpReLU, xIELU, PolyReLU, PolyNorm, CRReLU, the series-informed activation and ProAct.

Registered with the fixed ones by `sparsejax.ops.activations`. Their parameters are float32 scalars (by name, so that no axis of
theirs is ever sharded) or [F] vectors, meant to train without weight decay; all compute in float32 whatever comes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparsejax import plugs
from sparsejax.ops.nonlinearity import (
    Elementwise,
    Nonlinearity,
    Params,
    along,
    moment,
    quadrature,
    tail_second_moment,
    wide,
)


@jax.custom_jvp
def jump_relu(z: Array, threshold: Array, bandwidth: float) -> Array:
    """z 1[z > threshold], with the kernel-density pseudo-derivative for the threshold (see JumpRelu)."""
    return jnp.where(z > threshold, z, 0)


@jump_relu.defjvp
def _jump_relu_jvp(primals: tuple[Array, Array, float], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    z, threshold, bandwidth = primals
    near = jnp.abs(z - threshold) < bandwidth / 2
    slope = jnp.where(z > threshold, tangents[0], 0) - jnp.where(near, threshold / bandwidth * tangents[1], 0)
    return jump_relu(z, threshold, bandwidth), slope


@plugs.register("nonlinearity", "jumprelu")
@dataclass(frozen=True)
class JumpRelu(Nonlinearity):
    """h = z 1[z > theta], theta = exp(log_threshold) learned per unit (Rajamanoharan et al., 2024, arXiv 2407.14435).

    dh/dz = 1[z > theta]; dh/dtheta := -(theta / bandwidth) rect((z - theta) / bandwidth), rect = 1 on (-1/2, 1/2): unbiased
    for the expected loss as bandwidth -> 0. The factor theta that the chain rule gives log_threshold is there (the
    released code leaves it out).
    """

    threshold: float = 0.001
    bandwidth: float = 0.001
    exact_zeros = True

    def __post_init__(self) -> None:
        plugs.check(self.threshold > 0, "jumprelu: threshold", self.threshold, "must be positive")
        plugs.check(self.bandwidth > 0, "jumprelu: bandwidth", self.bandwidth, "must be positive")

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        return tail_second_moment(self.threshold)

    def parameters(self, width: int) -> Params:
        return {"log_threshold": jnp.full((width,), math.log(self.threshold), jnp.float32)}

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        x = wide(z)
        return jump_relu(x, along(jnp.exp(params["log_threshold"]), x), self.bandwidth).astype(z.dtype)


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))


@plugs.register("nonlinearity", "xielu")
@dataclass(frozen=True)
class XIelu(Nonlinearity):
    """h = alpha_p z^2 + beta z (z > 0), alpha_n (expm1(z) - z) + beta z (z <= 0).

    alpha_p = softplus(a_p), alpha_n = beta + softplus(a_n), one learned scalar each (Huang & Schlag, 2024,
    arXiv 2411.13010). Both slopes at 0 are beta; the released code clamps z at -1e-6 and has beta - alpha_n there.
    """

    alpha_p: float = 0.8
    alpha_n: float = 0.8
    beta: float = 0.5

    def __post_init__(self) -> None:
        plugs.check(self.alpha_p > 0, "xielu: alpha_p", self.alpha_p, "must be positive")
        plugs.check(self.alpha_n > self.beta, "xielu: alpha_n", self.alpha_n, f"must exceed beta = {self.beta}")

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        def h(z: np.ndarray) -> np.ndarray:
            negative = np.minimum(z, 0)
            return self.beta * z + np.where(z > 0, self.alpha_p * z * z, self.alpha_n * (np.expm1(negative) - negative))

        return quadrature(h)

    def parameters(self, width: int) -> Params:
        a_p, a_n = _inverse_softplus(self.alpha_p), _inverse_softplus(self.alpha_n - self.beta)
        return {"a_p": jnp.float32(a_p), "a_n": jnp.float32(a_n)}

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        x = wide(z)
        alpha_p = along(jax.nn.softplus(params["a_p"]), x)
        alpha_n = along(self.beta + jax.nn.softplus(params["a_n"]), x)
        negative = jnp.where(x > 0, 0, x)
        curved = jnp.where(x > 0, alpha_p * x * x, alpha_n * (jnp.expm1(negative) - negative))
        return (curved + self.beta * x).astype(z.dtype)


def _polynomial_parameters(order: int) -> Params:
    """a_0 = 0 and a_1 .. a_order = 1 / order, as scalars by name so that no axis of theirs is ever sharded."""
    return {f"a_{i}": jnp.float32(1 / order if i else 0) for i in range(order + 1)}


@plugs.register("nonlinearity", "polyrelu")
@dataclass(frozen=True)
class PolyRelu(Nonlinearity):
    """h = sum_{i=0}^{order} a_i max(z, 0)^i, a_i learned scalars (PolyCom, Zhuo et al., 2024, arXiv 2411.03884)."""

    order: int = 3

    def __post_init__(self) -> None:
        plugs.check(self.order >= 1, "polyrelu: order", self.order, "must be at least 1")

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        powers = range(1, self.order + 1)
        return sum(moment(i + j) / 2 for i in powers for j in powers) / self.order**2

    def parameters(self, width: int) -> Params:
        return _polynomial_parameters(self.order)

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        positive = jax.nn.relu(wide(z))
        coefficients = [along(params[f"a_{i}"], positive) for i in range(self.order + 1)]
        h = coefficients[-1] * positive
        for a in coefficients[-2:0:-1]:
            h = (h + a) * positive
        return (h + coefficients[0]).astype(z.dtype)


@plugs.register("nonlinearity", "polynorm")
@dataclass(frozen=True)
class PolyNorm(Nonlinearity):
    """h = a_0 + sum_{i=1}^{order} a_i N(z^i), N(v) = v / sqrt(mean_F(v^2) + epsilon) (PolyCom, arXiv 2411.03884).

    Invariant to z -> c z, c > 0. The mean is over all of F also where F is sharded (the released code norms each shard alone).
    The powers are recomputed in the backward pass, where they would otherwise be kept `order` times over.
    """

    order: int = 3
    epsilon: float = 1e-6
    rowwise = True

    def __post_init__(self) -> None:
        plugs.check(self.order >= 1, "polynorm: order", self.order, "must be at least 1")

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        powers = range(1, self.order + 1)

        def correlation(i: int, j: int) -> float:
            return 0.0 if (i + j) % 2 else moment(i + j) / math.sqrt(moment(2 * i) * moment(2 * j))

        return sum(correlation(i, j) for i in powers for j in powers) / self.order**2

    def parameters(self, width: int) -> Params:
        return _polynomial_parameters(self.order)

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        return jax.checkpoint(self._sum)(params, z)

    def _sum(self, params: Params, z: Array) -> Array:
        x = wide(z)
        h, power = along(params["a_0"], x), jnp.ones_like(x)
        for i in range(1, self.order + 1):
            power = power * x
            norm = jax.lax.rsqrt(jnp.mean(jnp.square(power), axis=-1, keepdims=True) + self.epsilon)
            h = h + along(params[f"a_{i}"], x) * (power * norm)
        return h.astype(z.dtype)


@plugs.register("nonlinearity", "crrelu")
@dataclass(frozen=True)
class CRRelu(Nonlinearity):
    """h = max(z, 0) + epsilon z exp(-z^2 / 2), epsilon a learned scalar (EAFO, Sun et al., 2024, arXiv 2405.12954).

    The bump is the direction in which the entropy of ReLU's output under N(0, 1) inputs falls. It leaves no exact zeros:
    |h| <= .61 |epsilon| on z < 0.
    """

    epsilon: float = 0.01

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        return 0.5 + self.epsilon * 2**-1.5 + self.epsilon**2 * 3**-1.5

    def parameters(self, width: int) -> Params:
        return {"epsilon": jnp.float32(self.epsilon)}

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        x = wide(z)
        bump = x * jnp.exp(-jnp.square(x) / 2)
        return (jax.nn.relu(x) + along(params["epsilon"], x) * bump).astype(z.dtype)


@plugs.register("nonlinearity", "siaf")
@dataclass(frozen=True)
class SeriesInformed(Nonlinearity):
    """h = sum_{i=1}^{terms} c_i f(a_i z + b_i), a, b, c learned scalars, f = `base` (PanGu-pi, 2023, arXiv 2312.17276).

    The paper has no c. Ours start at c = (1, 0, ..), a = (1, -1, 1, ..), b = 0: exactly f, and every
    c_i has a gradient at step 1.
    """

    terms: int = 2
    base: str = "silu"

    def __post_init__(self) -> None:
        plugs.check(self.terms >= 1, "siaf: terms", self.terms, "must be at least 1")
        usable = isinstance(self._base, Elementwise) and not self._base.gated
        plugs.check(usable, "siaf: base", self.base, "must be elementwise and without parameters, such as 'silu' or 'gelu'")

    @property
    def _base(self) -> Nonlinearity:
        return plugs.resolve("nonlinearity", self.base, "siaf: base")

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        return self._base.second_moment

    def parameters(self, width: int) -> Params:
        start = {"a": lambda i: (-1) ** i, "b": lambda i: 0, "c": lambda i: int(i == 0)}
        return {f"{name}_{i + 1}": jnp.float32(value(i)) for name, value in start.items() for i in range(self.terms)}

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        x, base = wide(z), self._base
        h = jnp.zeros_like(x)
        for i in range(1, self.terms + 1):
            a, b, c = (along(params[f"{name}_{i}"], x) for name in "abc")
            h = h + c * base({}, a * x + b)
        return h.astype(z.dtype)


@plugs.register("nonlinearity", "proact")
@dataclass(frozen=True)
class ProAct(Nonlinearity):
    """h = max(0, z - z sigma(steepness (z - bound))): ReLU below the bound, 0 (not the bound) above it.

    Drops a value that a bit flip made huge (2024, arXiv 2406.06313). The learned bound is one scalar, or [F] with `per_unit`
    (the paper's last layer). The paper starts from each layer's maximum on calibration data; 6 is ours, to train from scratch.
    """

    bound: float = 6.0
    steepness: float = 20.0
    per_unit: bool = False
    exact_zeros = True

    def __post_init__(self) -> None:
        plugs.check(self.bound > 0, "proact: bound", self.bound, "must be positive")
        plugs.check(self.steepness > 0, "proact: steepness", self.steepness, "must be positive")

    @property
    def second_moment(self) -> float:  # type: ignore[override]
        return quadrature(lambda z: np.maximum(z, 0) * (1 - np.tanh(self.steepness * (z - self.bound) / 2)) / 2)

    def parameters(self, width: int) -> Params:
        return {"bound": jnp.full((width,) if self.per_unit else (), self.bound, jnp.float32)}

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        x = wide(z)
        # 1 - sigma(x) as sigma(-x), which keeps its relative precision where sigma(x) rounds to 1.
        passed = jax.nn.sigmoid(self.steepness * (along(params["bound"], x) - x))
        return (jax.nn.relu(x) * passed).astype(z.dtype)
