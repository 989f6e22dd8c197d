"""What dropping at a site does to the output of its block: trials that recompute only what they change.

A block runs with some of its maps replaced by what they gave before. A trial at `mlp.down` costs that map alone, one at
`mlp.gate` also `down`, one at `attn.o` that map and the feed module, and one at q, k or v the whole block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax import nnx_compat
from sparsejax.compress.blocks import Blocks, taps
from sparsejax.compress.surgery import Placed, place
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.layers.linear import Linear

# (site, share that is dropped) -> the op with its arrays. Only arrays change with the share; at 0 they keep everything.
Selection = Callable[[str, float], Placed]
Held = dict[str, Array]

# Products of a block that a change at a map leaves standing; "mix" is what enters `attn.o`, "attn" what leaves it. Nothing is
# held of q, k and v: they are a seventh of what a change at one of them costs, and three programs more to compile.
_STANDING = {
    "attn.q": (),
    "attn.k": (),
    "attn.v": (),
    "attn.o": ("mix",),
    "mlp.gate": ("mix", "attn", "mlp.up"),
    "mlp.up": ("mix", "attn", "mlp.gate"),
    "mlp.down": ("mix", "attn", "mlp.gate", "mlp.up"),
}
_OF_EXPERTS = ("mix", "attn")


class _HeldMap:
    """A linear map that gives what it gave before, where that is held."""

    def __init__(self, linear: Linear, held: Held, name: str):
        self.linear, self.held, self.name = linear, held, name

    def measured(self, x: Any, ctx: Context, site: str, *arguments: Any) -> tuple[Array, dict[str, Any]]:
        if self.name not in self.held:
            self.held[self.name], _ = self.linear.measured(x, ctx, site, *arguments)
        return self.held[self.name], {}


class _HeldAttention:
    """An attention module that starts from what is held: its delta, or what enters `o`."""

    def __init__(self, attention: Any, held: Held):
        self.attention, self.held = attention, held

    def __call__(self, x: Array, ctx: Context, cache: Any) -> tuple[Array, dict[str, Any], Any]:
        if "attn" not in self.held:
            if "mix" in self.held:
                self.held["attn"] = self.attention.o(self.held["mix"], ctx)
            else:
                self.held["attn"], stats, _ = self.attention(x, ctx._replace(probes=taps("attn.out")), None)
                self.held["mix"] = stats["attn.out"]["value"].value
        return self.held["attn"], {}, None


def _holding(block: Any, held: Held) -> Any:
    """The block with its maps replaced by ones that read and fill `held`."""
    block.attn = _HeldAttention(block.attn, held)
    for name in ("gate", "up"):
        linear = getattr(block.mlp, name, None)
        if isinstance(linear, Linear) and block.mlp.neurons is None:  # a selector of units makes up depend on gate
            setattr(block.mlp, name, _HeldMap(linear, held, f"mlp.{name}"))
    return block


class Trials:
    """Trials of a selection at the inputs of a decoder's linear maps, each block on what enters it in the dense model."""

    def __init__(self, model: Model, sites: Sequence[str], select: Selection, by_token: bool = False):
        """Place the selection, keeping everything.

        Args:
          model: the dense model that errors are measured against.
          sites: where something may be dropped.
          by_token: each token's error is relative to that token's own output; else all to the norm of all outputs.
        """
        self.sites, self.select, self.by_token = tuple(sites), select, by_token
        self.dense = Blocks(model)
        self.blocks = Blocks(place(model, "inputs", {site: select(site, 0.0) for site in sites}))
        self._compiled = functools.cache(self._compile)

    def block(self, layer: int, h: Float[Array, "B T D"]) -> BlockTrials:
        """The trials of one block on what enters it."""
        target, _ = self.dense.run(layer, h)
        energy = jnp.sum(jnp.square(target.astype(jnp.float32)), axis=-1)
        weights = 1 / (energy.size * energy) if self.by_token else jnp.full_like(energy, 1 / jnp.sum(energy))
        return BlockTrials(self, layer, h, target, weights)

    def program(self, layer: int) -> Callable[..., tuple[Array, Held]]:
        """(values, arrays of the selection by site, h, held, target, weights) -> (error, products that were not held)."""
        return self._compiled(self.blocks.kind(layer))

    def _compile(self, kind: tuple[str, str]) -> Callable[..., tuple[Array, Held]]:
        layer = next(layer for layer in range(len(self.blocks)) if self.blocks.kind(layer) == kind)

        def run(values: Any, arrays: Mapping[str, Any], h: Array, held: Held, target: Array, weights: Array) -> Any:
            values, given, held = jax.tree.map(lambda leaf: leaf, values), set(held), dict(held)
            for local, named in arrays.items():
                chain = nnx_compat.at(values, (*local.split("."), "inputs"))
                chain[max(chain, key=int)].update(named)
            block = _holding(self.blocks.module(layer, values), held)
            ctx = self.blocks.context(h.shape[1], h.shape[0])._replace(layer=layer)
            with nnx_compat.read_only():
                y, _, _ = block(h, ctx, None)
            wrong = jnp.sum(jnp.square((y - target).astype(jnp.float32)), axis=-1)
            return jnp.sqrt(jnp.sum(wrong * weights)), {name: held[name] for name in held if name not in given}

        return jax.jit(run)


