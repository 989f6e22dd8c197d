"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864), half-split: feature i is rotated with feature i + r / 2.

This is the convention of GPT-NeoX and of Hugging Face's Llama weights (Meta's own files interleave pairs instead). With a
fraction below 1 only the leading r = int(fraction * K) features of a head are rotated (NeoX). Angles are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.plugs import check, register, resolve


@register("rope_scaling", "none")
@dataclass(frozen=True)
class NoScaling:
    """Frequencies as they are."""

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        return frequencies


@register("rope_scaling", "linear")
@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al., 2023, arXiv 2306.15595): all frequencies divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        check(self.factor >= 1, "rope.scaling: linear.factor", self.factor, "at least 1")

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        return frequencies / self.factor


@register("rope_scaling", "llama3")
@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rule: wavelengths above original_length / low are stretched by `factor`, those below original_length / high
    are kept, and between them the frequency is interpolated linearly in original_length / wavelength."""

    factor: float
    low: float
    high: float
    original_length: int

    def __post_init__(self) -> None:
        check(self.factor >= 1, "rope.scaling: llama3.factor", self.factor, "at least 1")
        check(0 < self.low < self.high, "rope.scaling: llama3.low, llama3.high", (self.low, self.high), "0 < low < high")
        check(self.original_length > 0, "rope.scaling: llama3.original_length", self.original_length, "positive")

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        turns = self.original_length * frequencies / (2 * np.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


RopeScaling = NoScaling | LinearScaling | Llama3Scaling


def parse_scaling(text: str, field: str = "rope.scaling") -> RopeScaling:
    """The scaling that `none`, `linear:FACTOR` or `llama3:FACTOR,LOW,HIGH,ORIGINAL_LENGTH` names; ConfigError names `field`."""
    return resolve("rope_scaling", text, field)


def rotary_size(head_dim: int, fraction: float) -> int:
    """The number of leading features that are rotated; ConfigError unless it is even and positive."""
    check(0 < fraction <= 1, "rope.fraction", fraction, "above 0 and at most 1")
    size = int(head_dim * fraction)
    check(size >= 2 and size % 2 == 0, "rope.fraction", fraction, f"rotates {size} of {head_dim} features, not an even number")
    return size


def inverse_frequencies(
    head_dim: int, *, theta: float, fraction: float = 1.0, scaling: str | RopeScaling = "none"
) -> np.ndarray:
    """float64 [r / 2] angles per position, theta ** (-2 i / r), after scaling."""
    check(theta > 1, "rope.theta", theta, "above 1")
    size = rotary_size(head_dim, fraction)
    frequencies = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    return (parse_scaling(scaling) if isinstance(scaling, str) else scaling)(frequencies)


def rope_tables(
    positions: Int[Array, "*B T"], head_dim: int, *, theta: float, fraction: float = 1.0, scaling: str | RopeScaling = "none"
) -> tuple[Float[Array, "*B T R"], Float[Array, "*B T R"]]:
    """float32 cosines and sines [..., T, r / 2] of the angles at `positions`, made once per forward pass for all layers."""
    frequencies = inverse_frequencies(head_dim, theta=theta, fraction=fraction, scaling=scaling).astype(np.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * positions.ndim + (-1,))
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "B T H K"], cos: Float[Array, "B T R"], sin: Float[Array, "B T R"]) -> Float[Array, "B T H K"]:
    """Rotate the leading 2 R features of x by the tables of `rope_tables` (batch may be 1), in at least float32."""
    half = cos.shape[-1]
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x.dtype) for part in rotated] + [rest], axis=-1)


def rope(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "B T"],
    *,
    theta: float,
    fraction: float = 1.0,
    scaling: str | RopeScaling = "none",
) -> Float[Array, "B T H K"]:
    """Rotate x to its positions: `apply_rope` of `rope_tables`."""
    return apply_rope(x, *rope_tables(positions, x.shape[-1], theta=theta, fraction=fraction, scaling=scaling))
