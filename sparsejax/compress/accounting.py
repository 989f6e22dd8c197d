"""What a compressed model saves: zeros as they occur while text is scored, and the bytes that decoding one token reads.

    s_i              share of a map's weights that a token does not need, mean over tokens in scope:
                     1 - kept inputs * kept outputs
    model sparsity   sum n_i s_i / sum n_i over the linear maps of the blocks (embedding, head and norms out of both)
    bytes per token  all parameters once (`models.serving.read_bytes`) - sum bytes_i s_i - zero padding of adapters
    ideal speed-up   dense bytes / bytes: the roofline of batch-1 decoding, KV cache left out, kernels as good as the dense one

Inputs are kept where the operand of a map is not exactly zero. Outputs of `up` are dropped where a neuron selector drops its
hidden units; `skips` of a selector or of an op at `down` (class variable, names of FFN maps) says whose outputs its zeros save:
("up",) for thresholds on the gate, which is what a selector has unless it says more, ("gate", "up") where the choice is known
before the gate. Zeros in weights are counted apart: a dense array of zeros is read like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from sparsejax import nnx_compat
from sparsejax.arrays import QTensor, dense
from sparsejax.context import Context, Probe, Stat
from sparsejax.evaluate.scoring import Meter
from sparsejax.io.model import Model
from sparsejax.io.name_map import parameter_slots
from sparsejax.layers.op import SiteRules
from sparsejax.models.config import ModelConfig
from sparsejax.models.serving import read_bytes
from sparsejax.models.sizes import linear_shapes
from sparsejax.plugs import check

MAPS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
ENTERING = ("mlp.gate", "mlp.up")
EXTRA_ROLES = ("adapter", "fitted")


@dataclass(frozen=True)
class Sparsity:
    """Realised sparsity.

    Fields:
      sites: map of a block (`MAPS`) -> share of its weights that are not needed, float64 [L].
      sizes: map of a block -> its weights (in * out), int64 [L].
      tokens: over which the shares are means.
    """

    sites: Mapping[str, np.ndarray]
    sizes: Mapping[str, np.ndarray]
    tokens: float

    @property
    def model(self) -> float:
        """Model sparsity."""
        saved = sum(float(self.sites[name] @ self.sizes[name]) for name in self.sites)
        return saved / sum(int(sizes.sum()) for sizes in self.sizes.values())

    def layer(self) -> np.ndarray:
        """float64 [L]: the same by layer."""
        saved = sum(self.sites[name] * self.sizes[name] for name in self.sites)
        return np.asarray(saved / sum(self.sizes.values()))

    def describe(self) -> dict[str, Any]:
        """JSON values."""
        means = {name: float(shares @ self.sizes[name] / self.sizes[name].sum()) for name, shares in self.sites.items()}
        return {
            "model": self.model,
            "sites": means,
            "layers": {name: shares.tolist() for name, shares in self.sites.items()},
            "tokens": int(self.tokens),
        }


class Bytes(NamedTuple):
    """Bytes that decoding one token reads: all of them, those of adapters and fitted arrays among them, and what was saved."""

    total: float
    extra: float
    saved: float


def check_countable(config: ModelConfig) -> None:
    """Refuse a model whose zeros cannot be told by token.

    Raises:
      ConfigError: no decoder, or one with experts.
    """
    check(config.kind == "decoder", "--model: kind", config.kind, "only a decoder is compressed")
    experts = [feed for feed in config.feed_pattern if not feed.startswith("ffn")]
    check(not experts, "--model: feed_pattern", experts, "sparsity is counted by token; rows sorted by expert do not tell it")


def meter(config: ModelConfig) -> Meter:
    """Counts, while text is scored, how much of each map of a block every token needs; read by `sparsity`."""
    check_countable(config)
    skipping = {name: _skipping(config, name) for name in ENTERING}
    sites = ("attn.{q,k,v,o}", "mlp.{gate,up,down}", *(["mlp.up_out"] if config.neurons else []))
    # A bias is added to outputs that were dropped, too: there only the hidden units tell.
    chosen = "mlp.down" if config.ffn.bias else "mlp.up_out"
    probes = tuple(Probe(site, _kept_share) for site in sites)

    def reduce(stats: dict[str, Any], counted: Bool[Array, "B T"]) -> dict[str, Any]:
        kept = {site: stats[site]["kept"].value for site in stats if "kept" in stats[site]}  # [L, B, T]
        weight = counted.astype(jnp.float32)[None]
        sums = {}
        for name in MAPS:
            if name in kept:
                needed = kept[name] * _kept_outputs(kept, chosen, *skipping[name]) if name in ENTERING else kept[name]
                sums[name] = jnp.sum((1 - needed) * weight, axis=(1, 2))
        return {"tokens": jnp.sum(weight), "skipped": sums}

    return Meter(probes, reduce)


def sparsity(config: ModelConfig, measured: dict[str, Any]) -> Sparsity:
    """What `meter` measured, `Scorer.measured`, as shares."""
    tokens = float(measured["tokens"])
    check(tokens, "--scope", tokens, "leaves no token to measure")
    shapes = linear_shapes(config)
    sums = measured["skipped"]
    sites = {name: np.asarray(sums[name], np.float64) / tokens for name in MAPS if name in sums}
    sizes = {
        name: np.array([math.prod(shapes[f"blocks.{layer}.{name}"]) for layer in range(config.num_layers)], np.int64)
        for name in sites
    }
    return Sparsity(sites, sizes, tokens)


def bytes_per_token(model: Model, realised: Sparsity | None = None) -> Bytes:
    """What decoding one token reads, beside the KV cache; without a sparsity, all of the model."""
    padding, extra = _extra_bytes(model)
    saved = 0.0 if realised is None else _saved_bytes(model, realised)
    return Bytes(read_bytes(model.structure, model.values) - padding - saved, extra, saved)


def weight_zeros(model: Model) -> float:
    """The share of exact zeros in the kernels of the blocks: what pruning of weights leaves."""
    zeros = total = 0
    for path, _ in _kernels(model).items():
        kernel = nnx_compat.at(model.values, path)
        codes = kernel.integers() if isinstance(kernel, QTensor) else kernel
        zeros, total = zeros + int(jnp.sum(codes == 0, dtype=jnp.int32)), total + codes.size
    return zeros / total


def _kept_share(tensor: Any, ctx: Context) -> dict[str, Stat]:
    """float32 [B, T]: the share of a token's entries that are not zero."""
    x = dense(tensor)
    zeros = jnp.sum(x == 0, axis=-1, dtype=jnp.int32)
    return {"kept": Stat(1 - zeros.astype(jnp.float32) / x.shape[-1], "mean")}  # exactly 1 where there is no zero


