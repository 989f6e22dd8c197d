"""Second derivatives of a decoder's loss with respect to the kernels of its linear maps.

    L = mean over tokens of -log p(token | all before it), in nats;   H_g: the block of its Hessian of a group of kernels

A kernel that moves by d in a direction that knows nothing of H adds d^T H d / 2 = tr(H) / n ||d||^2 / 2 to the loss, in the
mean, n the number of its weights; along the steepest direction lambda_max ||d||^2 / 2.

    traces       tr H of every map at once: v^T (H v) over the entries of each, v of random signs (Hutchinson). Products of
                 different maps have the mean zero. One product of H and a vector (forward over reverse) per draw
    fisher       the same of the Gauss-Newton matrix J^T (diag p - p p^T) J, whose trace is E ||d log p(y) / dW||^2 with labels
                 y drawn from the model: one gradient per draw, and never negative, as H's own trace can be
    eigenvalue   lambda_max of one group by power iteration
    pairs        d_i^T H d_j for given moves d of all maps: a product per j gives every i

The trace v^T G v over the entries of one map is not positive either, though that over all maps is: terms of other maps enter.
Kernels are the stacks in which the model holds them, [layers, in, out], so that one program serves all layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax import nnx_compat
from sparsejax.context import Context
from sparsejax.evaluate.scoring import token_scores
from sparsejax.io.model import Model
from sparsejax.io.name_map import parameter_slots
from sparsejax.plugs import check

LOGITS_TOGETHER = 64  # tokens whose logits are held at once

Stacks = dict[str, Array]  # by the path of a stack of kernels


class Eigenvalue(NamedTuple):
    """value: v^T H v of the last unit vector, with H's sign; iterations: products of H and a vector that it took."""

    value: float
    iterations: int


class Estimate(NamedTuple):
    """mean and error (standard error of the mean, NaN of a single draw) of draws, float64 by map."""

    mean: np.ndarray
    error: np.ndarray


def estimate(draws: Float[np.ndarray, "draws N"]) -> Estimate:
    """The mean of draws with its standard error."""
    draws = np.asarray(draws, np.float64)
    error = draws.std(0, ddof=1) / np.sqrt(len(draws)) if len(draws) > 1 else np.full(draws.shape[1], np.nan)
    return Estimate(draws.mean(0), error)


