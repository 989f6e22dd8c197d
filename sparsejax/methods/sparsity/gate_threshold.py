"""Hidden units of a gated FFN whose gate exceeds a threshold: the selector of CATS and CHESS, and how both are fitted.

    a = activation(x W_gate);   m_i = |a_i| > t_i, strictly;   y = ((a * m) * (x W_up * m)) W_down          t: [] or [F]

The choice reads no `up`, so that its rows save the columns of W_up and the rows of W_down; the gate is computed whole.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparsejax import plugs
from sparsejax.arrays import dense
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.recipe import ACTIVATIONS, Pass, Work, check_sparsity
from sparsejax.compress.statistics import Quantiles
from sparsejax.compress.surgery import Placed, chain_at, place, sites_of, with_op
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.activity import token_rows
from sparsejax.methods.sparsity.selection import Arrays, along, fitted
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Weight
from sparsejax.ops.selectors import threshold_mask
from sparsejax.plugs import check

FFN_SITES = "blocks.*.mlp"


@plugs.register("neuron_selector", "gate_threshold")
@dataclass(frozen=True)
class GateThreshold:
    """|a| above a fitted threshold; `channels`: one for each hidden unit."""

    channels: bool = False
    reads_gate: ClassVar[bool] = True
    skips: ClassVar[tuple[str, ...]] = ("up",)

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """threshold [] or [F]; negative: every unit is kept."""
        return {"threshold": fitted(shape[-1] if self.channels else None)}

    def __call__(self, arrays: Arrays, x: Array, gate_out: Array, ctx: Context) -> Bool[Array, "... F"]:
        """The units that are computed, of gate_out [..., F]."""
        return threshold_mask(jnp.abs(gate_out), along(arrays["threshold"], gate_out))


@dataclass
class GatePass(Pass):
    """What CATS and CHESS share: one stream over the calibration data, a threshold per layer, and its realised sparsity."""

    sparsity: float = 0.5
    stage: ClassVar[str] = ACTIVATIONS
    channels: ClassVar[bool] = False

    @abc.abstractmethod
    def threshold(self, a: Float[np.ndarray, "N F"], u: Float[np.ndarray, "N F"], down: Any) -> np.ndarray:
        """What |a| is compared with, [] or [F].

        Args:
          a, u: the gate's activation and what `up` gives, over calibration tokens.
          down: the kernel [F, D], or None where `reads_down` is False.
        """

    @property
    def reads_down(self) -> bool:
        return False

    def attention_sites(self) -> tuple[str, ...]:
        """Attention maps whose input gets a scalar threshold at the same sparsity."""
        return ()

    def attention_threshold(self, x: np.ndarray) -> float:
        """The sparsity-quantile of |x|, x [N, in] the input of one of `attention_sites`."""
        return Quantiles(np.abs(x))(self.sparsity)

    def check(self, config: ModelConfig) -> None:
        check_sparsity(self.sparsity)
        layers = dense_ffn_layers(config)
        activation = plugs.resolve("nonlinearity", config.ffn.activation, "model.ffn.activation")
        check(activation.has_gate_out, "model.ffn.activation", config.ffn.activation,
              f"{self.name} selects by the gate, and this FFN has none whose product with up is the hidden vector")
        check_unselected(config, layers)

    @property
    def op(self) -> str:
        """The selector as a config names it."""
        return "gate_threshold:channels=true" if self.channels else "gate_threshold"

    def after(self, config: ModelConfig) -> ModelConfig:
        layers = dense_ffn_layers(config) if self.sparsity else []
        return with_op(config, "neurons", {f"blocks.{layer}.mlp": self.op for layer in layers})

    def cost(self, config: ModelConfig, tier: Any) -> str:
        return f"{config.num_layers} blocks x {tier.sequences} x {tier.length} tokens, once"

    def apply(self, model: Model, work: Work) -> Model:
        self.check(model.config)  # again: an earlier pass of the recipe may have taken a site
        if self.sparsity == 0:
            return model
        blocks, skip = Blocks(model), work.calibration.spec.skip_first
        maps = self.attention_sites()
        layers = dense_ffn_layers(model.config)
        h, found = blocks.embed(jnp.asarray(work.calibration.tokens)), {}
        for layer in work.layers(f"{self.name}: thresholds", len(blocks)):
            h, tensors = blocks.tensors(layer, h, "mlp.gate_out", "mlp.up_out", *maps)
            if layer in layers:
                rows = {name: token_rows(tensor, skip) for name, tensor in tensors.items()}
                down = dense(blocks.values(layer)["mlp"]["down"]["kernel"]) if self.reads_down else None
                found[layer] = work.piece(f"block-{layer}", functools.partial(self._fit, rows, down, maps))
        work.note(self.name, requested_neuron_sparsity=self.sparsity,
                  neuron_sparsity={layer: float(piece["realised"]) for layer, piece in found.items()})
        return self._placed(model, found, maps)

    def _fit(self, rows: Mapping[str, np.ndarray], down: Any, maps: tuple[str, ...]) -> dict[str, np.ndarray]:
        a = rows["mlp.gate_out"]
        threshold = np.asarray(self.threshold(a, rows["mlp.up_out"], None if down is None else np.asarray(down)), np.float32)
        realised = np.asarray(np.mean(np.abs(a) <= threshold))
        return {"threshold": threshold, "realised": realised,
                **{name: np.asarray(self.attention_threshold(rows[name]), np.float32) for name in maps}}

    def _placed(self, model: Model, found: Mapping[int, dict[str, np.ndarray]], maps: tuple[str, ...]) -> Model:
        chosen = {f"blocks.{layer}.mlp": Placed(self.op, {"threshold": jnp.asarray(piece["threshold"])})
                  for layer, piece in found.items()}
        model = place(model, "neurons", chosen)
        inputs = {f"blocks.{layer}.{name}": Placed("threshold", {"threshold": jnp.asarray(piece[name])})
                  for layer, piece in found.items() for name in maps}
        return place(model, "inputs", inputs) if inputs else model


def dense_ffn_layers(config: ModelConfig) -> list[int]:
    """Layers of a decoder that have a dense FFN.

    Raises:
      ConfigError: no decoder, or one without any.
    """
    check(config.kind == "decoder", "model.kind", config.kind, "expected a decoder")
    return [int(site.split(".")[1]) for site in sites_of(config, "neurons", FFN_SITES)]


def check_unselected(config: ModelConfig, layers: list[int]) -> None:
    """Raise a ConfigError where an FFN of these layers has a selector of neurons already: there is one to a site."""
    taken = [site for layer in layers if chain_at(config, "neurons", site := f"blocks.{layer}.mlp")]
    check(not taken, "neurons", taken[:4], "already have a selector of hidden units")

