"""LLM.int8(): eight bits but for the few channels of activations whose magnitudes would spoil every token's scale.

"LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (Dettmers et al., 2022, arXiv 2208.07339). Acts on the
inputs of linear maps whose weights are int8 with a scale per output (`Rtn("int8")`). With O the outlying channels of x[N, in],

    y = sum_{k in O} x_k W^_k  +  s_t s_n (q_x @ q_W)_{k not in O}       s_t = max_{k not in O} |x_tk| / 127

The first product is of floats, with weights dequantized from their int8 as in the released code; the other is of integers
(`arrays.OutlierActivation`). Published: a channel is in O where |x_tk| >= 6 at any token of the batch. Here O is fitted: where
it is so at any token of the calibration, so that shapes are static and a token's result does not depend on its batch; a channel
that outgrows the threshold later only coarsens its token's scale. Threshold 0 keeps all of x as it is, a high one nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparsejax.arrays import OutlierActivation, dense
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.recipe import ACTIVATIONS, Pass, Tier, Work
from sparsejax.compress.statistics import largest_by_channel, tensor_of
from sparsejax.compress.surgery import Placed, chain_at, place, sites_of
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS, batches_of
from sparsejax.methods.quant.qat import Int8Activation
from sparsejax.methods.sparsity.teal import check_input_sites
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Weight, weight
from sparsejax.plugs import check, register

_ROUNDS = Int8Activation()


RESTS = ("low_rank_residual", "centred")  # weight ops that multiply what a selection drops


@register("activation_op", "outlier_int8")
@dataclass(frozen=True)
class OutlierInt8:
    """x as int8 with one scale per token, at most `columns` channels left as floats; of a SparseActivation the kept entries."""

    columns: int

    def __post_init__(self) -> None:
        check(self.columns > 0, "outlier_int8: columns", self.columns, "must be positive; int8 is the op without outliers")

    def validate(self, features: int, path: str) -> None:
        check(self.columns <= features, f"{path}: columns", self.columns, f"the map has {features} inputs")

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """columns int32 [columns]; the number of inputs where there are fewer."""
        return {"columns": weight(jnp.full((self.columns,), shape[-2], jnp.int32), (None,), "fitted")}

    def __call__(self, arrays: Mapping[str, Array], x: Any, ctx: Context) -> OutlierActivation:
        x, columns = dense(x), arrays["columns"]
        inputs = x.shape[-1]
        outlying = jnp.zeros(inputs, bool).at[columns].set(True, mode="drop")
        rest = jnp.where(outlying, 0, x)
        values = replace(_ROUNDS(rest, ctx), surrogate=x if ctx.mode == "train" else None)
        outliers = jnp.where(columns < inputs, jnp.take(x, columns, axis=-1, mode="clip"), 0)
        return OutlierActivation(values, outliers, columns)


@dataclass
class LlmInt8(Pass):
    """threshold: |x| from which a channel stays a float; sites: the maps."""

    threshold: float = 6.0
    sites: str = ALL_MAPS
    stage: ClassVar[str] = ACTIVATIONS

    def check(self, config: ModelConfig) -> None:
        check(self.threshold >= 0, "llmint8: threshold", self.threshold, "must not be negative")
        check_input_sites(config, self.sites, "llmint8: sites")
        for site in sites_of(config, "inputs", self.sites):
            rests = [op for op in chain_at(config, "weights", site) if op.partition(":")[0] in RESTS]
            check(not rests, f"llmint8: {site}: model.weights", rests, "multiplies what a selection drops, which is not told "
                  "from what it keeps once a few columns are floats")

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x 2 passes of {tier.sequences * tier.length:,} tokens"

    def apply(self, model: Model, work: Work) -> Model:
        self.check(model.config)
        sites = sites_of(model.config, "inputs", self.sites)
        outlying = {site: np.flatnonzero(largest >= self.threshold) for site, largest in _largest(model, work, sites).items()}
        # Layers that share a program have arrays of one size: the most that any of them needs.
        most: dict[str, int] = {}
        for site in sites:
            most[_local(site)] = max(most.get(_local(site), 0), len(outlying[site]))
        plan = {site: self._placed(outlying[site], most[_local(site)], model, site) for site in sites}
        counts = {site: len(columns) for site, columns in outlying.items()}
        inputs = sum(model.parameter(f"{site}.kernel").shape[-2] for site in sites)
        work.note(self.name, threshold=self.threshold, outliers_of=counts, outlier_share=sum(counts.values()) / inputs)
        return place(model, "inputs", plan)

    @staticmethod
    def _placed(columns: np.ndarray, most: int, model: Model, site: str) -> Placed:
        if not most:
            return Placed("int8")
        inputs = model.parameter(f"{site}.kernel").shape[-2]
        padded = np.pad(columns, (0, most - len(columns)), constant_values=inputs)
        return Placed(f"outlier_int8:{most}", {"columns": jnp.asarray(padded, jnp.int32)})


def _largest(model: Model, work: Work, sites: Sequence[str]) -> dict[str, np.ndarray]:
    """max |x_k| of what enters each site; a piece per layer."""
    blocks, found = Blocks(model), dict[str, np.ndarray]()
    streams = [blocks.embed(tokens) for tokens in batches_of(work.calibration)]
    for layer in work.layers("outliers", len(blocks)):
        here = [site for site in sites if site.startswith(f"blocks.{layer}.")]
        taps = list(dict.fromkeys(tensor_of(site.split(".", 2)[2]) for site in here))
        skip = work.calibration.spec.skip_first
        if here:
            kept = work.piece(f"block{layer}", partial(largest_by_channel, blocks, layer, streams, taps, skip))
            found |= {site: kept[tensor_of(site.split(".", 2)[2])] for site in here}
        streams = [blocks.run(layer, h)[0] for h in streams]
    return found


def _local(site: str) -> str:
    return site.split(".", 2)[2]
