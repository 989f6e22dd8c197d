"""What methods that prune weights share: the maps they act on, and blocks pruned in order, each fitted to what the pruned ones
before it let through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.arrays import dense
from sparsejax.compress.blocks import INPUTS, Blocks
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.recipe import Work
from sparsejax.compress.surgery import sites_of
from sparsejax.context import Context, Probe, Stat
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check

# All maps of all blocks.
ALL_MAPS = "blocks.*.{attn,mlp}.*"
# Tokens of a forward pass while statistics are taken.
BATCH_TOKENS = 4_096


class Statistic(NamedTuple):
    """What is taken of the calibration tensor that enters maps.

    Fields:
      measure: of a `Probe`, hashable; compiled into the block's program.
      fold: (total so far or None, what was measured of a batch by name, the kernels [in, out] by site that the tensor enters)
        -> total.
    """

    measure: Callable[[Array, Context], dict[str, Stat]]
    fold: Callable[[Any, Mapping[str, Array], Mapping[str, np.ndarray]], Any]



class Scored(NamedTuple):
    """A new kernel, an array [in, out] or a QTensor, with numbers by name that are kept beside it as `SITE:NAME`."""

    kernel: Any
    numbers: Mapping[str, float]


Treat = Callable[[str, Float[np.ndarray, "in out"], Any], Any]


def maps_of(config: ModelConfig, glob: str) -> list[str]:
    """The linear maps of blocks that a glob names.

    Raises:
      ConfigError: no decoder, a glob that names no map, or one inside an expert layer.
    """
    check(config.kind == "decoder", "model.kind", config.kind, "blocks are pruned in order, which needs a decoder")
    sites = sites_of(config, "weights", glob)
    inside = [site for site in sites if site.startswith("blocks.") and _tap(site)]
    check(len(inside) == len(sites), "sites", sorted(set(sites) - set(inside))[:4], "are not maps of a dense block")
    dense_feed = all(feed.partition(":")[0] == "ffn" for feed in config.feed_pattern)
    check(dense_feed or not any(".mlp." in site for site in sites), "sites", glob,
          f"names maps of {config.feed_pattern}; experts are not pruned, name `blocks.*.attn.*`")
    return sites


def _tap(site: str) -> str:
    """The block-local tensor that enters a map, see `INPUTS`; empty for other sites."""
    local = site.split(".", 2)[-1]
    return next((tap for tap, maps in INPUTS.items() if local in maps), "")


@dataclass(frozen=True)
class _Products:
    full: bool
    skip: int

    def __call__(self, tensor: Array, ctx: Context) -> dict[str, Stat]:
        rows = tensor[:, self.skip :].reshape(-1, tensor.shape[-1]).astype(jnp.float32)
        return {
            "products": Stat(rows.T @ rows if self.full else jnp.sum(jnp.square(rows), axis=0)),
            "tokens": Stat(jnp.asarray(rows.shape[0], jnp.float32)),
        }


class Moment(NamedTuple):
    """Sums in float64 over batches, each batch's in float32: x x^T [in, in] or x^2 [in], and tokens."""

    products: np.ndarray
    tokens: float

    @property
    def mean(self) -> np.ndarray:
        return self.products / self.tokens


def second_moments(work: Work, *, full: bool) -> Statistic:
    """The `Moment` of what enters a map: the whole matrix, or its diagonal."""

    def fold(total: Moment | None, found: Mapping[str, Array], kernels: Mapping[str, np.ndarray]) -> Moment:
        products, tokens = np.asarray(found["products"], np.float64), float(found["tokens"])
        return Moment(products, tokens) if total is None else Moment(total.products + products, total.tokens + tokens)

    return Statistic(_Products(full, work.calibration.spec.skip_first), fold)


def prune_in_order(model: Model, work: Work, sites: Sequence[str], title: str, statistic: Statistic, prune: Treat) -> Model:
    """The model with each map of `sites` pruned, block by block, every block fed by the pruned ones before it.

    Args:
      title: for the progress bar and the notes.
      statistic: taken of what enters each map.
      prune: (site, its kernel in float32, the statistic's total) -> the kernel with its zeros.
    """
    return finished(model, work, title, visit_in_order(model, work, sites, title, statistic, prune))


