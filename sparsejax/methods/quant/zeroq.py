"""ZeroQ: what each map alone does to the predictions when it is rounded, on text that the model writes itself.

"ZeroQ: A Novel Zero Shot Quantization Framework" (Cai et al., 2020, arXiv 2001.00281). A bit allocator:

    loss of map i in format k = mean over tokens of KL(M(x) || M with Q_k(W_i) (x)), nats

Losses of single maps are taken to add up. Maps that share a format are rounded together. The paper distils its data x from the
statistics that batch norms keep. RMS and layer norms keep none, so that there is nothing to distil from here; instead x is
drawn from the model, from its begin token on (`data=generated`), so that plan and rounding to nearest need no data. On
`data=calibration` it is plain KL sensitivity. Ranges of activations are left out: activations have dynamic scales here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sparsejax.compress.allocators import allocation_tokens
from sparsejax.compress.bit_allocation import Additive, BitProblem, in_pieces, tied_maps
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.curvature import Curvature
from sparsejax.compress.recipe import Tier
from sparsejax.evaluate.generate import Params, decoder, generate
from sparsejax.evaluate.sampling import Sampling
from sparsejax.io.model import Model
from sparsejax.plugs import check, check_choice

DATA = ("generated", "calibration")
SEQUENCES = 4  # that are generated


@dataclass(frozen=True)
class Zeroq(Additive):
    """data: of `DATA`; seed: of generated text; budget, menu, tied: see `Additive`. Tokens are those that the tier gives."""

    data: str = "generated"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(f"{self.name}: data", self.data, DATA)

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        rule = "has none, and text begins with its begin token; use data=calibration"
        check(self.data != "generated" or model.tokenizer is not None, f"{self.name}: tokenizer", None, rule)

    def cost(self, sites: Sequence[str], tier: Tier) -> str:
        groups = len(tied_maps(sites)) if self.tied else len(sites)
        return f"{groups} groups of maps x {len(self.menu)} formats x {tier.allocation_tokens} tokens"

    def losses(self, problem: BitProblem) -> Float[np.ndarray, "N K"]:
        key = self.key(problem, self.data, self.seed)
        tokens = self._tokens(problem, key)
        of_model = functools.cache(lambda: Curvature(problem.model, problem.sites))
        features = functools.cache(lambda: of_model().features(tokens))
        turns = [(group, spec) for group in problem.groups for spec in problem.specs]

        def measure(turn: int) -> np.ndarray:
            group, spec = turns[turn]
            kernels = {problem.sites[number]: problem.rounded(problem.sites[number], spec) for number in group}
            return np.asarray(of_model().divergence(tokens, features(), kernels))

        names = [f"divergence-{key}-{turn}" for turn in range(len(turns))]
        found = np.reshape(in_pieces(problem, "KL of single maps", names, measure), (len(problem.groups), -1))
        losses = np.empty((len(problem.sites), len(problem.specs)))
        for group, row in zip(problem.groups, found, strict=True):
            losses[list(group)] = np.maximum(row, 0) / len(group)  # rounding takes a KL of nearly nothing below 0
        return losses

    def _tokens(self, problem: BitProblem, key: str) -> Int[np.ndarray, "B T"]:
        if self.data == "calibration":
            return allocation_tokens(problem.work)
        length = min(problem.work.tier.allocation_tokens // SEQUENCES, problem.model.config.max_length)
        drawn = problem.work.piece(f"generated-{key}", lambda: {"tokens": written(problem.model, SEQUENCES, length, self.seed)})
        return drawn["tokens"]


def written(model: Model, sequences: int, length: int, seed: int) -> Int[np.ndarray, "B T"]:
    """Text that a model writes from its begin token on, at temperature 1; ends of texts do not end a row."""
    assert model.tokenizer is not None
    begin = [[model.tokenizer.bos_id]] * sequences
    return generate(decoder(model.structure), Params(model.values), begin, length - 1, Sampling(), seed).tokens
