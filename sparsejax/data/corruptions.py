"""Noise on held-out images, as ImageNet-C adds it ("Benchmarking neural network robustness", 2019, arXiv 1903.12261).

A spec is `gaussian_noise:SEVERITY`, severity 1 to 5; images are float32 in [0, 1] before and after.

    gaussian_noise   clip(x + sigma N(0, 1))                     sigma .08 .12 .18 .26 .38
    shot_noise       clip(Poisson(x c) / c)                      c 60 25 12 5 3
    impulse_noise    a share of the entries becomes 0 or 1       share .03 .06 .09 .17 .27

The settings are the published ones, for natural images. Not here: blur, weather and compression.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from sparsejax.plugs import check, register

Image = Float[np.ndarray, "H W C"]


@dataclass(frozen=True)
class Corruption:
    """severity: 1 (least) to 5."""

    severity: int = 3
    strengths: ClassVar[tuple[float, ...]]

    def __post_init__(self) -> None:
        check(1 <= self.severity <= 5, "severity", self.severity, "must be 1 to 5")

    @property
    def strength(self) -> float:
        """The setting of this severity."""
        return self.strengths[self.severity - 1]


@register("corruption", "gaussian_noise")
@dataclass(frozen=True)
class GaussianNoise(Corruption):
    """Normal noise added to every entry."""

    strengths: ClassVar[tuple[float, ...]] = (0.08, 0.12, 0.18, 0.26, 0.38)

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        """The corrupted image."""
        return np.clip(image + self.strength * random.standard_normal(image.shape), 0, 1).astype(np.float32)


@register("corruption", "shot_noise")
@dataclass(frozen=True)
class ShotNoise(Corruption):
    """As many photons as a Poisson variable says: noise that grows with brightness and leaves black as it is."""

    strengths: ClassVar[tuple[float, ...]] = (60, 25, 12, 5, 3)

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        """The corrupted image."""
        return np.clip(random.poisson(image * self.strength) / self.strength, 0, 1).astype(np.float32)


@register("corruption", "impulse_noise")
@dataclass(frozen=True)
class ImpulseNoise(Corruption):
    """Salt and pepper, as much of one as of the other."""

    strengths: ClassVar[tuple[float, ...]] = (0.03, 0.06, 0.09, 0.17, 0.27)

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        """The corrupted image."""
        hit, salt = random.random(image.shape) < self.strength, random.random(image.shape) < 0.5
        return np.where(hit, salt, image).astype(np.float32)
