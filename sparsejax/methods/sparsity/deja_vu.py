"""Deja Vu: a small learned map predicts which hidden units a token needs (Liu et al., 2023, arXiv 2310.17157).

"Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time". Acts in the FFN on its input x [D], before any of its maps:

    z = (x A) B,  A [D, r], B [r, F]         linear: the released code; `relu`: relu(x A) B, as the paper's text and PowerInfer
    compute the k units of largest z ("topk"), or those with z > t ("threshold", t fitted so that the share is the same)

Labels y come from calibration activations, see `activity`. The loss weighs rare positives up: w (softplus(z) - y z) with
w = y (1 - p) + p, p = mean(y) + .005; `mass` multiplies the positives' weight by their contribution, so that missed mass counts
and not missed units. AdamW 1e-3, decay .01, batch 1024, at most 20 epochs, until recall .99; 95 % of the tokens train and 5 %
judge. Published for OPT-175B: r = 1000, 400k tokens. Here r keeps the predictor within 5 % of the FFN's bytes unless given: 62
for SmolLM2. The released cut sigmoid(z) >= .5 leaves the density to chance and is not here; nor are predictors of heads, nor
predicting from the layer before (a block's selector sees its own input alone).
With a ReLU a superset of the active units gives the dense output exactly; a missed unit j takes h_j W_down[j] from it.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from sparsejax import plugs
from sparsejax.arrays import dense
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.recipe import ACTIVATIONS, Pass, Tier, Work, check_sparsity
from sparsejax.compress.surgery import Placed, place, with_op
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.activity import active, contribution, has_exact_zeros, token_rows
from sparsejax.methods.sparsity.gate_threshold import check_unselected, dense_ffn_layers
from sparsejax.methods.sparsity.selection import Arrays, along, fitted
from sparsejax.models.config import ModelConfig
from sparsejax.models.sizes import is_gated
from sparsejax.nnx_compat import Weight, weight
from sparsejax.ops.selectors import kept_count, threshold_mask, topk_mask
from sparsejax.plugs import check, check_choice

HELD_OUT = 0.05
ENOUGH_RECALL = 0.99
BUDGET = 0.05  # of the FFN's bytes
Params = dict[str, Array]


@plugs.register("neuron_selector", "predictor")
@dataclass(frozen=True)
class Predictor:
    """The k units of largest predicted logit; k = 0: those above a fitted threshold. relu: between the two maps."""

    rank: int
    k: int = 0
    relu: bool = False
    reads_gate: ClassVar[bool] = False
    skips: ClassVar[tuple[str, ...]] = ("gate", "up")

    def __post_init__(self) -> None:
        check(self.rank >= 1, "predictor: rank", self.rank, "must be at least 1")
        check(self.k >= 0, "predictor: k", self.k, "must not be negative")

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """a [D, r], b [r, F], drawn with unit gain; threshold [] where k = 0."""
        width, hidden = shape
        maps = initial(key, width, self.rank, hidden)
        a, b = weight(maps["a"], (axes[0], None), "adapter"), weight(maps["b"], (None, axes[1]), "adapter")
        return {"a": a, "b": b} if self.k else {"a": a, "b": b, "threshold": fitted(None)}

    def __call__(self, arrays: Arrays, x: Array, gate_out: Any, ctx: Context) -> Bool[Array, "... F"]:
        """The units that are computed, from x [..., D]."""
        z = logits(arrays, x, self.relu)
        return topk_mask(z, self.k) if self.k else threshold_mask(z, along(arrays["threshold"], z))


def initial(key: Array, width: int, rank: int, hidden: int) -> Params:
    """a [D, r] and b [r, F], float32."""
    keys = jax.random.split(key)
    return {"a": jax.random.normal(keys[0], (width, rank)) * width**-0.5,
            "b": jax.random.normal(keys[1], (rank, hidden)) * rank**-0.5}


def logits(params: Params, x: Float[Array, "... D"], relu: bool) -> Float[Array, "... F"]:
    """z, float32."""
    middle = x @ params["a"].astype(x.dtype)
    middle = jax.nn.relu(middle) if relu else middle
    return jnp.matmul(middle, params["b"].astype(x.dtype), preferred_element_type=jnp.float32)


def affordable_rank(width: int, hidden: int, maps: int) -> int:
    """The largest r with r (D + F) <= 5 % of the FFN's `maps` D F, at least 1."""
    return max(1, int(BUDGET * maps * width * hidden / (width + hidden)))


