"""Changes of basis between v and o, one for each key-value head, merged into the kernels: the model computes the same function.

    v head g  W <- W M_g,  b <- b M_g        o, of every query head that reads g  W <- M_g^-1 W

Attention takes means of a head's values over tokens, so any invertible M_g [K, K] passes through it, whatever the pattern, the
norms of queries and keys, or positions (QuaRot's and SpinQuant's R2, arXiv 2404.00456, 2405.16406; with a diagonal factor
OSTQuant's pair, 2501.13987). Query heads that share a key-value head share its basis. All is float64, rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sparsejax.compress.packed import float_kernel
from sparsejax.compress.surgery import chain_at
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_map import parameter_axes
from sparsejax.plugs import check

LARGEST_CONDITION = 1e6  # of M_g: beyond it the inverse rounds away what the model computes


def check_heads(config: ModelConfig) -> None:
    """Refuse a model between whose v and o no basis can be merged.

    Raises:
      ConfigError: no decoder, or the site at which an op is fitted to the present basis.
    """
    check(config.kind == "decoder", "model.kind", config.kind, "expected a decoder")
    for layer in range(config.num_layers):
        for field, name in (("weights", "v"), ("weights", "o"), ("inputs", "o")):
            site = f"blocks.{layer}.attn.{name}"
            ops = "|".join(chain_at(config, field, site))
            check(not ops, f"{site}: model.{field}", ops, "is not linear, or is fitted to the present basis of the heads; "
                  "change the basis first")


def merge_heads(model: Model, bases: Mapping[int, Float[np.ndarray, "G K K"]]) -> Model:
    """The same function with the values of heads in other bases: a row v becomes v M.

    Args:
      bases: by layer, of its key-value heads; invertible.
    Raises:
      ConfigError: see `check_heads`; a layer that the model lacks, another shape, a matrix that cannot be inverted, a packed
        kernel.
    """
    check_heads(model.config)
    a, names, arrays = model.config.attention, set(parameter_axes(model.config)), {}
    groups, size, heads = a.num_kv_heads, a.head_dim, a.num_heads // a.num_kv_heads
    for layer, given in bases.items():
        where = f"basis of the heads of layer {layer}"
        check(0 <= layer < model.config.num_layers, "bases", layer, f"the model has {model.config.num_layers} layers")
        check(np.shape(given) == (groups, size, size), where, np.shape(given), f"must be {(groups, size, size)}")
        basis = np.asarray(given, np.float64)
        condition = float(np.max(np.linalg.cond(basis))) if np.all(np.isfinite(basis)) else np.inf
        check(condition < LARGEST_CONDITION, where, condition, f"has a condition number above {LARGEST_CONDITION:g}")
        v, o = (f"blocks.{layer}.attn.{name}" for name in "vo")
        arrays[f"{v}.kernel"] = _turned(np.asarray(float_kernel(model, v), np.float64), basis)
        if f"{v}.bias" in names:
            arrays[f"{v}.bias"] = _turned(np.asarray(model.parameter(f"{v}.bias"), np.float64), basis)
        rows = np.asarray(float_kernel(model, o), np.float64).reshape(groups, heads, size, -1)
        arrays[f"{o}.kernel"] = np.einsum("gjk,ghkd->ghjd", np.linalg.inv(basis), rows).reshape(heads * groups * size, -1)
    cast: dict[str, Any] = {name: jnp.asarray(value, model.parameter(name).dtype) for name, value in arrays.items()}
    return model.rebuilt(model.config, cast)


def _turned(values: Float[np.ndarray, "... V"], basis: Float[np.ndarray, "G K K"]) -> np.ndarray:
    """What v gives (its bias, or each row of its kernel), head by head in the basis."""
    split = values.reshape(*values.shape[:-1], *basis.shape[:2])
    return np.einsum("...gk,gkj->...gj", split, basis).reshape(values.shape)
