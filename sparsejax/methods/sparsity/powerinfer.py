"""PowerInfer's statistics: a few hot hidden units make most activations (Song et al., 2023, arXiv 2312.12456).

"PowerInfer: Fast Large Language Model Serving with a Consumer-grade GPU". Counts over calibration tokens how often each unit of
each layer is active (see `activity`), and orders the units by it:

    freq_j = tokens at which j is active;   cov(q) = sum of the q F largest freq / sum of all    cov(0) = 0, cov(1) = 1, concave
    h P = activation(x W_gate P) * (x W_up P);   y = (h P)(P^T W_down)        P: a permutation, so that y is what it was

Reordered, the hot units are the first tiles of the maps, always read, and a tile of cold ones is skipped where all of it is
silent: `tile_survival` is the share of (token, tile) pairs that is not. The sum over units may be cut between two devices
anywhere: y = h_hot W_down,hot + h_cold W_down,cold.
Published: 26 % of the units make 80 % of the activations of OPT-30B, 43 % of LLaMA-ReGLU-70B.
Not here: two devices, their integer program of placement, and predictors of other sizes by layer (the predictor: `deja_vu`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from sparsejax import plugs
from sparsejax.arrays import dense
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.neuron_sets import with_neurons
from sparsejax.compress.recipe import STRUCTURE, Pass, Tier, Work
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.activity import active, contribution, has_exact_zeros, token_rows
from sparsejax.methods.sparsity.gate_threshold import dense_ffn_layers
from sparsejax.methods.sparsity.sequence_sets import check_plain_ffn
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check

REPORTED = (0.1, 0.2, 0.5)


def coverage(frequency: Float[np.ndarray, " F"], share: float) -> float:
    """cov(share): of all activations, those of the most frequent units; a unit in part counts in part."""
    cumulative = np.concatenate([[0.0], np.cumsum(np.sort(np.asarray(frequency, np.float64))[::-1])])
    return float(np.interp(share * len(frequency), np.arange(len(cumulative)), cumulative) / max(cumulative[-1], 1e-300))


def by_frequency(frequency: Float[np.ndarray, " F"]) -> Int[np.ndarray, " F"]:
    """The units, the most frequent first; equals stay in order."""
    return np.argsort(-np.asarray(frequency, np.float64), kind="stable")


def tile_survival(activity: Bool[np.ndarray, "N F"], tile: int) -> float:
    """Share of (token, tile of neighbouring units) pairs that hold an active unit."""
    return float(np.logical_or.reduceat(activity, np.arange(0, activity.shape[1], tile), axis=1).mean())


@plugs.register("pass", "reorder_neurons")
@dataclass
class ReorderNeurons(Pass):
    """Orders the hidden units of every FFN by frequency; the function stays, up to the order of its sums.

    density: share of (token, unit) pairs that counts as active where zeros are not exact. tile: units of the reported tiles.
    """

    density: float = 0.2
    tile: int = 16
    stage: ClassVar[str] = STRUCTURE

    def check(self, config: ModelConfig) -> None:
        check(0 < self.density < 1, "density", self.density, "must be in (0, 1)")
        check(self.tile >= 1, "tile", self.tile, "must be at least 1")
        check_plain_ffn(config, dense_ffn_layers(config))

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x {tier.sequences} x {tier.length} tokens, once"

    def apply(self, model: Model, work: Work) -> Model:
        blocks, exact = Blocks(model), has_exact_zeros(model.config)
        layers, skip = dense_ffn_layers(model.config), work.calibration.spec.skip_first
        h, found = blocks.embed(jnp.asarray(work.calibration.tokens)), {}
        for layer in work.layers("reorder neurons: frequencies", len(blocks)):
            h, tensors = blocks.tensors(layer, h, "mlp.hidden")
            if layer in layers:
                hidden = token_rows(tensors["mlp.hidden"], skip)
                down = np.asarray(dense(blocks.values(layer)["mlp"]["down"]["kernel"]), np.float32)
                found[layer] = work.piece(f"block-{layer}", functools.partial(self._counted, hidden, down, exact))
        work.note(self.name, **{
            name: {layer: [round(float(value), 4) for value in np.ravel(piece[name])] for layer, piece in found.items()}
            for name in ("coverage", "tile_survival", "active")
        }, coverage_at=REPORTED)  # fmt: skip
        return with_neurons(model, {layer: by_frequency(piece["frequency"]) for layer, piece in found.items()})

    def _counted(self, hidden: np.ndarray, down: np.ndarray, exact: bool) -> dict[str, Any]:
        """Frequencies, and what is reported: coverage at `REPORTED`, survival of tiles before and after."""
        activity = active(contribution(hidden, down), exact, self.density)
        frequency = activity.sum(axis=0, dtype=np.int64)
        order = by_frequency(frequency)
        return {"frequency": frequency, "active": np.float64(activity.mean()),
                "coverage": np.array([coverage(frequency, share) for share in REPORTED]),
                "tile_survival": np.array([tile_survival(a, self.tile) for a in (activity, activity[:, order])])}