class BlockTrials:
    """One block: its plan so far, what its maps gave under it, and trials of one more change. Sites are block-local names."""

    def __init__(self, trials: Trials, layer: int, h: Array, target: Array, weights: Array):
        self.trials = trials
        self.sites = {site.split(".", 2)[2]: site for site in trials.sites if site.split(".")[1] == str(layer)}
        self._program = functools.partial(trials.program(layer), trials.blocks.values(layer))
        self._given = (h, target, weights)
        self.start({})

    def start(self, plan: Mapping[str, float]) -> None:
        """Go on from a plan; sites that it leaves out are dense."""
        self._arrays = {local: self._fitted(local, plan.get(local, 0.0)) for local in self.sites}
        _, self._held = self._run(self._arrays, {})
        self._tried: dict[tuple[str, float], Held] = {}

    def errors(self, trials: Sequence[tuple[str, float]]) -> np.ndarray:
        """Errors of the plan so far with each (site, share) in its place, relative to the dense output (see `Trials`)."""
        found = []
        for local, share in trials:
            standing = {name: self._held[name] for name in _STANDING.get(local, _OF_EXPERTS) if name in self._held}
            error, new = self._run({**self._arrays, local: self._fitted(local, share)}, standing)
            self._tried[local, share] = standing | new
            found.append(error)
        return np.asarray(jax.device_get(found), np.float64)

    def commit(self, local: str, share: float) -> None:
        """Take a trial that was made since the last one was taken."""
        self._held, self._tried = self._tried[local, share], {}
        self._arrays[local] = self._fitted(local, share)

    def _fitted(self, local: str, share: float) -> dict[str, np.ndarray]:
        arrays = self.trials.select(self.sites[local], share).arrays
        return {name: np.asarray(value, np.float32) for name, value in arrays.items()}

    def _run(self, arrays: Mapping[str, Any], held: Held) -> tuple[Array, Held]:
        h, target, weights = self._given
        return self._program(arrays, h, held, target, weights)


class Entering:
    """What enters each block of the dense model; blocks are run once, up to the one that is asked for."""

    def __init__(self, blocks: Blocks, tokens: Any):
        self.blocks, self._reached, self._h = blocks, 0, blocks.embed(tokens)

    def at(self, layer: int) -> Float[Array, "B T D"]:
        """For layers in rising order."""
        for finished in range(self._reached, layer):
            self._h, _ = self.blocks.run(finished, self._h)
        self._reached = layer
        return self._h