@plugs.register("pass", "deja_vu")
@dataclass
class DejaVu(Pass):
    """Trains a predictor for every FFN.

    sparsity: share of hidden units that are not computed, and not positive where zeros are not exact. rank: 0: as afforded.
    select: topk | threshold. mass: weigh positives by what they contribute.
    """

    sparsity: float = 0.5
    rank: int = 0
    relu: bool = False
    select: str = "topk"
    mass: bool = False
    epochs: int = 20
    batch: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0
    stage: ClassVar[str] = ACTIVATIONS

    def check(self, config: ModelConfig) -> None:
        check_sparsity(self.sparsity)
        check_choice("select", self.select, ("topk", "threshold"))
        for name, least in {"rank": 0, "epochs": 1, "batch": 1}.items():
            check(getattr(self, name) >= least, name, getattr(self, name), f"must be at least {least}")
        activation = plugs.resolve("nonlinearity", config.ffn.activation, "model.ffn.activation")
        check(not activation.rowwise, "model.ffn.activation", config.ffn.activation,
              "hidden units are left out, and here each depends on its whole row")
        check(not activation.halves, "model.ffn.activation", config.ffn.activation, "up has two outputs for each hidden unit")
        check_unselected(config, dense_ffn_layers(config))

    def after(self, config: ModelConfig) -> ModelConfig:
        layers = dense_ffn_layers(config) if self.sparsity else []
        return with_op(config, "neurons", {f"blocks.{layer}.mlp": self._op(config)[1] for layer in layers})

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} predictors x up to {self.epochs} epochs of {tier.sequences} x {tier.length} tokens"

    def apply(self, model: Model, work: Work) -> Model:
        self.check(model.config)  # again: an earlier pass of the recipe may have taken a site
        if self.sparsity == 0:
            return model
        blocks, config, skip = Blocks(model), model.config, work.calibration.spec.skip_first
        rank, op = self._op(config)
        layers, found = dense_ffn_layers(config), {}
        h = blocks.embed(jnp.asarray(work.calibration.tokens))
        for layer in work.layers("deja vu: predictors", len(blocks)):
            h, tensors = blocks.tensors(layer, h, "mlp.up", "mlp.hidden")
            if layer in layers:
                x, hidden = (token_rows(tensors[name], skip) for name in ("mlp.up", "mlp.hidden"))
                down = np.asarray(dense(blocks.values(layer)["mlp"]["down"]["kernel"]), np.float32)
                fit = functools.partial(self._fit, x, hidden, down, has_exact_zeros(config), rank, f"{self.seed}-{layer}")
                found[layer] = work.piece(f"block-{layer}", fit)
        metrics = {name: {layer: round(float(piece[name]), 5) for layer, piece in found.items()}
                   for name in ("recall", "precision", "missed_mass", "density", "epochs")}
        share = rank * (config.d_model + config.ffn.hidden) / (_maps(config) * config.d_model * config.ffn.hidden)
        work.note(self.name, requested_neuron_sparsity=self.sparsity, rank=rank, predictor_bytes_of_ffn=share, **metrics)
        names = ("a", "b") if self.select == "topk" else ("a", "b", "threshold")
        dtypes = {"a": config.dtype, "b": config.dtype, "threshold": "float32"}
        return place(model, "neurons", {
            f"blocks.{layer}.mlp": Placed(op, {name: jnp.asarray(piece[name], dtypes[name]) for name in names})
            for layer, piece in found.items()
        })  # fmt: skip

    def _op(self, config: ModelConfig) -> tuple[int, str]:
        hidden = config.ffn.hidden
        rank = self.rank or affordable_rank(config.d_model, hidden, _maps(config))
        kept = kept_count(hidden, 1 - self.sparsity) if self.select == "topk" else 0
        return rank, f"predictor:{rank},k={kept},relu={str(self.relu).lower()}"

    def _fit(
        self, x: np.ndarray, h: np.ndarray, down: np.ndarray, exact: bool, rank: int, key: str
    ) -> dict[str, np.ndarray]:
        """The maps of one layer, its threshold, and how well it predicts the held-out tokens."""
        sizes = contribution(h, down)
        labels = active(sizes, exact, 1 - self.sparsity)
        seed = zlib.crc32(key.encode())
        order = np.random.default_rng(seed).permutation(len(x))
        held, taught = np.split(order, [max(1, round(HELD_OUT * len(x)))])
        params = initial(jax.random.key(seed), x.shape[1], rank, h.shape[1])
        params, epochs = self._trained(params, x[taught], labels[taught], sizes[taught], seed)
        z = np.asarray(jax.jit(functools.partial(logits, relu=self.relu))(params, x))
        threshold = np.quantile(z[taught], self.sparsity, method="inverted_cdf")
        kept = kept_count(h.shape[1], 1 - self.sparsity)
        chosen = np.asarray(topk_mask(jnp.asarray(z[held]), kept)) if self.select == "topk" else z[held] > threshold
        found = prediction(chosen, labels[held], sizes[held], np.linalg.norm(h[held] @ down, axis=1))
        piece = {**params, "threshold": threshold, "epochs": epochs, **found}
        return {name: np.asarray(value) for name, value in piece.items()}

    def _trained(self, params: Params, x: np.ndarray, labels: np.ndarray, sizes: np.ndarray, seed: int) -> tuple[Params, int]:
        """(the maps after training, epochs that it took)."""
        frequency = float(labels.mean()) + 0.005
        weights = np.where(labels, 1.0, frequency).astype(np.float32)
        if self.mass:
            weights = np.where(labels, sizes / max(float(sizes[labels].mean()), 1e-30), frequency).astype(np.float32)
        start, epoch = _training(self.learning_rate, self.weight_decay, self.relu)
        rng = np.random.default_rng(seed)
        batch = min(self.batch, len(x))
        data, state = [jnp.asarray(a) for a in (x, labels, weights)], start(params)
        done, recall = 0, 0.0
        while done < self.epochs and recall <= ENOUGH_RECALL:
            rows = rng.permutation(len(x))[: len(x) // batch * batch].reshape(-1, batch)
            params, state, found = epoch(params, state, *data, jnp.asarray(rows))
            done, recall = done + 1, float(found)
        return params, done


@functools.cache
def _training(learning_rate: float, weight_decay: float, relu: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(params -> the optimizer's state, one epoch over given rows -> params, state, recall); compiled once for all layers."""
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)

    def loss(params: Params, x: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
        z = logits(params, x, relu)
        recall = jnp.sum((z > 0) & labels) / jnp.maximum(jnp.sum(labels), 1)
        return jnp.mean(weights * (jax.nn.softplus(z) - jnp.where(labels, z, 0))), recall

    def step(carry: Any, rows: Array, data: Any) -> Any:
        params, state = carry
        gradient, recall = jax.grad(loss, has_aux=True)(params, *(a[rows] for a in data))
        change, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, change), state), recall

    @jax.jit
    def epoch(params: Params, state: Any, x: Array, labels: Array, weights: Array, order: Array) -> Any:
        (params, state), recall = jax.lax.scan(lambda c, rows: step(c, rows, (x, labels, weights)), (params, state), order)
        return params, state, jnp.mean(recall)

    return optimizer.init, epoch


def prediction(
    chosen: Bool[np.ndarray, "N F"], labels: Bool[np.ndarray, "N F"], sizes: Float[np.ndarray, "N F"], output: np.ndarray
) -> dict[str, float]:
    """How well units were predicted.

    Args:
      chosen, labels: units that are computed, and that are active.
      sizes: their contributions, see `activity`.
      output: norm of the FFN's output at each token [N].
    Returns:
      recall; precision; density, the share of units computed; missed_mass, the mean over tokens of the summed contributions of
      active units that were missed, over the norm of the output.
    """
    hit = float(np.sum(chosen & labels))
    missed = np.sum(np.where(labels & ~chosen, sizes, 0), axis=1) / np.maximum(output, 1e-20)
    return {"recall": hit / max(1.0, float(labels.sum())), "precision": hit / max(1.0, float(chosen.sum())),
            "density": float(chosen.mean()), "missed_mass": float(missed.mean())}


def _maps(config: ModelConfig) -> int:
    return 3 if is_gated(config) else 2

