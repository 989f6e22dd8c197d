"""What is measured of calibration activations, on the host: exact quantiles and second moments."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsejax.compress.blocks import EXPERT_INPUTS, INPUTS, Blocks
from sparsejax.compress.recipe import Work

# Entries that are sorted at most; a longer sample is thinned to every n-th row first.
LARGEST_SAMPLE = 2**27
# Tokens that run through a block at once.
TOKENS_TOGETHER = 2**13
# Order statistics that are kept of a sorted sample: a quantile is exact to 1 / 65,536, and a site takes 256 KiB.
KEPT = 2**16


class Quantiles:
    """Quantiles of a sample of scores: t = inf {t : P(score <= t) >= s}, so that score > t keeps 1 - s of the sample.

    Of a sample of more than `KEPT` scores as many evenly spaced order statistics are kept: s is rounded up to their grid.
    """

    def __init__(self, scores: Any):
        """Sort them.

        Args:
          scores: float[..., F], not negative.
        """
        sample = np.asarray(scores, np.float32)
        sample = sample.reshape(-1, sample.shape[-1]) if sample.ndim > 1 else sample.reshape(-1, 1)
        whole = np.sort(sample[:: math.ceil(sample.size / LARGEST_SAMPLE)], axis=None)
        count = min(len(whole), KEPT)
        self.sorted = whole[np.arange(1, count + 1) * len(whole) // count - 1] if count < len(whole) else whole

    @classmethod
    def of(cls, ordered: np.ndarray) -> Quantiles:
        """Around `Quantiles.sorted` of an earlier one."""
        made = cls.__new__(cls)
        made.sorted = ordered
        return made

    def __call__(self, sparsity: float) -> float:
        """The threshold that drops this share of the sample; -1 (everything is kept) at 0."""
        rank = math.ceil(sparsity * len(self.sorted) - 1e-6)
        return float(self.sorted[rank - 1]) if rank else -1.0


def second_moment(x: Any, skip_first: int = 0) -> np.ndarray:
    """float64 [F, F]: the mean of x x^T over tokens.

    Args:
      x: float[B, T, F].
      skip_first: tokens of each sequence that are left out.
    """
    rows = np.asarray(x, np.float64)[:, skip_first:].reshape(-1, np.shape(x)[-1])
    return rows.T @ rows / len(rows)


def largest_by_channel(
    blocks: Blocks, layer: int, streams: Sequence[Any], tensors: Sequence[str], skip_first: int = 0
) -> dict[str, np.ndarray]:
    """max |x_k| over tokens, float32 [in], of tensors of a block.

    Args:
      streams: what enters the block, float[B, T, D] each.
      tensors: block-local, e.g. "attn.q" (`tensor_of`).
      skip_first: tokens of each sequence that are left out.
    """
    found: dict[str, np.ndarray] = {}
    for h in streams:
        for tensor, x in blocks.entering(layer, h, *tensors).items():
            here = np.abs(np.asarray(x, np.float32)[:, skip_first:]).max((0, 1))
            found[tensor] = np.maximum(found[tensor], here) if tensor in found else here
    return found


def tensor_of(site: str) -> str:
    """The tensor, by the first map that reads it, that enters a block-local map: "attn.q" for "attn.v", see `INPUTS`."""
    return next((tensor for tensor, maps in (INPUTS | EXPERT_INPUTS).items() if site in maps), site)


def input_quantiles(
    blocks: Blocks,
    work: Work,
    sites: Sequence[str],
    scales: Mapping[str, np.ndarray] | None = None,
    name: str = "quantiles",
) -> dict[str, Quantiles]:
    """Quantiles of |x| at the input of each site, or of |x| * scale, from one pass over the calibration; a piece per layer.

    Args:
      blocks: of the model that is measured.
      sites: `blocks.3.mlp.down`, ...
      scales: by site, float[in]; sites that are not named have ones.
      name: of the pieces; another one where anything but the model differs.
    """
    scales, skip = scales or {}, work.calibration.spec.skip_first
    tokens = work.calibration.tokens
    together = max(1, TOKENS_TOGETHER // tokens.shape[1])
    entering = [blocks.embed(tokens[first : first + together]) for first in range(0, len(tokens), together)]
    reached = 0

    def measure(layer: int, chosen: Sequence[str]) -> dict[str, np.ndarray]:
        nonlocal reached
        tensors = tuple(dict.fromkeys(tensor_of(site.split(".", 2)[2]) for site in chosen))
        samples: dict[str, list[np.ndarray]] = {tensor: [] for tensor in tensors}
        for number, h in enumerate(entering):
            for finished in range(reached, layer):
                h, _ = blocks.run(finished, h)
            entering[number], entered = blocks.tensors(layer, h, *tensors)
            for tensor, x in entered.items():
                every = math.ceil(len(tokens) * x[0].size / LARGEST_SAMPLE)
                samples[tensor].append(np.abs(np.asarray(x)[:, skip:].reshape(-1, x.shape[-1])[::every]))
        reached = layer + 1
        return _sorted_scores({tensor: np.concatenate(parts) for tensor, parts in samples.items()}, chosen, scales)

    found: dict[str, Quantiles] = {}
    for layer in work.layers("quantiles of inputs", len(blocks)):
        chosen = [site for site in sites if site.split(".")[1] == str(layer)]
        if chosen:
            kept = work.piece(f"{name}-{layer}", functools.partial(measure, layer, chosen))
            found.update({site: Quantiles.of(kept[_key(site, scales)]) for site in chosen})
    return found


def _key(site: str, scales: Mapping[str, np.ndarray]) -> str:
    """Sites without scales that read one tensor share its quantiles."""
    local = site.split(".", 2)[2]
    return local if site in scales else f"|{tensor_of(local)}|"


def _sorted_scores(
    magnitudes: Mapping[str, np.ndarray], sites: Sequence[str], scales: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for site in sites:
        if (key := _key(site, scales)) not in found:
            magnitude = magnitudes[tensor_of(site.split(".", 2)[2])]
            found[key] = Quantiles(magnitude * scales[site].astype(magnitude.dtype) if site in scales else magnitude).sorted
    return found


class Range(NamedTuple):
    """The least and the greatest entry of each channel of a calibration tensor, float32 [in]."""

    low: np.ndarray
    high: np.ndarray

    @property
    def magnitude(self) -> np.ndarray:
        """max |x| by channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


