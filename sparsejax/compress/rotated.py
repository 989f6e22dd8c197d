"""A model in bases that are still being learned: its parameters as a differentiable function of rotations and scales.

    stream  R [D, D]          readers  R^T W,  writers  W R,  tables  E R                         (QuaRot's R1)
    heads   M [L, G, K, K]    v  W M_g,   o  M_g^-1 W,   M_g = R_g diag(1 / s_g)                  (R2)
    scales  s = exp(free)     norms  gain / s,  readers  diag(s) W;   up  W / s,  down  diag(s) W
    online  H                 h <- h H,   down  H^T W                                             (R4)

`Rotated` computes this in float32 under a trace, for objectives; `merge_rotations` merges what was found in float64 with the
functions that fixed rotations use (`transforms`, `head_bases`, `scaling`, `hadamard`). The names of scales are those of
`scaling.Pair` without their layer: attn_norm, mlp_norm, mlp.up; and attn.v for those of heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax import nnx_compat
from sparsejax.compress.hadamard import hadamard_transform, rotate_online
from sparsejax.compress.head_bases import merge_heads
from sparsejax.compress.scaling import merge_scales, scaled_pairs
from sparsejax.compress.surgery import Placed, place
from sparsejax.compress.transforms import merge_bases
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.io.name_map import parameter_slots
from sparsejax.models.site_map import residual_stream

STREAM, HEADS, VALUES = "stream", "heads", "attn.v"
Arrays = Mapping[str, Any]


def free_scales(folded: Model) -> dict[str, np.ndarray]:
    """Zeros of the logarithms of all scales that can be moved, float32 [L, channels] by name; of heads [L, G, K].

    Args:
      folded: `transforms.fold_norms` of a model.
    """
    config = folded.config
    a, layers = config.attention, config.num_layers
    found = {VALUES: np.zeros((layers, a.num_kv_heads, a.head_dim), np.float32)}
    pairs, _ = scaled_pairs(config)
    for name in ("attn_norm", "mlp_norm", "mlp.up"):
        if sum(pair.producer.split(".", 2)[2] == name for pair in pairs) == layers:
            width = config.ffn.hidden if name == "mlp.up" else config.d_model
            found[name] = np.zeros((layers, width), np.float32)
    return found


class Rotated:
    """A folded model with ops at its maps, as a function of its bases."""

    def __init__(
        self,
        folded: Model,
        online: Sequence[str] = (),
        inputs: Mapping[str, str] = {},
        weights: Mapping[str, str] = {},
    ):
        """Place the ops.

        Args:
          folded: `transforms.fold_norms` of the model.
          online: sites with an online Hadamard transform.
          inputs, weights: activation and weight ops without arrays by site, e.g. those that round.
        """
        model = place(folded, "inputs", dict.fromkeys(online, Placed("hadamard"))) if online else folded
        for field, ops in (("inputs", inputs), ("weights", weights)):
            model = place(model, field, {site: Placed(op) for site, op in ops.items()}) if ops else model
        self.model, self.online = model, set(online)
        stretches = residual_stream(folded.config)
        self._norms = {site: read.norm for stretch in stretches for read in stretch.reads for site in read.linears}
        self._writers = {writer.site for stretch in stretches for writer in stretch.writers}
        self._names: dict[tuple[str, ...], list[str]] = {}
        slots = parameter_slots(model.module(), model.structure.paths)
        for name, slot in sorted(slots.items(), key=lambda item: item[1].row or 0):
            self._names.setdefault(slot.path, []).append(name)

    def logits(self, rotations: Arrays, free: Arrays, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Of the model with its ops, gradients passing straight through what rounds; traceable.

        Args:
          rotations: `stream` and `heads`.
          free: logarithms of scales by name, any of `free_scales`.
        """
        module = nnx_compat.merge(self.model.structure, self.values(rotations, free))
        return module({"tokens": tokens}, Context(mode="train"))[0]

    def values(self, rotations: Arrays, free: Arrays) -> dict[str, Any]:
        """The parameters in these bases."""
        turned: dict[str, Any] = {}
        for path, names in self._names.items():
            value = nnx_compat.at(self.model.values, path)
            nnx_compat.put(turned, path, self._turned(names, value, rotations, free).astype(value.dtype))
        return turned

    def _turned(self, names: list[str], value: Array, rotations: Arrays, free: Arrays) -> Array:
        """One stored array, [layers, ...] where it is of blocks."""
        site, _, leaf = names[0].rpartition(".")
        local = site.split(".", 2)[2] if site.startswith("blocks.") else site
        rows = np.array([int(name.split(".")[1]) for name in names]) if site.startswith("blocks.") else None
        wide, kernel = value.astype(jnp.float32), leaf == "kernel"

        def scale(name: str, sign: float, axis: int) -> Array:
            """exp(+-free) of these layers along an axis of `wide`."""
            s = jnp.exp(sign * free[name][rows])
            return s.reshape([len(s), *(s.shape[-1] if i == axis % wide.ndim else 1 for i in range(1, wide.ndim))])

        if kernel and site in self._norms:
            wide = rotations[STREAM].T @ wide
            norm = self._norms[site].split(".", 2)[-1]
            wide = wide * scale(norm, 1.0, -2) if norm in free else wide
        if leaf == "gain" and local in free:
            offset = float(self.model.config.norm.plus_one)
            wide = (wide + offset) * scale(local, -1.0, -1) - offset
        if local in ("attn.v", "attn.o") and (kernel or local == "attn.v"):
            wide = self._by_head(wide, local, rows, rotations, free)
        if local == "mlp.up" and "mlp.up" in free:
            wide = wide * scale("mlp.up", -1.0, -1)
        if local == "mlp.down" and kernel and "mlp.up" in free:
            wide = wide * scale("mlp.up", 1.0, -2)
        if kernel and site in self.online:
            wide = hadamard_transform(wide.mT).mT
        return wide @ rotations[STREAM] if names[0] in self._writers or site in self._writers else wide

    def _by_head(self, wide: Array, local: str, rows: Any, rotations: Arrays, free: Arrays) -> Array:
        """Outputs of v times M, or inputs of o times its inverse."""
        bases = rotations[HEADS][rows]
        s = jnp.exp(free[VALUES][rows]) if VALUES in free else jnp.ones(bases.shape[:-1])
        layers, groups, size, _ = bases.shape
        if local == "attn.v":
            split = wide.reshape(layers, -1, groups, size)
            return jnp.einsum("lngk,lgkj->lngj", split, bases / s[..., None, :]).reshape(wide.shape)
        split = wide.reshape(layers, groups, -1, size, wide.shape[-1])
        return jnp.einsum("lgkj,lghkd->lghjd", bases * s[..., None, :], split).reshape(wide.shape)


def merge_rotations(model: Model, rotations: Arrays, free: Arrays, online: Sequence[str] = ()) -> Model:
    """The same function in the bases and with the scales of `Rotated.values`, in float64.

    Raises:
      ConfigError: see `transforms.merge_bases`, `head_bases.merge_heads`, `scaling.merge_scales` and `hadamard.rotate_online`.
    """
    stream = np.asarray(rotations[STREAM], np.float64)
    merged = merge_bases(model, dict.fromkeys((stretch.name for stretch in residual_stream(model.config)), stream))
    scales = {name: np.exp(np.asarray(value, np.float64)) for name, value in free.items()}
    heads = np.asarray(rotations[HEADS], np.float64)
    if VALUES in scales:
        heads = heads / scales.pop(VALUES)[..., None, :]
    merged = merge_heads(merged, dict(enumerate(heads)))
    if scales:
        pairs, _ = scaled_pairs(merged.config)
        by_producer = {f"blocks.{layer}.{name}": s for name, rows in scales.items() for layer, s in enumerate(rows)}
        merged = merge_scales(merged, pairs, by_producer)
    return rotate_online(merged, dict.fromkeys(online, 1)) if online else merged
