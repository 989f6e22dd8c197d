"""SpinQuant: rotations learned for the loss of the model whose activations are rounded.

"SpinQuant: LLM Quantization with Learned Rotations" (Liu et al., 2024, arXiv 2405.16406). R1 of the residual stream and R2 of
every key-value head are learned on the Stiefel manifold by Cayley SGD, R4 is a fixed Hadamard transform:

    min over R1, R2 of   mean -log p(t_i | t_<i),   p of the model with x rounded per token in front of every map

Weights stay floats, as where GPTQ follows. Published: rate 1.5 along a cosine, 100 steps, 8 x 2,048 tokens a step, activations
asymmetric, R1 from a random Hadamard matrix; R2 shared by the heads of a layer. Here one calibration sequence a step, symmetric
activations, and an R2 for each key-value head. Where the loss on the calibration tokens does not fall the start is kept.
Not here: rounded keys and values in the loss, and R3 (see `quarot`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from sparsejax.compress.orthogonal import Cayley, Parametrisation
from sparsejax.compress.recipe import Work
from sparsejax.compress.rotation_objectives import cross_entropy
from sparsejax.io.model import Model
from sparsejax.methods.quant.learned_rotation import ModelRotation, Rotations


@dataclass
class SpinQuant(ModelRotation):
    """Options: those of `ModelRotation`."""

    rate: float = 1.5
    parametrisation: ClassVar[Parametrisation] = Cayley()

    def solve(self, folded: Model, start: Rotations, work: Work) -> tuple[Rotations, Mapping[str, np.ndarray]]:
        rounded = self.rounded(folded)

        def loss(rotations: Any, free: Any, tokens: Any) -> Any:
            return cross_entropy(rounded.logits(rotations, free, tokens), tokens)

        batches = [jnp.asarray(row)[None] for row in work.calibration.tokens]
        return self.learned(work, "cross_entropy", loss, start, batches).rotations, {}
