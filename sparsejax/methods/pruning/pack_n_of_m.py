"""n:m kernels stored by what they keep: values and packed positions (2:4, Mishra et al., 2021, arXiv 2104.08378).

Acts on the kernels of linear maps that an earlier pass or training (`sr_ste`) left with at most n non-zeros in every m
consecutive inputs of an output; nothing is pruned here and no value changes:

    kernel [in, out] -> values [in n / m, out] + positions, 2 bits each for m = 4

2:4 takes 9/16 of the bytes in bfloat16, 17/32 in float32. There is no kernel that multiplies by it: products unpack it first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from sparsejax import plugs
from sparsejax.compress.recipe import WEIGHTS, Pass, Work
from sparsejax.compress.surgery import chain_at
from sparsejax.io.model import Model
from sparsejax.methods.pruning.pattern import Pattern
from sparsejax.methods.pruning.sequential import ALL_MAPS, kernel_of, maps_of
from sparsejax.methods.pruning.sr_ste import SRSTE, n_of_m_inputs
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import ConfigError, check
from sparsejax.sparse_arrays import NMSparse, n_of_m_holds, pack_n_of_m


@dataclass
class PackNofM(Pass):
    """pattern: `n:m`; sites: of the maps, in all layers."""

    pattern: str = "2:4"
    sites: str = ALL_MAPS
    stage: ClassVar[str] = WEIGHTS

    def check(self, config: ModelConfig) -> None:
        pattern = Pattern.parse(self.pattern)
        check(0 < pattern.m <= 256, "pattern", self.pattern, "expected n:m with m at most 256")
        sites = maps_of(config, self.sites)
        pattern.check(config, sites)
        local = [site.split(".", 2)[2] for site in sites]
        partial = sorted({name for name in local if local.count(name) < config.num_layers})
        check(not partial, "sites", self.sites, f"names {partial} in some layers only; all layers are stored as one array")

    def apply(self, model: Model, work: Work) -> Model:
        """The model with its kernels as `NMSparse`.

        Raises:
          ConfigError: a kernel that holds more than n in a group, and that no `sr_ste` op of its own prunes so.
        """
        pattern = Pattern.parse(self.pattern)
        sites = maps_of(model.config, self.sites)
        before, after, arrays = 0, 0, {}
        for number in work.layers(self.name, len(sites)):
            site = sites[number]
            packed = self._packed(model, site, pattern)
            arrays[f"{site}.kernel"] = packed
            before += packed.shape[0] * packed.shape[1] * packed.dtype.itemsize
            after += packed.values.nbytes + packed.indices.nbytes
        work.note(self.name, bytes_before=before, bytes_after=after)
        return model.rebuilt(model.config, arrays)

    def _packed(self, model: Model, site: str, pattern: Pattern) -> NMSparse:
        kernel = jnp.asarray(kernel_of(model, site), model.parameter(f"{site}.kernel").dtype)
        ops = plugs.resolve_chain("weight_op", "|".join(chain_at(model.config, "weights", site)))
        if any(isinstance(op, SRSTE) and (op.n, op.m) == (pattern.n, pattern.m) for op in ops):
            kernel = jnp.where(n_of_m_inputs(kernel, pattern.n, pattern.m), kernel, 0)
        if not n_of_m_holds(kernel, pattern.n, pattern.m):
            raise ConfigError(f"{site}: more than {pattern.n} of {pattern.m} consecutive inputs are kept; prune to "
                              f"{self.pattern} first")
        return pack_n_of_m(kernel, pattern.n, pattern.m)