def visit_in_order(
    model: Model,
    work: Work,
    sites: Sequence[str],
    title: str,
    statistic: Statistic,
    treat: Treat,
    *,
    replace: bool = True,
    by_tap: bool = False,
) -> dict[str, Any]:
    """What `treat` gave for each site, block by block; a piece of `work` by block.

    Args:
      statistic: as in `prune_in_order`.
      treat: the same, or with a QTensor or a `Scored` as its result.
      replace: what treat gives are the kernels under which the following blocks are fed; else they are fed by the model's own.
      by_tap: the same within a block: statistics of a tensor are taken when all maps before it have their new kernels, at the
        price of a pass through the block for each of the (up to four) tensors.
    """
    blocks = Blocks(model)
    batches = [blocks.embed(tokens) for tokens in batches_of(work.calibration)]

    def treat_block(layer: int, here: Sequence[str], batches: Sequence[Array]) -> dict[str, Any]:
        kernels = {site: kernel_of(model, site) for site in here}
        treated: dict[str, Any] = {}
        reached = [tap for tap in INPUTS if tap in map(_tap, here)]
        for turn in [[tap] for tap in reached] if by_tap else [reached]:
            taps = {tap: {site: kernels[site] for site in here if _tap(site) == tap} for tap in turn}
            values = with_kernels(blocks.values(layer), _kernels_in(treated))
            totals: dict[str, Any] = dict.fromkeys(taps)
            for h in batches:
                _, stats = blocks.run(layer, h, values=values, probes=tuple(Probe(tap, statistic.measure) for tap in taps))
                for tap in taps:
                    measured = {name: stat.value for name, stat in stats[tap].items()}
                    totals[tap] = statistic.fold(totals[tap], measured, taps[tap])
            for site in (site for tap in taps.values() for site in tap):
                treated |= _flat(site, treat(site, kernels[site], totals[_tap(site)]))
        return treated

    found: dict[str, Any] = {}
    for layer in work.layers(title, len(blocks)):
        here = [site for site in sites if site.split(".")[1] == str(layer)]
        treated = work.piece(f"block{layer}", partial(treat_block, layer, here, batches)) if here else {}
        found |= treated
        if layer + 1 < len(blocks):
            values = with_kernels(blocks.values(layer), _kernels_in(treated) if replace else {})
            batches = [blocks.run(layer, h, values=values)[0] for h in batches]
    return found


def _flat(site: str, result: Any) -> dict[str, Any]:
    if not isinstance(result, Scored):
        return {site: result}
    return {site: result.kernel, **{f"{site}:{name}": np.float64(number) for name, number in result.numbers.items()}}


def _kernels_in(treated: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kernel for name, kernel in treated.items() if ":" not in name}


def batches_of(calibration: Calibration) -> list[Array]:
    """The tokens int32[B, T] of a calibration, as many sequences at a time as `BATCH_TOKENS` hold, at least one."""
    tokens = jnp.asarray(calibration.tokens)
    size = max(1, BATCH_TOKENS // tokens.shape[1])
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def kernel_of(model: Model, site: str) -> Float[np.ndarray, "in out"]:
    """A map's kernel in float32.

    Raises:
      ConfigError: it is packed.
    """
    kernel = model.parameter(f"{site}.kernel")
    check(isinstance(kernel, jax.Array), site, type(kernel).__name__, "is packed, and its numbers cannot be changed any more")
    return np.asarray(kernel, np.float32)


def with_kernels(values: dict[str, Any], kernels: Mapping[str, Any]) -> dict[str, Any]:
    """A block's parameters with other kernels, by site; QTensors as the numbers that they stand for."""
    values = jax.tree.map(lambda a: a, values)  # new dicts, the same arrays
    for site, kernel in kernels.items():
        _, _, part, name = site.split(".")
        values[part][name]["kernel"] = jnp.asarray(dense(kernel), values[part][name]["kernel"].dtype)
    return values


def finished(model: Model, work: Work, title: str, kernels: Mapping[str, np.ndarray]) -> Model:
    """The model with its new kernels, and the share of zeros of each noted."""
    zeros = {site: float(np.mean(kernel == 0)) for site, kernel in kernels.items()}
    sizes = {site: kernel.size for site, kernel in kernels.items()}
    total = sum(zeros[site] * sizes[site] for site in zeros) / max(1, sum(sizes.values()))
    work.note(title, weight_sparsity=total, weight_sparsity_of=zeros)
    names = {f"{site}.kernel": kernel for site, kernel in kernels.items()}
    arrays = {name: jnp.asarray(kernel, model.parameter(name).dtype) for name, kernel in names.items()}
    return model.rebuilt(model.config, arrays)
