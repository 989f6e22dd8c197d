"""What travels beside the activations: one immutable record, and the statistics that come back."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["reduction"])
@dataclasses.dataclass
class Stat:
    """A measured array and how it is reduced over microbatches: sum, max or mean.

    "token": it is not, but stands by token, [B, T, ...]; what experts measure of their rows is brought to [B, T, k, ...].
    """

    value: Any
    reduction: str = "sum"


class Probe(NamedTuple):
    """A measurement of the tensors that a site glob names: `measure(tensor, ctx) -> {name: Stat}`."""

    site: str
    measure: Callable[..., dict[str, Stat]]


class Context(NamedTuple):
    """What a block may know beside its input. Ops and blocks read it and never write.

    step, layer: the optimizer step and the layer's index in the stack.
    rng: a key that `key(site)` folds; None when nothing is random.
    mode: train, prefill (a whole sequence) or decode (one token against the cache).
    stage: the largest schedule boundary that the step has reached; static, so `reached` chooses code, not values.
    positions, segment_ids, prefix: int[B, T] of the tokens (see data/pipeline); segment 0 is padding.
    memory, memory_segment_ids: the encoder's output [B, S, D] and its segments, for cross-attention.
    tables: per-forward tensors that layers share (rotary cos and sin, relative bias).
    sparsify: bool[B, T]: the tokens at which activation sparsity acts; None: at all of them.
    executor: how linear maps multiply a SparseActivation, one of `arrays.EXECUTORS`.
    probes: what to measure, see Probe.
    """

    step: Any = 0
    layer: Any = 0
    rng: Any = None
    mode: str = "train"
    stage: float = math.inf
    positions: Any = None
    segment_ids: Any = None
    prefix: Any = None
    memory: Any = None
    memory_segment_ids: Any = None
    tables: Mapping[str, Any] = {}
    sparsify: Any = None
    executor: str = "masked"
    probes: tuple[Probe, ...] = ()

    @property
    def token_mask(self) -> Any:
        """bool[B, T], False at padding; None when there is no padding."""
        return None if self.segment_ids is None else self.segment_ids > 0

    def kept(self, mask: Any) -> Any:
        """mask bool[B, T, in], all True at the tokens that activation sparsity leaves alone."""
        return mask if self.sparsify is None else mask | ~self.sparsify[..., None]

    def key(self, site: str) -> Any:
        """This layer's and site's own random key."""
        return jax.random.fold_in(jax.random.fold_in(self.rng, self.layer), zlib.crc32(site.encode()))

    def reached(self, boundary: float) -> bool:
        """Whether the step has come to `boundary` (one that the op declares in `boundaries`)."""
        return self.stage >= boundary

    def measure(self, site: str, tensor: Any) -> dict[str, dict[str, Stat]]:
        """`{site: {name: Stat}}` of every probe that names this tensor site."""
        found: dict[str, Stat] = {}
        for probe in self.probes:
            if site_matches(probe.site, site):
                found.update(probe.measure(tensor, self))
        return {site: found} if found else {}


@functools.cache
def _pattern(glob: str) -> re.Pattern[str]:
    text = re.escape(glob).replace(r"\*\*", "\0").replace(r"\*", r"[^.]+").replace("\0", r".+")
    text = re.sub(r"\\\{(.*?)\\\}", lambda m: "(?:" + m[1].replace(",", "|") + ")", text)
    return re.compile(text)


def site_matches(glob: str, site: str) -> bool:
    """Whether a glob names a site: `*` is one part, `**` any number of parts, `{a,b}` alternatives."""
    return _pattern(glob).fullmatch(site) is not None


def merge_stats(*groups: Mapping[str, Any]) -> dict[str, Any]:
    """Join `{site: {name: Stat}}` dicts; the same site may be measured in several places."""
    merged: dict[str, Any] = {}
    for group in groups:
        for site, found in group.items():
            merged[site] = {**merged.get(site, {}), **found}
    return merged
