"""A decoder taken apart into its blocks: what post-training methods run, one block's activations in memory at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax import nnx_compat
from sparsejax.arrays import dense
from sparsejax.context import Context, Probe, Stat
from sparsejax.io.model import Model
from sparsejax.models.transformer import shared_tables
from sparsejax.nnx_compat import Structure
from sparsejax.plugs import check

# The inputs of a block's linear maps: maps of one line read the same tensor.
INPUTS = {
    "attn.q": ("attn.q", "attn.k", "attn.v"),
    "attn.o": ("attn.o",),
    "mlp.up": ("mlp.gate", "mlp.up"),
    "mlp.down": ("mlp.down",),
}


# The same of a mixture of experts: by row for those that a token is sent to, beside those that every token passes.
EXPERT_INPUTS = {
    "mlp.experts.up": ("mlp.experts.gate", "mlp.experts.up"),
    "mlp.experts.down": ("mlp.experts.down",),
    "mlp.shared.up": ("mlp.shared.gate", "mlp.shared.up"),
    "mlp.shared.down": ("mlp.shared.down",),
}


def measured_at(site: str) -> tuple[str, str]:
    """(what a probe names, where its statistics are) of a block-local tensor: a mixture's networks all measure as `mlp`."""
    for name, prefix in (("mlp.experts.", ""), ("mlp.shared.", "shared.")):
        if site.startswith(name):
            inner = f"mlp.{site.removeprefix(name)}"
            return inner, prefix + inner
    return site, site


def taps(*sites: str) -> tuple[Probe, ...]:
    """Probes that hand out the tensors of block-local sites (`attn.q`, `mlp.hidden`, ...) as they are, see `Blocks.run`."""
    return tuple(Probe(site, _whole) for site in sites)


def _whole(tensor: Any, ctx: Context) -> dict[str, Stat]:
    return {"value": Stat(dense(tensor), "token")}