class Curvature:
    """Of one model and some of its maps, see the module. Tokens are int32[B, T], the first of each row only read."""

    def __init__(self, model: Model, sites: Sequence[str]):
        """Find the kernels.

        Raises:
          ConfigError: no decoder that predicts tokens, or a kernel that is packed, named by site.
        """
        config = model.config
        good = config.kind == "decoder" and config.head and not config.num_classes
        check(good, "--model: kind", config.kind, "has no loss of its own; curvature needs a decoder that predicts tokens")
        self.model, self.sites = model, tuple(sites)
        slots = parameter_slots(model.module(), model.structure.paths)
        self.slots = [slots[f"{site}.kernel"] for site in sites]
        self.kernels: Stacks = {".".join(slot.path): nnx_compat.at(model.values, slot.path) for slot in self.slots}
        for site, slot in zip(sites, self.slots, strict=True):
            packed = not isinstance(self.kernels[".".join(slot.path)], jax.Array)
            check(not packed, site, "packed", "has no derivatives; start from the float model, or leave it out by `sites`")
        self._loss_of = jax.jit(self._loss)
        self._features_of = jax.jit(lambda *arguments: self._features(*arguments)[1])
        self._divergence_of = jax.jit(self._divergence)
        self._product_of = jax.jit(self._product)
        self._fisher_of = jax.jit(self._fisher)

    def loss(self, tokens: Int[np.ndarray, "B T"], kernels: Mapping[str, Any] | None = None) -> float:
        """L, with other kernels at some sites."""
        return float(self._loss_of(self.with_kernels(kernels or {}), self.model.values, jnp.asarray(tokens)))

    def features(self, tokens: Int[np.ndarray, "B T"]) -> Float[Array, "B*T D"]:
        """What the model's head reads, for `divergence`."""
        return self._features_of(self.kernels, self.model.values, jnp.asarray(tokens))

    def divergence(
        self, tokens: Int[np.ndarray, "B T"], features: Float[Array, "B*T D"], kernels: Mapping[str, Any]
    ) -> float:
        """Mean over tokens of KL(model || model with other kernels at some sites), nats; `features` are the model's own."""
        return float(self._divergence_of(self.with_kernels(kernels), self.model.values, jnp.asarray(tokens), features))

    def traces(self, tokens: Int[np.ndarray, "B T"], seed: int) -> Float[np.ndarray, " N"]:
        """One draw of tr H of every map."""
        rng = np.random.default_rng(seed)
        drawn = {path: 2 * rng.integers(0, 2, k.shape, np.int8) - 1 for path, k in self.kernels.items()}
        signs = _masked(self.chosen(), {path: jnp.asarray(part, jnp.float32) for path, part in drawn.items()})
        return self._by_site(_dots(signs, self._times(signs, tokens)))

    def fisher(self, tokens: Int[np.ndarray, "1 T"], seed: int) -> Float[np.ndarray, " N"]:
        """One draw of the Gauss-Newton trace of every map."""
        return self._by_site(self._fisher_of(self.kernels, self.model.values, jnp.asarray(tokens), jax.random.key(seed)))

    def eigenvalue(
        self, tokens: Int[np.ndarray, "B T"], group: Sequence[int], *, seed: int = 0, tolerance: float = 1e-3, most: int = 100
    ) -> Eigenvalue:
        """The eigenvalue of largest magnitude of the Hessian of some maps together.

        Args:
          group: numbers of maps.
          tolerance: relative change of the eigenvalue at which the iteration ends.
          most: iterations.
        """
        rng, chosen = np.random.default_rng(seed), self.chosen(group)
        drawn = {path: jnp.asarray(rng.standard_normal(k.shape, np.float32)) for path, k in self.kernels.items()}
        vector, last, value, count = _unit(_masked(chosen, drawn)), np.nan, np.inf, 0
        while count < most and not abs(value - last) <= tolerance * abs(value):
            product = _masked(chosen, self._times(vector, tokens))
            vector, last, value, count = _unit(product), value, float(_whole(vector, product)), count + 1
        return Eigenvalue(value, count)

    def pairs(self, tokens: Int[np.ndarray, "B T"], moves: Stacks, group: Sequence[int]) -> Float[np.ndarray, " N"]:
        """d_i^T H d_g of every map i: the moves of all maps against those of the maps of a group together.

        Args:
          moves: of `stacked`.
        """
        return self._by_site(_dots(moves, self._times(_masked(self.chosen(group), moves), tokens)))

    def chosen(self, group: Sequence[int] | None = None) -> Stacks:
        """1 at the rows of some maps (default all), 0 elsewhere; broadcasts against the stacks."""
        found = {path: np.zeros((len(stack), *[1] * (stack.ndim - 1)), np.float32) for path, stack in self.kernels.items()}
        for number in range(len(self.sites)) if group is None else group:
            found[".".join(self.slots[number].path)][self.slots[number].row] = 1
        return {path: jnp.asarray(part) for path, part in found.items()}

    def stacked(self, arrays: Mapping[str, Any]) -> Stacks:
        """Arrays by site as stacks; zeros at the maps that are not given."""
        return self._filled({path: np.zeros(stack.shape, np.float32) for path, stack in self.kernels.items()}, arrays)

    def with_kernels(self, arrays: Mapping[str, Any]) -> Stacks:
        """The model's kernels with others at some sites."""
        touched = {".".join(self.slots[self.sites.index(site)].path) for site in arrays}
        base = {path: np.array(stack) for path, stack in self.kernels.items() if path in touched}
        return {**self.kernels, **self._filled(base, arrays)}

    def module(self, kernels: Stacks, values: dict[str, Any]) -> Any:
        """The model with given kernels; traceable."""
        values = jax.tree.map(lambda leaf: leaf, values)
        for path, stack in kernels.items():
            nnx_compat.put(values, tuple(path.split(".")), stack)
        return nnx_compat.merge(self.model.structure, values)

    def _filled(self, stacks: dict[str, np.ndarray], arrays: Mapping[str, Any]) -> Stacks:
        for site, array in arrays.items():
            slot = self.slots[self.sites.index(site)]
            stacks[".".join(slot.path)][slot.row] = np.asarray(array)
        return {path: jnp.asarray(stack) for path, stack in stacks.items()}

    def _times(self, vector: Stacks, tokens: Int[np.ndarray, "B T"]) -> Stacks:
        return self._product_of(self.kernels, vector, self.model.values, jnp.asarray(tokens))

    def _by_site(self, sums: Mapping[str, Array]) -> np.ndarray:
        """Sums [rows] by stack as float64[N]."""
        found = jax.device_get(sums)
        return np.asarray([found[".".join(slot.path)][slot.row] for slot in self.slots], np.float64)

    def _features(self, kernels: Stacks, values: dict[str, Any], tokens: Array) -> tuple[Any, Array]:
        module = self.module(kernels, values)
        h = module.features({"tokens": tokens}, Context(mode="prefill"))[0]
        return module, h.reshape(-1, h.shape[-1]).astype(self.model.config.dtype)

    def _loss(self, kernels: Stacks, values: dict[str, Any], tokens: Array, labels: Array | None = None) -> Array:
        module, h = self._features(kernels, values, tokens)
        h = h.reshape(*tokens.shape, -1)[:, :-1].reshape(-1, h.shape[-1])
        targets = tokens[:, 1:].reshape(-1) if labels is None else labels
        return jnp.mean(token_scores(module.logits, h, targets, self.model.config.vocab_size)[0])

    def _divergence(self, kernels: Stacks, values: dict[str, Any], tokens: Array, features: Array) -> Array:
        module, h = self._features(kernels, values, tokens)

        def divergence(pair: tuple[Array, Array]) -> Array:
            p, q = (jax.nn.log_softmax(module.logits(side)) for side in pair)  # kernels of blocks do not change the head
            return jnp.sum(jnp.exp(p) * (p - q))

        together = math.gcd(len(h), LOGITS_TOGETHER)
        parts = jax.lax.map(divergence, tuple(side.reshape(-1, together, side.shape[-1]) for side in (features, h)))
        return jnp.sum(parts) / len(h)

    def _product(self, kernels: Stacks, vector: Stacks, values: dict[str, Any], tokens: Array) -> Stacks:
        """H v."""
        gradient = jax.grad(lambda kernels: self._loss(kernels, values, tokens))
        cast = {path: part.astype(kernels[path].dtype) for path, part in vector.items()}
        return jax.jvp(gradient, (kernels,), (cast,))[1]

    def _fisher(self, kernels: Stacks, values: dict[str, Any], tokens: Array, key: Array) -> Stacks:
        """The gradient of one row is that of the sum of its tokens' losses: their products have the mean zero."""
        module, h = self._features(kernels, values, tokens[:, :-1])
        labels = jax.random.categorical(key, module.logits(h)[:, : self.model.config.vocab_size])
        gradient = jax.grad(self._loss)(kernels, values, tokens, labels)
        return {path: len(labels) * total for path, total in _dots(gradient, gradient).items()}


@jax.jit
def _masked(chosen: Stacks, stacks: Stacks) -> Stacks:
    return {path: chosen[path] * stack for path, stack in stacks.items()}


@jax.jit
def _dots(a: Stacks, b: Stacks) -> Stacks:
    """float32 [rows] by stack: sums of products over all axes but that of the rows."""
    products = {path: a[path].astype(jnp.float32) * b[path].astype(jnp.float32) for path in a}
    return {path: jnp.sum(product, axis=tuple(range(1, product.ndim))) for path, product in products.items()}


@jax.jit
def _whole(a: Stacks, b: Stacks) -> Array:
    return jnp.sum(jnp.stack([jnp.sum(part) for part in _dots(a, b).values()]))


@jax.jit
def _unit(vector: Stacks) -> Stacks:
    norm = jnp.sqrt(_whole(vector, vector))
    return {path: part / jnp.where(norm == 0, 1, norm) for path, part in vector.items()}