def channel_ranges(blocks: Blocks, work: Work, sites: Sequence[str], name: str = "ranges") -> dict[str, Range]:
    """By site, the range of what enters its map, from one pass over the calibration; a piece per layer.

    Args:
      blocks: of the model that is measured.
      sites: `blocks.3.mlp.down`, ...
      name: of the pieces; another one where anything but the model differs.
    """
    skip, tokens = work.calibration.spec.skip_first, work.calibration.tokens
    together = max(1, TOKENS_TOGETHER // tokens.shape[1])
    streams = [blocks.embed(tokens[first : first + together]) for first in range(0, len(tokens), together)]

    def measure(layer: int, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for h in streams:
            for tensor, x in blocks.tensors(layer, h, *tensors)[1].items():
                rows = np.asarray(x[:, skip:], np.float32).reshape(-1, x.shape[-1])
                low, high = found.get(f"{tensor}:low", np.inf), found.get(f"{tensor}:high", -np.inf)
                found |= {f"{tensor}:low": np.minimum(low, rows.min(0)), f"{tensor}:high": np.maximum(high, rows.max(0))}
        return found

    ranges: dict[str, Range] = {}
    for layer in work.layers("ranges of inputs", len(blocks)):
        here = {site: tensor_of(site.split(".", 2)[2]) for site in sites if site.split(".")[1] == str(layer)}
        tensors = tuple(dict.fromkeys(here.values()))
        kept = work.piece(f"{name}-{layer}", functools.partial(measure, layer, tensors)) if here else {}
        ranges |= {site: Range(kept[f"{tensor}:low"], kept[f"{tensor}:high"]) for site, tensor in here.items()}
        if layer + 1 < len(blocks):
            streams = [blocks.run(layer, h)[0] for h in streams]
    return ranges
