"""One set of hidden units for a sequence, chosen from its prompt: what GRIFFIN and CoreInfer share, and a random control.

Acts on the FFN's hidden vector h (the input of `down`), which is dense at the tokens of the prompt: those that `ctx.sparsify`
leaves out. From them comes a number per unit and the `k = max(1, round(fraction * F))` units of the largest are all that the
other tokens compute, so that gate and up save the same columns as down its rows:

    C = top-k_j statistic_j(h of the prompt);   h'_t = h_t for t in the prompt, else h_t * 1[j in C];   ties to the lowest index

Here by masks in one forward pass. For generation `compress.neuron_sets.select_neurons` reads the sets off a prompt and returns
the smaller model that decodes with them. Without a prompt (scope `all`) there is nothing to choose from, which is refused.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparsejax import plugs
from sparsejax.arrays import SparseActivation, dense
from sparsejax.compress.recipe import ACTIVATIONS, Pass, Work, check_sparsity
from sparsejax.compress.surgery import Placed, chain_at, place, with_op
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.layers.ffn import FFN
from sparsejax.layers.op import SiteRules
from sparsejax.methods.sparsity.gate_threshold import dense_ffn_layers
from sparsejax.methods.sparsity.selection import Arrays, Operand, fitted
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Weight
from sparsejax.ops.selectors import check_fraction, kept_count, topk_mask
from sparsejax.plugs import ConfigError, check


class SequenceSet(abc.ABC):
    """An activation op at `down`; subclasses are frozen dataclasses with the fields `fraction` and `shared`.

    shared: one set for all sequences of a batch, by the statistic over all their prompts.
    """

    fraction: float
    shared: bool
    skips: ClassVar[tuple[str, ...]] = ("gate", "up")

    def __post_init__(self) -> None:
        check_fraction(type(self).__name__, self.fraction)

    @abc.abstractmethod
    def statistic(self, arrays: Arrays, h: Float[Array, "B T F"], prompt: Bool[Array, "B T"]) -> Float[Array, "B F"]:
        """By which units are chosen; tokens outside the prompt must not count."""

    def chosen(self, arrays: Arrays, x: Operand, prompt: Bool[Array, "B T"]) -> Bool[Array, "S F"]:
        """The set of each sequence of x [B, T, F], S = B; one set where it is shared, S = 1."""
        h = dense(x).astype(jnp.float32)
        if self.shared:
            h, prompt = h.reshape(1, -1, h.shape[-1]), prompt.reshape(1, -1)
        return self.select(arrays, self.statistic(arrays, h, prompt))

    def select(self, arrays: Arrays, statistic: Float[Array, "S F"]) -> Bool[Array, "S F"]:
        """The units of the largest statistic."""
        return topk_mask(statistic, self.kept(statistic.shape[-1]))

    def kept(self, features: int) -> int:
        """k of `features` units."""
        return kept_count(features, self.fraction)

    def __call__(self, *arguments: Any) -> SparseActivation | Operand:
        """`(x, ctx)`, or `(arrays, x, ctx)` where there are arrays: x[B, T, F] with its mask; x itself where all are kept.

        Raises:
          ConfigError: no token is marked as prompt.
        """
        arrays, x, ctx = arguments if len(arguments) == 3 else ({}, *arguments)
        if self.kept(x.shape[-1]) == x.shape[-1]:
            return x
        chosen = self.chosen(arrays, x, prompt_tokens(ctx, type(self).__name__.lower()))
        return SparseActivation(x, ctx.kept(jnp.broadcast_to(chosen[:, None], x.shape)))


def prompt_tokens(ctx: Context, name: str) -> Bool[Array, "B T"]:
    """The dense tokens, padding left out.

    Raises:
      ConfigError: sparsification acts at all tokens.
    """
    if ctx.sparsify is None:
        raise ConfigError(f"{name}: chooses hidden units from a prompt, and no token is left dense; evaluate with "
                          "--scope=from:FRACTION or decode, and generate with the model that select_neurons returns")
    return ~ctx.sparsify if ctx.token_mask is None else ~ctx.sparsify & ctx.token_mask


@plugs.register("activation_op", "fixed_set")
@dataclass(frozen=True)
class FixedSet(SequenceSet):
    """The control: the units of the largest fitted `score` [F], whatever the prompt holds."""

    fraction: float = 0.5
    shared: ClassVar[bool] = True  # type: ignore[misc]

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        return {"score": fitted(shape[-2])}

    def statistic(self, arrays: Arrays, h: Array, prompt: Array) -> Float[Array, "1 F"]:
        return arrays["score"][None]


@dataclass
class SetPass(Pass):
    """Puts a sequence-level set at each FFN.

    sparsity: share of hidden units that decoding leaves out. dense_first, dense_last: so many layers at the ends keep all.
    """

    sparsity: float = 0.5
    dense_first: int = 0
    dense_last: int = 0
    stage: ClassVar[str] = ACTIVATIONS
    scope: ClassVar[str] = "from:0.5"

    @abc.abstractmethod
    def op(self) -> str:
        """The op as a config names it."""

    def arrays(self, model: Model, work: Work, layers: list[int]) -> dict[int, dict[str, Any]]:
        """The op's arrays in each layer."""
        return {layer: {} for layer in layers}

    def layers(self, config: ModelConfig) -> list[int]:
        """Those that get a set.

        Raises:
          ConfigError: none is left between the dense ends.
        """
        ends = (self.dense_first, self.dense_last)
        check(min(ends) >= 0, "dense_first, dense_last", ends, "must not be negative")
        last = config.num_layers - self.dense_last
        found = [layer for layer in dense_ffn_layers(config) if self.dense_first <= layer < last]
        check(found, "dense_first, dense_last", ends, f"leave none of {config.num_layers} layers")
        return found

    def check(self, config: ModelConfig) -> None:
        check_sparsity(self.sparsity)
        activation = plugs.resolve("nonlinearity", config.ffn.activation, "model.ffn.activation")
        check(not activation.rowwise, "model.ffn.activation", config.ffn.activation,
              f"{self.name} leaves hidden units out, and here each depends on its whole row")
        check_plain_ffn(config, self.layers(config))

    def after(self, config: ModelConfig) -> ModelConfig:
        layers = self.layers(config) if self.sparsity else []
        return with_op(config, "inputs", {f"blocks.{layer}.mlp.down": self.op() for layer in layers})

    def apply(self, model: Model, work: Work) -> Model:
        self.check(model.config)  # again: an earlier pass of the recipe may have taken a site
        if self.sparsity == 0:
            return model
        layers = self.layers(model.config)
        arrays = self.arrays(model, work, layers)
        kept = kept_count(model.config.ffn.hidden, 1 - self.sparsity)
        work.note(self.name, requested_neuron_sparsity=self.sparsity, kept_units=kept, layers=[layers[0], layers[-1]],
                  neuron_sparsity=1 - kept / model.config.ffn.hidden)
        return place(model, "inputs", {f"blocks.{i}.mlp.down": Placed(self.op(), arrays[i]) for i in layers})


