"""Relufication: a pretrained model made sparse by ReLU and a little training (Mirzadeh et al., 2023, arXiv 2310.04564).

    stage 1   the FFN's activation becomes ReLU:  h = max(x W_g, 0) * (x W_u)          the input of down gets zeros
    stage 2   and so does what leaves each norm:  x' = max(norm(x) - shift, 0)         the inputs of q, k, v, gate, up too

Stage 1 is `model.ffn.activation` beside `init`: SiLU to ReLU is `swiglu` to `reglu` (or `shifted_reglu:1`, the paper's shift
for Llama), `gelu` to `relu`; no parameter changes its name or shape. Stage 2 is the activation op of this file at those inputs:

    model.inputs = ("blocks.*.attn.{q,k,v}=relu", "blocks.*.mlp.{gate,up}=relu")

The residual stream is left as it is. Published: 30 B tokens of training for stage 1, 50 B for both; Llama-7B 62 % zeros at down
after stage 1, 51 / 65 / 67 % at qkv / down / up after stage 2. The paper has no dense control of as many tokens: run one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from sparsejax.arrays import SparseActivation, dense
from sparsejax.context import Context
from sparsejax.plugs import check, register


@register("activation_op", "relu")
@dataclass(frozen=True)
class Relu:
    """max(x - shift, 0) with its mask; x itself at tokens out of scope."""

    shift: float = 0.0

    def __post_init__(self) -> None:
        check(math.isfinite(self.shift), "relu: shift", self.shift, "must be a finite number")

    def __call__(self, x: Any, ctx: Context) -> SparseActivation:
        whole = dense(x)
        moved = whole - self.shift if self.shift else whole
        mask = moved > 0
        values = jnp.where(mask, moved, 0)
        if ctx.sparsify is not None:
            values = jnp.where(ctx.sparsify[..., None], values, whole)
        return SparseActivation(values, ctx.kept(mask))
