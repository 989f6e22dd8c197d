"""How the loss depends on what flows into each linear map: gradients by token, one block in memory at a time.

With x the input of a map, g = dL/dx its gradient (L: the sum of the tokens' losses) and e the change that a method makes to x,

    loss increase ~ (g . e)^2 / 2   per token, in the mean over tokens

is the Gauss-Newton (Fisher) estimate: the curvature of the loss is that of its gradients' covariance.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax import nnx_compat
from sparsejax.compress.blocks import INPUTS, Blocks, taps
from sparsejax.compress.surgery import Placed, place, sites_of
from sparsejax.context import Context
from sparsejax.evaluate.scoring import token_scores
from sparsejax.io.model import Model
from sparsejax.nnx_compat import Weight, weight
from sparsejax.plugs import register


@register("activation_op", "perturbed")
@dataclass(frozen=True)
class Perturbed:
    """x + by, with `by` zero: its gradient is that of x."""

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """by [1, 1, in], to be replaced by one of x's shape."""
        return {"by": weight(jnp.zeros((1, 1, shape[-2]), jnp.float32), (None, None, None), "fitted")}

    def __call__(self, arrays: dict[str, Array], x: Array, ctx: Context) -> Array:
        return x + arrays["by"].astype(x.dtype)


class Sensitivity(NamedTuple):
    """Of one block.

    Fields:
      layer: its number.
      inputs: the tensors that enter linear maps, float[B, T, in], by the sites of `blocks.INPUTS`.
      gradients: of the summed loss with respect to each, the sum over the maps that read it.
    """

    layer: int
    inputs: dict[str, Array]
    gradients: dict[str, Array]


def sensitivities(model: Model, tokens: Int[Array, "B T"]) -> Iterator[Sensitivity]:
    """Inputs and gradients of every block, from the last to the first.

    Args:
      model: a decoder of dense feed-forward networks.
      tokens: each but the first of a row is predicted.
    """
    sites = sites_of(model.config, "inputs", "blocks.*.{attn,mlp}.{q,k,v,o,gate,up,down}")
    zeros = {site: jnp.zeros((1, 1, model.parameter(f"{site}.kernel").shape[-2])) for site in sites}
    blocks = Blocks(place(model, "inputs", {site: Placed("perturbed", {"by": by}) for site, by in zeros.items()}))
    entering = [h for _, h in blocks.stream(tokens)]
    leaving, _ = blocks.run(len(blocks) - 1, entering[-1])
    gradient = _head_gradient(model, leaving, jnp.asarray(tokens))
    backward = functools.cache(lambda kind, layer: jax.jit(functools.partial(_backward, blocks, layer)))
    layers_of: dict[Any, int] = {}
    for layer in reversed(range(len(blocks))):
        first = layers_of.setdefault(blocks.kind(layer), layer)
        gradient, inputs, found = backward(blocks.kind(layer), first)(blocks.values(layer), entering.pop(), gradient)
        yield Sensitivity(layer, inputs, found)


def _head_gradient(model: Model, h: Float[Array, "B T D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    def row_loss(values: dict[str, Any], h: Array, tokens: Array) -> Array:
        module = nnx_compat.merge(model.structure, values)
        read = h if module.norm is None else module.norm(h)
        nll, _ = token_scores(module.logits, read[:-1].astype(model.config.dtype), tokens[1:], model.config.vocab_size)
        return jnp.sum(nll)

    gradient = jax.jit(jax.grad(row_loss, argnums=1))
    return jnp.stack([gradient(model.values, row, ids) for row, ids in zip(h, tokens, strict=True)])


def _backward(
    blocks: Blocks, layer: int, values: dict[str, Any], h: Float[Array, "B T D"], gradient: Float[Array, "B T D"]
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """(gradient with respect to h, inputs of the maps, their gradients) of one block."""

    def run(by: dict[str, Array], h: Array) -> tuple[Array, dict[str, Array]]:
        perturbed = jax.tree.map(lambda a: a, values)
        for reader, value in by.items():
            part, name = reader.split(".")
            chain = perturbed[part][name]["inputs"]
            chain[max(chain, key=int)]["by"] = value
        left, stats = blocks.trace(layer, perturbed, h, taps(*INPUTS))
        return left, {site: stats[site]["value"].value for site in INPUTS}

    readers = {site: [one for one in maps if _has(values, one)] for site, maps in INPUTS.items()}
    _, shapes = jax.eval_shape(run, {}, h)
    by = {one: jnp.zeros(shapes[site].shape, shapes[site].dtype) for site, found in readers.items() for one in found}
    _, pull, inputs = jax.vjp(run, by, h, has_aux=True)
    found, dh = pull(gradient)
    return dh, inputs, {site: sum((found[one] for one in ones[1:]), found[ones[0]]) for site, ones in readers.items()}


def _has(values: dict[str, Any], reader: str) -> bool:
    part, name = reader.split(".")
    return name in values[part]
