"""KurTail: rotations learned layer by layer, for tensors whose entries are spread as evenly as can be.

"KurTail: Kurtosis-based LLM Quantization" (2025, arXiv 2503.01483). No gradient goes through the model:

    min over R of |kurtosis(X R) - 1.8|,    kurtosis = E (x - mu)^4 / sigma^4 over all entries; 1.8 is that of a uniform x

R1 for the normed inputs of attention and FFN of all blocks together, R2 for each head, by Cayley Adam; R4 is a fixed Hadamard
transform. Mixing many channels leaves marginals normal (3), so the gap saturates near 1.2.
Unsourced: rate and steps (published "about 100"). Here R2 is fitted to what enters o, which is what is rounded, where the paper
takes the values themselves, for its cache; rows have length 1 each, since each has a scale of its own; the first token of a
sequence is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sparsejax.compress.orthogonal import Cayley, Parametrisation
from sparsejax.compress.rotation_objectives import kurtosis_gap
from sparsejax.methods.quant.learned_rotation import SampleRotation


@dataclass
class KurTail(SampleRotation):
    """Options: those of `SampleRotation`."""

    rate: float = 0.05
    parametrisation: ClassVar[Parametrisation] = Cayley(momentum=0.9, second=0.99)

    def objective(self, y: Any) -> Any:
        return kurtosis_gap(y)
