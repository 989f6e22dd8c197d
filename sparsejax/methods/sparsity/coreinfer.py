"""CoreInfer: the tokens of a prompt vote for the hidden units that decode what follows (Wang et al., 2024, arXiv 2410.18311).

"CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse Activation". Acts on the FFN's
hidden vector h [F] of the middle layers, see `sequence_sets`:

    token t votes for the floor(alpha n) largest of its n positive entries;   n_j = votes for unit j over the prompt
    stability (clusters = 0): the k units of most votes
    similarity: v = the `core` units of most votes as a 0/1 vector; of the nearest of `clusters` centroids, which k-means found
    among prompts of calibration data, the k units of most votes over its prompts

`signed` votes for h as released, where large negative entries never qualify; else for |h| (n: its non-zeros), which gated units
with a SiLU need; with a plain ReLU both are the same. Published: alpha .4, k = .2 F (translation: .4 F), layers 6 to 26 of 32,
at least 4 clusters, vectors of 3000 of 11008 units.
Not here: the elbow rule for the number of clusters, and one deep layer's cluster for all layers: each layer has its own, since
in one pass it knows no other. The set stays for the whole sequence.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparsejax import plugs
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.recipe import Work
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.selection import Arrays
from sparsejax.methods.sparsity.sequence_sets import SequenceSet, SetPass
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Weight, weight
from sparsejax.ops.selectors import check_fraction, kept_count, topk_mask
from sparsejax.plugs import check

ITERATIONS = 50  # of k-means, at most


@plugs.register("activation_op", "coreinfer")
@dataclass(frozen=True)
class CoreSet(SequenceSet):
    """The units of most votes, or those of the nearest cluster of prompts."""

    fraction: float = 0.2
    alpha: float = 0.4
    signed: bool = False
    clusters: int = 0
    core: float = 3000 / 11008
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("coreinfer: alpha", self.alpha)
        check_fraction("coreinfer: core", self.core)
        check(self.clusters >= 0, "coreinfer: clusters", self.clusters, "must not be negative")

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """centroids, sets [clusters, F]: a cluster's mean vector, and 1 at its units."""
        empty = jnp.zeros((self.clusters, shape[-2]), jnp.float32)
        return {name: weight(empty, (None, None), "fitted") for name in ("centroids", "sets") if self.clusters}

    def statistic(self, arrays: Arrays, h: Float[Array, "B T F"], prompt: Bool[Array, "B T"]) -> Float[Array, "B F"]:
        """Votes."""
        score = h if self.signed else jnp.abs(h)
        # floor(alpha n) by a table: in float32 the product may cross an integer.
        sizes = jnp.asarray(np.floor(self.alpha * np.arange(h.shape[-1] + 1)), jnp.int32)
        count = sizes[jnp.sum(score > 0, axis=-1, keepdims=True)]
        core = topk_mask(score, count) & prompt[..., None]
        return jnp.sum(core, axis=1, dtype=jnp.float32)

    def vector(self, votes: Float[Array, "S F"]) -> Float[Array, "S F"]:
        """What prompts are compared by: 1 at the units of most votes."""
        return topk_mask(votes, kept_count(votes.shape[-1], self.core)).astype(jnp.float32)

    def select(self, arrays: Arrays, statistic: Float[Array, "S F"]) -> Bool[Array, "S F"]:
        if not self.clusters:
            return super().select(arrays, statistic)
        centroids = arrays["centroids"]
        nearness = self.vector(statistic) @ centroids.T - jnp.sum(jnp.square(centroids), axis=1)[None] / 2
        return arrays["sets"][jnp.argmax(nearness, axis=1)] > 0


