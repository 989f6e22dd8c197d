"""What a compressed model saves: zeros as they occur while text is scored, and the bytes that decoding one token reads.

    s_i              share of a map's weights that a token does not need, mean over tokens in scope:
                     1 - kept inputs * kept outputs
    model sparsity   sum n_i s_i / sum n_i over the linear maps of the blocks (embedding, head and norms out of both)
    bytes per token  all parameters once (`models.serving.read_bytes`) - experts that a token does not pass - sum bytes_i s_i
                     - zero padding of adapters
    ideal speed-up   dense bytes / bytes: the roofline of batch-1 decoding, KV cache left out, kernels as good as the dense one

Experts count as many times as a token passes some (n_i = k in out), and s_i is their mean over a token's experts.
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
from sparsejax.arrays import QTensor, SparseActivation, dense
from sparsejax.compress.blocks import measured_at
from sparsejax.context import Context, Probe, Stat
from sparsejax.evaluate.scoring import Meter
from sparsejax.io.model import Model
from sparsejax.io.name_map import parameter_slots
from sparsejax.layers.op import SiteRules
from sparsejax.models.config import ModelConfig
from sparsejax.models.serving import read_bytes
from sparsejax.models.sizes import expert_sites, linear_shapes
from sparsejax.plugs import check

ATTENTION, FEED = ("attn.q", "attn.k", "attn.v", "attn.o"), ("mlp.gate", "mlp.up", "mlp.down")
MIXED = ("mlp.experts.", "mlp.shared.")  # before gate, up, down: the networks of a mixture
MAPS = (*ATTENTION, *FEED, *(network + name.removeprefix("mlp.") for network in MIXED for name in FEED))
ENTERING = ("mlp.gate", "mlp.up")
EXTRA_ROLES = ("adapter", "fitted")


@dataclass(frozen=True)
class Sparsity:
    """Realised sparsity.

    Fields:
      sites: map of a block (`MAPS`) -> share of its weights that are not needed, float64 [L]; 0 where a block lacks it.
      sizes: map of a block -> its weights that a token passes (in * out, of experts k times that), int64 [L].
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
      ConfigError: no decoder, one whose feed is neither a network nor a mixture of them, or a mixture whose units are selected.
    """
    check(config.kind == "decoder", "--model: kind", config.kind, "only a decoder is compressed")
    other = [feed for feed in config.feed_pattern if feed.partition(":")[0] not in ("ffn", "moe")]
    check(not other, "--model: feed_pattern", other, "zeros are counted in dense networks and mixtures of experts (ffn, moe)")
    selected = next((site for site in _mixtures(config) if SiteRules.of(config).at("neurons", site)), "")
    check(not selected, "--model: neurons", selected, "selects units of a mixture of experts, whose savings are not counted")


def meter(config: ModelConfig) -> Meter:
    """Counts, while text is scored, how much of each map of a block every token needs; read by `sparsity`."""
    check_countable(config)
    skipping = {name: _skipping(config, name) for name in ENTERING}
    sites = ("attn.{q,k,v,o}", "mlp.{gate,up,down}", *(["mlp.up_out"] if config.neurons else []))
    # A bias is added to outputs that were dropped, too: there only the hidden units tell.
    chosen = "mlp.down" if config.ffn.bias else "mlp.up_out"
    probes = tuple(Probe(site, _kept_share) for site in sites)

    def reduce(stats: dict[str, Any], counted: Bool[Array, "B T"]) -> dict[str, Any]:
        kept = {site: stats[site]["kept"].value for site in stats if "kept" in stats[site]}  # [layers with it, B, T]
        of_experts = {site: stats[site]["kept_rows"].value.mean(-1) for site in stats if "kept_rows" in stats[site]}
        weight = counted.astype(jnp.float32)[None]
        sums = {}
        for name in MAPS:
            key = measured_at(name)[1]
            shares = of_experts if name.startswith("mlp.experts.") else kept
            if key in shares:
                needed = shares[key]
                if name in ENTERING:
                    needed = needed * _kept_outputs(kept, chosen, *skipping[name])
                sums[name] = jnp.sum((1 - needed) * weight, axis=(1, 2))
        return {"tokens": jnp.sum(weight), "skipped": sums}

    return Meter(probes, reduce)


def sparsity(config: ModelConfig, measured: dict[str, Any]) -> Sparsity:
    """What `meter` measured, `Scorer.measured`, as shares."""
    tokens = float(measured["tokens"])
    check(tokens, "--scope", tokens, "leaves no token to measure")
    shapes, experts = linear_shapes(config), expert_sites(config)
    sums, sites, sizes = measured["skipped"], {}, {}
    for name in (name for name in MAPS if name in sums):
        present = {layer: site for layer in range(config.num_layers) if (site := f"blocks.{layer}.{name}") in shapes}
        sites[name], sizes[name] = np.zeros(config.num_layers), np.zeros(config.num_layers, np.int64)
        sites[name][list(present)] = np.asarray(sums[name], np.float64) / tokens
        sizes[name][list(present)] = [math.prod(shapes[site]) * experts.get(site, (1, 1))[0] for site in present.values()]
    return Sparsity(sites, sizes, tokens)


def bytes_per_token(model: Model, realised: Sparsity | None = None) -> Bytes:
    """What decoding one token reads, beside the KV cache; without a sparsity, all of the model."""
    padding, extra = _extra_bytes(model)
    passed = _passed_bytes(model)
    idle = sum(stored - active for rows in passed.values() for stored, active in rows.values())
    saved = 0.0
    if realised is not None:
        for (leaf, layer), (_, active) in ((at, size) for rows in passed.values() for at, size in rows.items()):
            saved += active * float(realised.sites[leaf][layer])
    return Bytes(read_bytes(model.structure, model.values) - padding - idle - saved, extra, saved)


def weight_zeros(model: Model) -> float:
    """The share of exact zeros in the kernels of the blocks: what pruning of weights leaves."""
    zeros = total = 0
    for path, _ in _kernels(model).items():
        kernel = nnx_compat.at(model.values, path)
        whole = isinstance(kernel, QTensor) and kernel.spec.multiplies_as_integers  # a quarter of the bytes of their numbers
        numbers = kernel.unpacked() if whole else dense(kernel)
        zeros, total = zeros + int(jnp.sum(numbers == 0, dtype=jnp.int32)), total + numbers.size
    return zeros / total


def _kept_share(tensor: Any, ctx: Context) -> dict[str, Stat]:
    """float32 [B, T]: the share of a token's entries that are not zero; `kept_rows` of experts, by row of theirs.

    Entries that are zero because they were rounded do not count: no product leaves them out, and coarser codes have more.
    """
    values = tensor.values if isinstance(tensor, SparseActivation) else tensor
    zero = ~tensor.mask if isinstance(tensor, SparseActivation) else jnp.zeros(tensor.shape, bool)
    if isinstance(values, jax.Array):
        zero |= values == 0
    zeros = jnp.sum(zero, axis=-1, dtype=jnp.int32)
    share = Stat(1 - zeros.astype(jnp.float32) / zero.shape[-1], "token")  # exactly 1 where there is no zero
    return {"kept" if zero.ndim == 3 else "kept_rows": share}


def _skipping(config: ModelConfig, name: str) -> tuple[np.ndarray, np.ndarray]:
    """bool [layers with this map] each: whether a selector of neurons, whether an op at `down`, saves outputs of it."""
    rules = SiteRules.of(config)
    leaf, shapes = name.rpartition(".")[2], linear_shapes(config)
    present = [layer for layer in range(config.num_layers) if f"blocks.{layer}.{name}" in shapes]

    def saved(field: str, site: str, default: tuple[str, ...]) -> np.ndarray:
        layers = (rules.at(field, f"blocks.{layer}.{site}") for layer in present)
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


def _passed_bytes(model: Model) -> dict[tuple[str, ...], dict[tuple[str, int], tuple[float, float]]]:
    """By path of an array of kernels, and (map of a block, layer): its bytes, and those that a token passes."""
    found: dict[tuple[str, ...], dict[tuple[str, int], tuple[float, float]]] = {}
    experts = expert_sites(model.config)
    for path, rows in _kernels(model).items():
        kernel = nnx_compat.at(model.values, path)
        each = sum(part.nbytes for part in _rows(kernel)) / len(rows)
        shares = {(leaf, layer): experts.get(f"blocks.{layer}.{leaf}", (1, 1)) for leaf, layer in rows}
        found[path] = {at: (each, each * passed / among) for at, (passed, among) in shares.items()}
    return found


def _rows(kernel: Any) -> list[Array]:
    """The arrays of a kernel that have a row for every input; a scale of several inputs is read with any of them."""
    if not isinstance(kernel, QTensor):
        return [kernel]
    scales = (kernel.scale, kernel.zero) if kernel.spec.block(kernel.shape)[0] == 1 else ()
    return [kernel.codes, *(part for part in scales if part is not None)]


def _mixtures(config: ModelConfig) -> list[str]:
    """`blocks.3.mlp.experts`, `blocks.3.mlp.shared`, ...: the networks of mixtures."""
    sites = (site.rpartition(".")[0] for site in linear_shapes(config))
    return [site for site in dict.fromkeys(sites) if site.endswith((".experts", ".shared"))]


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