def check_plain_ffn(config: ModelConfig, layers: Sequence[int]) -> None:
    """Raise a ConfigError unless these layers have dense FFNs of one width without ops that slices of them do not fit."""
    check(set(config.feed_pattern) == {"ffn"}, "model.feed_pattern", config.feed_pattern, "expected dense FFNs of one width")
    fitted = (("neurons", ""), ("inputs", ".down"), ("weights", ".gate"), ("weights", ".up"), ("weights", ".down"))
    for layer in layers:
        for field, site in fitted:
            ops = chain_at(config, field, f"blocks.{layer}.mlp{site}")
            check(not ops, f"{field}: blocks.{layer}.mlp{site}", "|".join(ops), "is fitted to all hidden units, and a choice "
                  "among them would leave it others")


@plugs.register("pass", "random_set")
@dataclass
class RandomSet(SetPass):
    """The control: a random set in each layer, the same for every sequence."""

    seed: int = 0

    def op(self) -> str:
        return f"fixed_set:{1 - self.sparsity:.10g}"

    def arrays(self, model: Model, work: Work, layers: list[int]) -> dict[int, dict[str, Any]]:
        rng = np.random.default_rng(self.seed)
        return {layer: {"score": jnp.asarray(rng.random(model.config.ffn.hidden), jnp.float32)} for layer in layers}


@plugs.register("feed", "ffn_of")
@dataclass(frozen=True)
class FeedOf:
    """A dense FFN of so many hidden units where layers differ: what is left of one whose units were selected."""

    hidden: int

    def __post_init__(self) -> None:
        check(self.hidden >= 1, "hidden", self.hidden, "must be at least 1")

    def build(self, config: ModelConfig, *, key: jax.Array, site: str, rules: SiteRules) -> FFN:
        """As `layers.ffn.DenseFeed.build`."""
        return FFN(config, key=key, site=site, rules=rules, hidden=self.hidden)
