"""Changes of basis of the residual stream, merged into the weights around it: the model computes the same function.

    folding    W <- diag(g) W,  b <- b + beta W    every reader W of a norm with gain g and bias beta; then g = 1, beta = 0
    centring   W <- W (I - 1 1^T / D)              every writer of a LayerNorm model: x has mean 0, LayerNorm is RMSNorm
    rotation   readers  W <- Q^T W,   writers  W <- W Q',   tables  E <- E Q',   skip path  h <- h (Q^T Q')

with Q the orthogonal basis of the stretch that is read and Q' that of the stretch written to (`models.site_map`). RMSNorm of
gain one commutes with a rotation: rms(h Q) = rms(h). Biases of writers are written as their kernels are, learned scales of
writers are multiplied in, a tied head gets a kernel of its own. All is float64, rounded once to the dtype of the parameter.
Folding and rotation as in SliceGPT (arXiv 2401.15024) and QuaRot (arXiv 2404.00456).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.arrays import matmul
from sparsejax.compress.surgery import Placed, chain_at, place
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_map import Stretch, parameter_axes, residual_stream
from sparsejax.models.site_rules import rule_sites
from sparsejax.nnx_compat import Weight, weight
from sparsejax.plugs import ConfigError, check, register

ORTHOGONAL = 1e-6  # largest entry of |Q^T Q - I|


@register("activation_op", "map")
@dataclasses.dataclass(frozen=True)
class SkipMap:
    """x @ map, a dense map [D, D] on a skip path: the change from one basis to the next.

    merged: the kernels are those of the bases, so that without the op the model is another function.
    """

    merged: ClassVar[bool] = True

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """The map, at first the identity."""
        return {"map": weight(jnp.eye(shape[-1], dtype=jnp.float32), (axes[-2], axes[-1]), "adapter")}

    def validate(self, features: int, field: str) -> None:
        """Any width will do; the map is square, so it fits skip paths alone."""
        if field.startswith("model.inputs"):
            raise ConfigError(f"{field}: map acts on skip paths, `model.residuals`")

    def __call__(self, arrays: dict[str, Array], x: Float[Array, "... D"], ctx: Context) -> Float[Array, "... D"]:
        # The whole stream passes every map: the default precision of GPU and TPU products would add up over the layers.
        with jax.default_matmul_precision("float32"):
            return matmul(x, arrays["map"])


def check_mergeable(config: ModelConfig) -> list[Stretch]:
    """The stretches of the residual stream, if a basis can be merged into every one of them.

    Raises:
      ConfigError: the site and why not: see `residual_stream`, or an op acts there, so that the reader or writer is not linear.
    """
    stretches = residual_stream(config)
    readers = {site for stretch in stretches for read in stretch.reads for site in read.linears}
    for field, sites in rule_sites(config).items():
        for site in sites:
            ops = "|".join(chain_at(config, field, site))
            linear = not ops or (field == "inputs" and site not in readers)
            check(linear, f"{site}: model.{field}", ops, "what acts here is not linear, or was fitted in the present basis of "
                  "the residual stream; change the basis first")
    return stretches


def fold_norms(model: Model) -> Model:
    """The model with gains and biases of its norms folded into their readers, LayerNorm as RMSNorm, and a head of its own.

    Raises:
      ConfigError: see `check_mergeable`.
    """
    return merge_bases(model, {})


def merge_bases(model: Model, bases: Mapping[str, np.ndarray]) -> Model:
    """The same function with stretches of its residual stream in other bases.

    Args:
      bases: orthogonal float64 [D, D] by stretch (`site_map.Stretch.name`): h becomes h Q; others stay. A skip path gets a map
        where the bases of its two ends differ.
    Raises:
      ConfigError: see `check_mergeable`; a stretch that the model lacks, a basis that is not orthogonal.
    """
    stretches = check_mergeable(model.config)
    names = [stretch.name for stretch in stretches]
    unknown = sorted(set(bases) - set(names))
    check(not unknown, "bases", unknown[:4], f"are no stretches of the residual stream; they are {names[0]} to {names[-1]}")
    for name, basis in bases.items():
        check_orthogonal(name, basis, model.config.d_model)
    merging = _Merging(model)
    for stretch in stretches:
        merging.write(stretch, bases.get(stretch.name))
        merging.read(stretch, bases.get(stretch.name))
    merged = model.rebuilt(merging.config, {name: jnp.asarray(value) for name, value in merging.new.items()})
    maps = {}
    for before, after in zip(stretches[:-1], stretches[1:], strict=True):
        change = basis_change(bases.get(before.name), bases.get(after.name))
        if change is not None:
            maps[before.skip] = Placed("map", {"map": jnp.asarray(change, merging.dtype)})
    return place(merged, "residuals", maps) if maps else merged


def check_orthogonal(name: str, basis: np.ndarray, width: int) -> None:
    """Raise a ConfigError, naming the stretch, unless basis is an orthogonal [width, width]."""
    check(np.shape(basis) == (width, width), f"basis of {name}", np.shape(basis), f"must be [{width}, {width}]")
    error = float(np.abs(basis.T @ basis - np.eye(width)).max())
    check(error < ORTHOGONAL, f"basis of {name}", error, f"|Q^T Q - I| must stay below {ORTHOGONAL}")


def basis_change(before: np.ndarray | None, after: np.ndarray | None) -> np.ndarray | None:
    """Q^T Q', the map from one basis to the next; None where it is the identity. A missing basis is the identity."""
    if before is after or (before is not None and after is not None and np.array_equal(before, after)):
        return None
    if before is None:
        return after
    return before.T if after is None else before.T @ after


