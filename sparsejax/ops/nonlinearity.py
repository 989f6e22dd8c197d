"""What every non-linearity between an FFN's maps is, and the moments of a standard normal that their initialisation needs."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Params = dict[str, Array]
NORMAL = NormalDist()


class Nonlinearity(abc.ABC):
    """What every spec has; subclasses are frozen dataclasses whose fields are the published constants.

    gated: takes (g, u), so that the FFN has a gate and an up map.
    halves: takes one tensor of width 2 F and returns width F.
    rowwise: an entry depends on its whole row, so F cannot be tiled blindly.
    exact_zeros: exact zeros occur on a set of positive measure, so that counting them means something.
    second_moment: E h^2 for independent N(0, 1) inputs at the initial parameters.
    """

    gated: ClassVar[bool] = False
    halves: ClassVar[bool] = False
    rowwise: ClassVar[bool] = False
    exact_zeros: ClassVar[bool] = False
    second_moment: ClassVar[float]

    def parameters(self, width: int) -> Params:
        """Initial values of what is learned, float32 scalars or [width] vectors; {} for a fixed function."""
        return {}

    def validate(self, features: int, field: str) -> None:  # noqa: B027  (most suit any width)
        """Raise a ConfigError, naming `field`, where a hidden width of `features` does not suit."""

    @property
    def has_gate_out(self) -> bool:
        """Whether the hidden vector is a * u with a function a of the gate alone: what CATS and its like select neurons by."""
        return False

    def gate_out(self, params: Params, g: Array) -> Array:
        """That a [..., F]; only where `has_gate_out`."""
        raise TypeError(f"{type(self).__name__}: its hidden vector is no product with a function of the gate alone")

    @abc.abstractmethod
    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        """The hidden vector [..., F]; z is [..., F] ([..., 2 F] where `halves`), u like z and given only where `gated`."""


def wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def along(parameter: Array, z: Array) -> Array:
    """A scalar or [F] parameter in z's dtype, ready to broadcast."""
    parameter = parameter.astype(z.dtype)
    return parameter.reshape((1,) * (z.ndim - 1) + (-1,)) if parameter.ndim else parameter


def density(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def moment(power: int) -> float:
    """E |z|^power, z ~ N(0, 1)."""
    return 2 ** (power / 2) * math.gamma((power + 1) / 2) / math.sqrt(math.pi)


def tail_second_moment(t: float) -> float:
    """E z^2 1[z > t], z ~ N(0, 1)."""
    return t * density(t) + 1 - NORMAL.cdf(t)


def quadrature(f: Callable[[np.ndarray], np.ndarray]) -> float:
    """E f(z)^2, z ~ N(0, 1), for functions with kinks."""
    z = np.linspace(-12, 12, 48_001)
    return float(np.sum(np.square(f(z)) * np.exp(-z * z / 2)) * (z[1] - z[0]) / math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class Elementwise(Nonlinearity):
    """h = function(z), or function(g) * u where gated: "GLU variants improve Transformer" (Shazeer, 2020, arXiv 2002.05202)."""

    function: Callable[[Array], Array]
    second_moment: float  # type: ignore[misc]
    exact_zeros: bool = False  # type: ignore[misc]
    gated: bool = False  # type: ignore[misc]

    @property
    def has_gate_out(self) -> bool:
        return self.gated

    def gate_out(self, params: Params, g: Array) -> Array:
        return self.function(g)

    def __call__(self, params: Params, z: Array, u: Any = None) -> Array:
        h = self.function(z)
        return h * u if self.gated else h
