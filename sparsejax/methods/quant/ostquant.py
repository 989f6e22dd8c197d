"""OSTQuant: orthogonal matrices and scales learned together, for the logits of the model before it was rounded.

"OSTQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations for Better Distribution
Fitting" (Hu et al., 2025, arXiv 2501.13987). Pairs that cancel, O orthogonal and s = exp(free) > 0:

    y = round(x W1 O diag(1/s)) round(diag(s) O^T W2)

O of the residual stream (R1) and of each head between v and o (R2); s behind each norm, between up and down, and in each head;
R4 is a fixed Hadamard transform, behind the scales of up. What is minimised is KL-Top: KL of the k largest logits of the
float model, both sides renormalised over these, with inputs and weights rounded, since scales would else push all
difficulty into the weights. R1 starts from eigenvectors of the readers' sum of W W^T times a Hadamard matrix ("WOMI"), R2 from
a Hadamard matrix, s from 1.
The report has the paper's QSUR, `rotation_objectives.log_qsur`, of what enters the blocks.
Published: k 1,000, about 150 iterations, Riemannian Adam. Unsourced: rates, here .02 for Cayley Adam, .01 for s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from sparsejax import nnx_compat
from sparsejax.compress.basis import eigenbasis, hadamard_basis
from sparsejax.compress.orthogonal import Cayley, Parametrisation
from sparsejax.compress.recipe import Work
from sparsejax.compress.rotated import STREAM, free_scales
from sparsejax.compress.rotation_objectives import kl_top, log_qsur
from sparsejax.compress.transforms import folded_kernels
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.methods.quant.learned_rotation import ModelRotation, Rotations, samples
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_map import residual_stream
from sparsejax.plugs import check, resolve_chain

SPACE_ROWS = 16_384


@dataclass
class OstQuant(ModelRotation):
    """weights: the op that rounds kernels while learning; top: k; scale_rate: of the scales, 0: none are learned."""

    steps: int = 150
    rate: float = 0.02
    weights: str = "int4"
    top: int = 1_000
    scale_rate: float = 0.01
    parametrisation: ClassVar[Parametrisation] = Cayley(momentum=0.9, second=0.99)

    def check(self, config: ModelConfig) -> None:
        resolve_chain("weight_op", self.weights, "weights")
        check(self.top >= 2, "top", self.top, "must be at least 2: one logit alone has no distribution")
        check(0 <= self.scale_rate < float("inf"), "scale_rate", self.scale_rate, "must not be negative")
        super().check(config)

    def start(self, folded: Model) -> Rotations:
        moment = np.zeros((folded.config.d_model,) * 2)
        for stretch in residual_stream(folded.config):
            if stretch.name != "head":
                moment += sum(w @ w.T for w in folded_kernels(folded, stretch).values())
        rotation = eigenbasis(moment) @ hadamard_basis(folded.config.d_model, self.seed)
        return super().start(folded) | {STREAM: rotation}

    def solve(self, folded: Model, start: Rotations, work: Work) -> tuple[Rotations, Mapping[str, np.ndarray]]:
        rounded, top = self.rounded(folded, self.weights), min(self.top, folded.config.vocab_size)

        @jax.jit
        def teacher(values: Any, tokens: Any) -> dict[str, Any]:
            logits, _ = nnx_compat.merge(folded.structure, values)({"tokens": tokens}, Context(mode="prefill"))
            largest, indices = jax.lax.top_k(logits, top)
            return {"tokens": tokens, "teacher": largest, "indices": indices}

        batches = [teacher(folded.values, row[None]) for row in work.calibration.tokens]

        def loss(rotations: Any, free: Any, batch: Any) -> Any:
            return kl_top(batch["teacher"], batch["indices"], rounded.logits(rotations, free, batch["tokens"]))

        free = free_scales(folded) if self.scale_rate else {}
        found = self.learned(work, "kl_top", loss, start, batches, free=free, free_rate=self.scale_rate)
        bases = {"plain": np.eye(folded.config.d_model), "start": start[STREAM], "learned": found.rotations[STREAM]}
        self._note_space(folded, work, bases)
        return found.rotations, found.free

    def _note_space(self, folded: Model, work: Work, bases: Mapping[str, np.ndarray]) -> None:
        """The share of the quantizer's grid that what enters the blocks fills, before its scales, in these bases."""
        rows = np.asarray(samples(folded, work, SPACE_ROWS, self.seed).stream, np.float64)
        if len(rows) > rows.shape[1]:  # else the ellipsoid is flat
            c = rows.T @ rows / len(rows)
            work.note(self.name, log_qsur={name: log_qsur(basis.T @ c @ basis) for name, basis in bases.items()})
