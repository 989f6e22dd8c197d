"""DartQuant's rotation: the orthogonal factor of a free matrix, moved so that small entries grow.

"DartQuant: Efficient Rotational Distribution Calibration for LLM Quantization" (2025, arXiv 2511.04063):

    R = Q of qr(Z),    min over Z of E exp(-|X R|)        "Whip"

Under a rotation lengths stay, so entries that grow from 0 pull outliers in. No optimiser on a manifold is needed: any one will
do for Z, here Adam. R1 for the inputs of all blocks together, R2 for each head; R4 is a fixed Hadamard transform.
Unsourced: rate and steps. Rows have a root mean square of 1, which is the unit of |x|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sparsejax.compress.orthogonal import Parametrisation, Qr
from sparsejax.compress.rotation_objectives import whip
from sparsejax.methods.quant.learned_rotation import SampleRotation


@dataclass
class DartQuant(SampleRotation):
    """Options: those of `SampleRotation`."""

    rate: float = 0.001
    parametrisation: ClassVar[Parametrisation] = Qr()

    def objective(self, y: Any) -> Any:
        return whip(y)
