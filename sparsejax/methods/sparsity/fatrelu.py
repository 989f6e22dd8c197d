"""FATReLU: the threshold of ReLU is raised after training (ProSparse's last step, Song et al., 2024, arXiv 2402.13516).

    sigma_t(z) = z if z >= t else 0          no shrinkage: sigma_t(t) = t; t = 0 is ReLU

Acts on the FFN's activation of a model that was trained with ReLU: `relu` becomes `fatrelu:t`, `reglu` becomes `fatreglu:t`.
Published: t = .01, from 88.1 to 89.3 % zeros on ProSparse-7B; .03 gives 91.0 %.
Nothing is fitted: raising t never loses a zero.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from sparsejax.compress.hadamard import check_unrotated
from sparsejax.compress.recipe import ACTIVATIONS, Pass, Work
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check, check_choice

RAISED = {"relu": "fatrelu", "reglu": "fatreglu"}


@dataclasses.dataclass
class FatRelu(Pass):
    """threshold: t, of the activation's own scale."""

    threshold: float = 0.01
    stage: ClassVar[str] = ACTIVATIONS

    def check(self, config: ModelConfig) -> None:
        check(0 <= self.threshold < float("inf"), "threshold", self.threshold, "must be finite and not negative")
        check_choice("model.ffn.activation", config.ffn.activation, RAISED)
        own = [feed for feed in config.feed_pattern if feed.startswith("ffn:")]
        check(not own, "model.feed_pattern", own, "has activations of its own")
        check_unrotated(config, self.name)

    def apply(self, model: Model, work: Work) -> Model:
        activation = f"{RAISED[model.config.ffn.activation]}:{self.threshold!r}"
        work.note(self.name, activation=activation)
        ffn = dataclasses.replace(model.config.ffn, activation=activation)
        return model.rebuilt(dataclasses.replace(model.config, ffn=ffn), {})