def folded_kernels(model: Model, stretch: Stretch) -> dict[str, np.ndarray]:
    """float64 kernels [..., D, out] of the readers of a stretch by site, with the gains in front of them folded in."""
    merging = _Merging(model)
    return {site: merging.gain(read.norm)[:, None] * merging.kernel(site) for read in stretch.reads for site in read.linears}


class _Merging:
    """New values of a model's parameters, on the host: computed in float64 one at a time, kept in the dtype of the old ones."""

    def __init__(self, model: Model):
        self.model, self.names = model, set(parameter_axes(model.config))
        old = model.config
        self.layer_norm, self.plus_one = old.norm.kind == "layer", old.norm.plus_one
        self.tied = "head.kernel" not in self.names
        self.dtype = self._get("embed.table").dtype
        self.new: dict[str, np.ndarray] = {}
        biased = self.layer_norm and old.norm.bias
        norm = dataclasses.replace(old.norm, kind="rms" if self.layer_norm else old.norm.kind, bias=False)
        self.config = dataclasses.replace(
            old,
            norm=norm,
            tied_embeddings=False,
            layer_scale=0.0,
            head_bias=old.head_bias or biased,
            attention=dataclasses.replace(old.attention, bias=old.attention.bias or biased),
            ffn=dataclasses.replace(old.ffn, bias=old.ffn.bias or biased),
        )

    def _get(self, name: str) -> Any:
        value = self.model.parameter(name)
        check(isinstance(value, np.ndarray | jax.Array), name, type(value).__name__, "is packed; rotate before quantizing")
        return value

    def _wide(self, name: str) -> np.ndarray:
        return np.asarray(self._get(name)).astype(np.float64)

    def kernel(self, site: str) -> np.ndarray:
        return self._wide("embed.table").T if site == "head" and self.tied else self._wide(f"{site}.kernel")

    def gain(self, norm: str) -> np.ndarray:
        if f"{norm}.gain" not in self.names:
            return np.ones(self.model.config.d_model)
        return self._wide(f"{norm}.gain") + self.plus_one

    def write(self, stretch: Stretch, basis: np.ndarray | None) -> None:
        """What is added at the beginning of a stretch, in its basis."""
        for site, scale in stretch.writers:
            for name in (site, f"{site}.kernel", f"{site}.bias"):
                if name in self.names:
                    value = self._wide(name)
                    value = value * self._wide(scale) if scale else value
                    value = value - value.mean(-1, keepdims=True) if self.layer_norm else value
                    self._keep(name, value if basis is None else value @ basis)
            if self.config.ffn.bias and ".mlp." in site and f"{site}.bias" not in self.names:
                self._keep(f"{site}.bias", np.zeros((*self._get(f"{site}.kernel").shape[:-2], self.model.config.d_model)))

    def read(self, stretch: Stretch, basis: np.ndarray | None) -> None:
        """What reads a stretch, with the norm in front of it folded in."""
        for read in stretch.reads:
            gain = self.gain(read.norm)
            shift = self._wide(f"{read.norm}.bias") if f"{read.norm}.bias" in self.names else None
            for site in read.linears:
                kernel = self.kernel(site)
                folded = gain[:, None] * kernel
                self._keep(f"{site}.kernel", folded if basis is None else basis.T @ folded)
                self._bias(site, None if shift is None else shift @ kernel, kernel)
            if f"{read.norm}.gain" in self.names:
                self._keep(f"{read.norm}.gain", np.full(len(gain), 0.0 if self.plus_one else 1.0))

    def _bias(self, site: str, shift: np.ndarray | None, kernel: np.ndarray) -> None:
        """The bias of a reader, with what the norm's bias adds to it."""
        stored = "head_bias" if site == "head" and self.tied else f"{site}.bias"
        had = stored in self.names
        if shift is None and not had:
            return
        without = site.endswith((".router", ".shared_gate"))
        check(shift is None or not without or not shift.any(), site, "no bias", "cannot take up the bias of the norm before it")
        if not without:
            base = self._wide(stored) if had else np.zeros((*kernel.shape[:-2], kernel.shape[-1]))
            self._keep(f"{site}.bias", base if shift is None else base + shift)

    def _keep(self, name: str, value: np.ndarray) -> None:
        self.new[name] = value.astype(self._get(name).dtype if name in self.names else self.dtype)