def _skipping(config: ModelConfig, name: str) -> tuple[np.ndarray, np.ndarray]:
    """bool [L] each: whether a selector of neurons, whether an op at `down`, saves outputs of this map."""
    rules = SiteRules.of(config)
    leaf = name.rpartition(".")[2]

    def saved(field: str, site: str, default: tuple[str, ...]) -> np.ndarray:
        layers = (rules.at(field, f"blocks.{layer}.{site}") for layer in range(config.num_layers))
        return np.array([any(leaf in getattr(spec, "skips", default) for spec in specs) for specs in layers], bool)

    return saved("neurons", "mlp", ("up",)), saved("inputs", "mlp.down", ())


def _kept_outputs(kept: dict[str, Array], chosen: str, by_selector: np.ndarray, by_down: np.ndarray) -> Array:
    """float32 [L, B, T]: the share of a map's outputs that a token needs; `chosen`: the site that shows a selector's choice."""
    share = jnp.ones_like(kept["mlp.down"])
    for skips, site in ((by_selector, chosen), (by_down, "mlp.down")):
        if skips.any():
            share = jnp.minimum(share, jnp.where(skips[:, None, None], kept[site], 1))
    return share


def _kernels(model: Model) -> dict[tuple[str, ...], list[tuple[str, int]]]:
    """Path of each array that holds kernels of the blocks -> (map of a block, layer) of its rows."""
    found: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    shapes = linear_shapes(model.config)
    for name, slot in parameter_slots(model.module(), model.structure.paths).items():
        site = name.removesuffix(".kernel")
        if name.endswith(".kernel") and site in shapes and site.startswith("blocks."):
            _, layer, leaf = site.split(".", 2)
            found.setdefault(slot.path, []).append((leaf, int(layer)))
    return found


def _saved_bytes(model: Model, realised: Sparsity) -> float:
    saved = 0.0
    for path, rows in _kernels(model).items():
        kernel = nnx_compat.at(model.values, path)
        stored = kernel.codes if isinstance(kernel, QTensor) else kernel  # scales belong to outputs, which are all computed
        saved += stored.nbytes / len(rows) * sum(float(realised.sites[leaf][layer]) for leaf, layer in rows)
    return saved


def _extra_bytes(model: Model) -> tuple[float, float]:
    """(all-zero columns and rows of adapters and fitted arrays, the rest of these arrays)."""
    padding = extra = 0.0
    for path, weight in zip(model.structure.paths, model.structure.variables, strict=True):
        if weight.role in EXTRA_ROLES:
            for leaf in jax.tree.leaves(nnx_compat.at(model.values, path)):
                read = _filled(leaf, len(weight.axes)) * leaf.dtype.itemsize
                padding, extra = padding + leaf.nbytes - read, extra + read
    return padding, extra


def _filled(array: Array, dims: int) -> int:
    """Entries of a stack of vectors or matrices [..., in, out] without the rows and columns that are all zero."""
    if dims < 2:
        return array.size
    nonzero = np.asarray(array != 0)
    rows, columns = (nonzero.any(axis=axis).sum(axis=-1) for axis in (-1, -2))
    return int(np.sum(rows * columns))