@plugs.register("pass", "coreinfer")
@dataclass
class CoreInfer(SetPass):
    """See `CoreSet`.

    prompt: tokens of the calibration prompts that are clustered.
    """

    sparsity: float = 0.8
    dense_first: int = 6
    dense_last: int = 5
    alpha: float = 0.4
    signed: bool = False
    clusters: int = 0
    core: float = 3000 / 11008
    prompt: int = 128
    seed: int = 0

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        self._spec()
        check(self.prompt >= 1, "prompt", self.prompt, "must be at least 1")

    def op(self) -> str:
        votes = f"alpha={self.alpha},signed={str(self.signed).lower()}"
        return f"coreinfer:{1 - self.sparsity:.10g},{votes},clusters={self.clusters},core={self.core}"

    def _spec(self) -> CoreSet:
        return plugs.resolve("activation_op", self.op(), self.name)

    def arrays(self, model: Model, work: Work, layers: list[int]) -> dict[int, dict[str, Any]]:
        if not self.clusters:
            return super().arrays(model, work, layers)
        prompts = self._prompts(work)
        spec, blocks = self._spec(), Blocks(model)
        votes = jax.jit(lambda h: spec.statistic({}, h.astype(jnp.float32), jnp.ones(h.shape[:2], bool)))
        h, found = blocks.embed(jnp.asarray(prompts)), {}
        for layer in work.layers("coreinfer: clusters", layers[-1] + 1):
            h, tensors = blocks.tensors(layer, h, "mlp.hidden")
            if layer in layers:
                counted = votes(tensors["mlp.hidden"])
                found[layer] = work.piece(f"block-{layer}", functools.partial(self._clustered, spec, counted))
        work.note(self.name, cluster_sizes={layer: piece["sizes"].tolist() for layer, piece in found.items()})
        return {layer: {name: jnp.asarray(piece[name]) for name in ("centroids", "sets")} for layer, piece in found.items()}

    def _prompts(self, work: Work) -> np.ndarray:
        """int32[N, prompt]: the calibration cut into prompts.

        Raises:
          ConfigError: fewer than there are to be clusters.
        """
        tokens = work.calibration.tokens
        length = min(self.prompt, tokens.shape[1])
        prompts = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
        check(len(prompts) >= self.clusters, "coreinfer: clusters", self.clusters, f"{len(prompts)} prompts of {length} tokens")
        return prompts

    def _clustered(self, spec: CoreSet, votes: Float[Array, "N F"]) -> dict[str, np.ndarray]:
        vectors = np.asarray(spec.vector(votes), np.float64)
        centroids, member = k_means(vectors, self.clusters, self.seed)
        totals = np.stack([np.asarray(votes, np.float64)[member == one].sum(axis=0) for one in range(self.clusters)])
        sets = topk_mask(jnp.asarray(totals, jnp.float32), spec.kept(totals.shape[1]))
        return {"centroids": centroids.astype(np.float32), "sets": np.asarray(sets, np.float32),
                "sizes": np.bincount(member, minlength=self.clusters)}


def k_means(points: Float[np.ndarray, "N F"], clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(centroids [clusters, F], cluster of each point [N]) by Lloyd's iterations from k-means++ starts; no cluster is empty."""
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(points)))]
    while len(chosen) < clusters:
        nearest = _square_distances(points, points[chosen]).min(axis=1)
        nearest[chosen] = 0
        left = np.setdiff1d(np.arange(len(points)), chosen)
        chosen.append(int(rng.choice(len(points), p=nearest / nearest.sum()) if nearest.sum() > 0 else left[0]))
    centroids, member = points[chosen], np.full(len(points), -1)
    for _ in range(ITERATIONS):
        distances = _square_distances(points, centroids)
        found = distances.argmin(axis=1)
        for empty in np.setdiff1d(np.arange(clusters), found):  # it takes the point that lies worst in a larger cluster
            crowded = np.bincount(found, minlength=clusters)[found] > 1
            found[np.where(crowded, distances[np.arange(len(points)), found], -1).argmax()] = empty
        if (found == member).all():
            break
        member = found
        centroids = np.stack([points[member == one].mean(axis=0) for one in range(clusters)])
    return centroids, member


def _square_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return np.maximum(np.square(points).sum(1)[:, None] - 2 * points @ centres.T + np.square(centres).sum(1)[None], 0)
