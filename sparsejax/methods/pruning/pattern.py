"""Which weights of a map are kept, given a score of each: a share of them, or n of every m consecutive inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparsejax.compress.recipe import check_sparsity
from sparsejax.models.config import ModelConfig
from sparsejax.models.sizes import linear_shapes
from sparsejax.ops.selectors import n_of_m_mask, topk_mask
from sparsejax.plugs import ConfigError, check, check_choice

# Among which weights the lowest scores are sought: those of an output, of a map, of all maps.
COMPARISONS = ("output", "layer", "global")


@dataclass(frozen=True)
class Pattern:
    """A share `sparsity` of zeros, or (m > 0) n kept of every m consecutive inputs of each output."""

    sparsity: float
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str, name: str = "pattern") -> Pattern:
        """`"0.5"` or `"2:4"` (n kept of m).

        Raises:
          ConfigError: neither, a share outside [0, 1), or n outside 1 to m.
        """
        found = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if found:
            n, m = int(found[1]), int(found[2])
            check(1 <= n <= m, name, text, "must keep 1 to m of m inputs")
            return cls(1 - n / m, n, m)
        try:
            sparsity = float(text)
        except ValueError as error:
            raise ConfigError(f"{name} = {text!r}: expected a share such as '0.5', or 'n:m' such as '2:4'") from error
        check_sparsity(sparsity, name)
        return cls(sparsity)

    @property
    def everything(self) -> bool:
        """Whether it keeps all weights."""
        return self.sparsity == 0

    def check(self, config: ModelConfig, sites: Iterable[str]) -> None:
        """Raise a ConfigError unless m divides the inputs of every site."""
        shapes = linear_shapes(config)
        for site in sites:
            if self.m and shapes[site][0] % self.m:
                raise ConfigError(f"pattern = '{self.n}:{self.m}': m must divide the inputs, and {site} has {shapes[site][0]}")

    def keep(self, score: Float[Array, "in out"], comparison: str) -> Bool[Array, "in out"]:
        """True where a weight is kept: floor(sparsity * count) lowest scores go, of equal ones those of higher index.

        Args:
          score: not negative.
          comparison: "output" (every output loses as many) or "layer"; n of m is always within an output.
        """
        check_choice("comparison", comparison, COMPARISONS[:2])
        if self.everything:
            return jnp.ones(score.shape, bool)
        if self.m:
            return _keep_n_of_m(score, self.n, self.m)
        count = score.shape[0] if comparison == "output" else score.size
        return _keep_highest(score, jnp.asarray(count - int(self.sparsity * count)), comparison == "output")


@partial(jax.jit, static_argnums=2)
def _keep_highest(score: Array, kept: Array, by_output: bool) -> Array:
    return topk_mask(score.T, kept).T if by_output else topk_mask(score.reshape(1, -1), kept).reshape(score.shape)


@partial(jax.jit, static_argnums=(1, 2))
def _keep_n_of_m(score: Array, n: int, m: int) -> Array:
    return n_of_m_mask(score.T, n, m).T


def keep_highest(score: Float[Array, "in out"], kept: int) -> Bool[Array, "in out"]:
    """True at exactly `kept` scores of a map, 0 of them included."""
    return _keep_highest(score, jnp.asarray(kept), False) if kept else jnp.zeros(score.shape, bool)


def kept_globally(scores: Callable[[str], np.ndarray], sites: Iterable[str], sparsity: float) -> dict[str, int]:
    """How many weights each site keeps where all sites' scores compete; equal scores go from the last sites first.

    The scores are read three times and never held together: their order is that of their bits, so two counts of 2^16 find the
    threshold exactly.

    Args:
      scores: by site, float32, not negative.
      sparsity: share that goes, of all.
    """
    sites = tuple(sites)
    high = {site: _count(_bits(scores(site)) >> 16) for site in sites}
    total = sum(high.values(), start=np.zeros(2**16, np.int64))
    dropped = int(sparsity * int(total.sum()))
    first = int(np.searchsorted(np.cumsum(total), dropped + 1))
    low = {site: _count(_low_half(_bits(scores(site)), first)) for site in sites}
    within = sum(low.values(), start=np.zeros(2**16, np.int64))
    left = dropped - int(total[:first].sum())
    second = int(np.searchsorted(np.cumsum(within), left + 1))
    ties = left - int(within[:second].sum())  # of the scores equal to the threshold, this many go as well
    kept = {}
    for site in reversed(sites):
        taken = min(ties, int(low[site][second]))
        ties -= taken
        gone = int(high[site][:first].sum()) + int(low[site][:second].sum()) + taken
        kept[site] = int(high[site].sum()) - gone
    return {site: kept[site] for site in sites}


def _bits(score: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(score, np.float32) + np.float32(0)).view(np.uint32).ravel()


def _low_half(bits: np.ndarray, high: int) -> np.ndarray:
    return bits[(bits >> 16) == high] & 0xFFFF


def _count(values: np.ndarray) -> np.ndarray:
    return np.bincount(values, minlength=2**16)
