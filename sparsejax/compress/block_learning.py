"""What rounded weights are made of, learned by gradients block by block, so that each block gives what it gave before.

    min over p of mean over sequences of loss(B(h^; W^(p)), targets)     B: the block; h^: what enters it in the rounded model

by Adam, one sequence a step, with a rate for each kind of parameter. OmniQuant and PTQ1.61 are this with a W^ of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from sparsejax.compress.blocks import Blocks
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import with_kernels

Params = Mapping[str, Array]
Loss = Callable[[Float[Array, "B T D"], tuple[Array, ...]], Array]


def mean_square(given: Float[Array, "B T D"], targets: tuple[Array, ...]) -> Array:
    """The mean squared error, summed over targets."""
    return sum((jnp.mean(jnp.square(given - target)) for target in targets), jnp.zeros(()))


def in_turn(blocks: Blocks, layer: int, h: Float[Array, "N T D"], values: dict[str, Any] | None = None) -> Array:
    """What leaves a block for each sequence, one at a time."""
    return jnp.concatenate([blocks.run(layer, h[i : i + 1], values=values)[0] for i in range(len(h))])


class BlockLearning:
    """The learning in one block after the other; steps are compiled once for each kind of block."""

    def __init__(
        self,
        model: Model,
        rounded: Callable[[Any, Params], Float[Array, "in out"]],
        rates: Mapping[str, float],
        epochs: int,
        skip: int = 0,
        loss: Loss = mean_square,
    ):
        """Compile nothing yet.

        Args:
          model: the float model.
          rounded: (what is fixed of a map, its parameters) -> W^; traceable.
          rates: of learning, by the name of a parameter.
          epochs: how often every sequence is seen.
          skip: leading tokens of a sequence that the loss leaves out.
          loss: of what a block gives and its targets, both float32.
        """
        self.blocks, self.rounded, self.rates, self.epochs = Blocks(model), rounded, rates, epochs
        self.skip, self.of = skip, loss
        self.adam = optax.scale_by_adam()
        self._programs = functools.cache(self._compile)

    def learn(
        self, layer: int, fixed: Mapping[str, Any], start: Mapping[str, Params], entering: Array, targets: tuple[Array, ...]
    ) -> dict[str, Params]:
        """Parameters of a block's maps by their local names (`mlp.down`) after all epochs.

        Args:
          fixed, start: by local name, what `rounded` takes.
          entering, targets: float[N, T, D] of N sequences.
        """
        step, _ = self._programs(self.blocks.kind(layer), tuple(fixed))
        values, learned, state = self.blocks.values(layer), dict(start), self.adam.init(dict(start))
        for _ in range(self.epochs):
            for i in range(len(entering)):
                wanted = tuple(target[i : i + 1] for target in targets)
                learned, state = step(learned, state, values, dict(fixed), entering[i : i + 1], wanted)
        return learned

    def mean_loss(
        self, layer: int, fixed: Mapping[str, Any], params: Mapping[str, Params], entering: Array, targets: tuple[Array, ...]
    ) -> float:
        """The loss over all sequences."""
        _, loss = self._programs(self.blocks.kind(layer), tuple(fixed))
        values, found = self.blocks.values(layer), []
        for i in range(len(entering)):
            wanted = tuple(target[i : i + 1] for target in targets)
            found.append(loss(dict(params), values, dict(fixed), entering[i : i + 1], wanted))
        return float(np.mean(jax.device_get(found)))

    def _compile(self, kind: tuple[str, str], names: tuple[str, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """(step, loss) for blocks of a kind of which maps of these names are rounded."""
        layer = next(layer for layer in range(len(self.blocks)) if self.blocks.kind(layer) == kind)

        def loss(params: Any, values: Any, fixed: Any, h: Array, targets: tuple[Array, ...]) -> Array:
            kernels = {f"blocks.{layer}.{name}": self.rounded(fixed[name], params[name]) for name in names}
            given, _ = self.blocks.trace(layer, with_kernels(values, kernels), h)
            counted = (part[:, self.skip :].astype(jnp.float32) for part in (given, *targets))
            return self.of(next(counted), tuple(counted))

        def step(params: Any, state: Any, values: Any, fixed: Any, h: Array, targets: Any) -> tuple[Any, Any]:
            change, state = self.adam.update(jax.grad(loss)(params, values, fixed, h, targets), state)
            moved = {name: {key: value - self.rates[key] * change[name][key] for key, value in own.items()}
                     for name, own in params.items()}  # fmt: skip
            return moved, state

        return jax.jit(step), jax.jit(loss)