class Blocks:
    """The blocks of a decoder by layer. Programs are compiled once per kind of block and set of probes."""

    def __init__(self, model: Model):
        """Take the model apart.

        Raises:
          ConfigError: it is no decoder.
        """
        check(model.config.kind == "decoder", "--model", model.name, f"is of kind {model.config.kind!r}; expected a decoder")
        self.model = model
        self._places: list[tuple[str, str, int]] = []  # segment, slot, row of each layer
        for segment, (period, repeats) in enumerate(model.module().blocks.plan):
            self._places += [(str(segment), str(slot), row) for row in range(repeats) for slot in range(period)]
        self._structures: dict[tuple[str, str], Structure] = {}
        self._run = functools.cache(self._compile)
        self._probe = functools.cache(self._compile_probes)
        self._embed = jax.jit(self._trace_embedding)

    def __len__(self) -> int:
        return len(self._places)

    def embed(self, tokens: Any) -> Float[Array, "B T D"]:
        """What enters block 0, float[B, T, D], for tokens int[B, T]."""
        return self._embed(self.model.values, jnp.asarray(tokens))

    def kind(self, layer: int) -> tuple[str, str]:
        """What layers share that share programs: their segment and slot of the stack."""
        return self._places[layer][:2]

    def values(self, layer: int) -> dict[str, Any]:
        """The parameters of a block, as a nested dict (`values["attn"]["q"]["kernel"]`)."""
        segment, slot, row = self._places[layer]
        return jax.tree.map(lambda a: a[row], self.model.values["blocks"]["segments"][segment][slot])

    def run(
        self,
        layer: int,
        h: Float[Array, "B T D"],
        *,
        values: dict[str, Any] | None = None,
        probes: tuple[Probe, ...] = (),
        sparsify: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, dict[str, Stat]]]:
        """(what leaves the block, what its probes measured).

        Args:
          values: other parameters than the model's own.
          probes: see `taps`; hashable.
          sparsify: see `Context.sparsify`.
        """
        first = self._places.index((*self.kind(layer), 0))
        return self._run(first, probes)(self.values(layer) if values is None else values, h, sparsify)

    def tensors(
        self, layer: int, h: Float[Array, "B T D"], *sites: str, values: Any = None, sparsify: Bool[Array, "B T"] | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """(what leaves the block, `{site: tensor}`) of block-local sites; of experts (`mlp.experts.down`) [B, T, k, in].

        Args: as `run`.
        """
        h, stats = self.run(layer, h, values=values, probes=_probes_of(sites), sparsify=sparsify)
        return h, _tensors_of(sites, stats)

    def entering(self, layer: int, h: Float[Array, "B T D"], *sites: str, values: Any = None) -> dict[str, Array]:
        """The tensors alone, see `tensors`: what the block computes behind them is left out."""
        first = self._places.index((*self.kind(layer), 0))
        stats = self._probe(first, _probes_of(sites))(self.values(layer) if values is None else values, h)
        return _tensors_of(sites, stats)

    def stream(self, tokens: Any) -> Iterator[tuple[int, Float[Array, "B T D"]]]:
        """(layer, what enters it) from the first to the last, under the model's own parameters."""
        h = self.embed(tokens)
        for layer in range(len(self)):
            yield layer, h
            if layer + 1 < len(self):
                h, _ = self.run(layer, h)

    def module(self, layer: int, values: dict[str, Any]) -> Any:
        """The `Block` of a layer around given (possibly traced) parameters, for programs that run parts of it."""
        segment, slot, _ = self._places[layer]
        return nnx_compat.merge(self._structure(segment, slot), values)

    def context(self, length: int, batch: int) -> Context:
        """What a block's parts are called with outside of `run`: positions 0 to length - 1; traceable."""
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        tables = shared_tables(self.model.config, positions, self._bias(), False)
        return Context(mode="prefill", positions=positions, tables=tables)

    def _bias(self) -> Any:
        return self.model.module().blocks_bias()

    def _trace_embedding(self, values: dict[str, Any], tokens: Array) -> Array:
        module = nnx_compat.merge(self.model.structure, values)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        h = module.embed(tokens, positions, None)
        dtype = self.model.config.residual_dtype
        return h.astype(dtype) if dtype else h

    def _structure(self, segment: str, slot: str) -> Structure:
        if (segment, slot) not in self._structures:
            stacked = self.model.module().blocks.segments[segment][slot]
            self._structures[segment, slot], _ = nnx_compat.split(stacked)
        return self._structures[segment, slot]

    def trace(
        self, layer: int, values: dict[str, Any], h: Array, probes: tuple[Probe, ...] = (), sparsify: Array | None = None
    ) -> tuple[Array, dict[str, dict[str, Stat]]]:
        """`run` under the caller's own transformations."""
        block = self.module(layer, values)
        first = self._places.index((*self.kind(layer), 0))
        ctx = self.context(h.shape[1], h.shape[0])._replace(layer=first, probes=probes, sparsify=sparsify)
        with nnx_compat.read_only():
            h, stats, _ = block(h, ctx, None)
        return h, stats

    def _compile(self, layer: int, probes: tuple[Probe, ...]) -> Callable[..., Any]:
        return jax.jit(lambda values, h, sparsify: self.trace(layer, values, h, probes, sparsify))

    def _compile_probes(self, layer: int, probes: tuple[Probe, ...]) -> Callable[..., Any]:
        return jax.jit(lambda values, h: self.trace(layer, values, h, probes)[1])


def _probes_of(sites: Sequence[str]) -> tuple[Probe, ...]:
    return taps(*dict.fromkeys(measured_at(site)[0] for site in sites))


def _tensors_of(sites: Sequence[str], stats: Mapping[str, Mapping[str, Stat]]) -> dict[str, Array]:
    return {site: stats[measured_at(site)[1]]["value"].value for site in sites}
