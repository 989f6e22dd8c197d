"""Rotation of the residual stream: the basis in which activation sparsity is then chosen; by itself it changes nothing.

Acts on the weights around every stretch of the residual stream (`compress.transforms`): after the gains of norms are folded,

    readers  W <- Q^T W,   writers  W <- W Q',   skip path  h <- h (Q^T Q'),   embedding  E <- E Q_0,   head  W <- Q_last^T W

so that what q, k, v or gate, up read is x Q. Bases, of D x D:

    pca        eigenvectors of C = mean x^T x of what is read: "La RoSA: enhancing LLM efficiency via layerwise rotated sparse
               activation" (Liu et al., 2025, arXiv 2507.01299). In no orthogonal basis do the k largest variances hold more.
    wina       left singular vectors of the kernels of k and of gate: "WINA: weight informed neuron activation" (Chen et al.,
               2025, arXiv 2505.19427); in that basis their rows are orthogonal. With grouped queries k has G K < D columns, so
               the other D - G K directions are arbitrary for q and v.
    weights    the same of all readers together, [q, k, v] and [gate, up]
    hadamard   random signs and a Hadamard matrix, as "QuaRot" (Ashkboos et al., 2024, arXiv 2404.00456): evens variances out
    random     a uniformly drawn rotation: the control

`per` says which stretches share a basis: each `segment` has its own (attention and FFN; 2 maps D x D a block on the skip
paths), a `layer` has one, found for its attention (La RoSA as released; 1 map a block), or the whole `model` (no map). Maps
count as bytes read per token. The last FFN's basis is the head's too, which saves a map.
Not here: WINA's released code also subtracts the embedding's mean, which changes the function of RMSNorm models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.compress.basis import eigenbasis, hadamard_basis, random_basis
from sparsejax.compress.blocks import Blocks, taps
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.recipe import STRUCTURE, Pass, Tier, Work
from sparsejax.compress.scaling import note_equivalence
from sparsejax.compress.statistics import second_moment
from sparsejax.compress.transforms import check_mergeable, folded_kernels, merge_bases
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_map import Stretch
from sparsejax.plugs import check_choice, register

FITTED, FIXED = ("pca", "wina", "weights"), ("hadamard", "random")
SHARING = ("segment", "layer", "model")
_WINA = (".k", ".gate")  # whose kernels `wina` decomposes; `up` of an FFN without a gate
_AFTER_ATTENTION = "residual.attn"


@register("pass", "rotate")
@dataclass
class Rotate(Pass):
    """Options: see the module's docstring.

    per: segment | layer | model; "": segment for a fitted basis, model for a fixed one.
    seed: of the fixed bases.
    """

    basis: str = "pca"
    per: str = ""
    seed: int = 0
    stage: ClassVar[str] = STRUCTURE
    levels_share: ClassVar[bool] = True

    @property
    def sharing(self) -> str:
        return self.per or ("segment" if self.basis in FITTED else "model")

    def check(self, config: ModelConfig) -> None:
        check_choice("basis", self.basis, FITTED + FIXED)
        check_choice("per", self.sharing, SHARING)
        check_mergeable(config)

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        tokens = f", {tier.sequences * tier.length} tokens through each" if self.basis == "pca" else ""
        return f"{config.num_layers} blocks in a new basis, float64{tokens}"

    def apply(self, model: Model, work: Work) -> Model:
        stretches = check_mergeable(model.config)[:-1]
        fixed = self.basis in FIXED
        bases = self._fixed(stretches, model.config) if fixed else self._fitted(stretches, model, work)
        bases["head"] = bases[stretches[-1].name]
        rotated = merge_bases(model, bases)
        if self.sharing == "model":  # maps of skip paths round anew in every block, which a narrow model sums up
            note_equivalence(work, self.name, model, rotated)
        maps = [value for path, value in jax.tree_util.tree_leaves_with_path(rotated.values) if "map" in str(path[-1])]
        work.note("rotate", basis=self.basis, per=self.sharing, maps=sum(a.size for a in maps) // model.config.d_model**2,
                  map_bytes=sum(a.nbytes for a in maps))
        return rotated

    def _fixed(self, stretches: list[Stretch], config: ModelConfig) -> dict[str, np.ndarray]:
        draw = hadamard_basis if self.basis == "hadamard" else random_basis
        groups = list(dict.fromkeys(self._group(one) for one in stretches))
        drawn = {group: draw(config.d_model, self.seed + number) for number, group in enumerate(groups)}
        return {one.name: drawn[self._group(one)] for one in stretches}

    def _fitted(self, stretches: list[Stretch], model: Model, work: Work) -> dict[str, np.ndarray]:
        stream = _Stream(model, work.calibration) if self.basis == "pca" else None
        pooled, bases = np.zeros((model.config.d_model,) * 2), {}

        def moments(layer: int) -> dict[str, np.ndarray]:
            here = [one for one in stretches if _layer(one) == layer]
            here = here[:1] if self.sharing == "layer" else here
            if stream is not None:
                found = stream.moments(layer, here)
            else:
                found = {one.name: self._weight_moment(model, one) for one in here}
            return found if self.sharing == "model" else {name: eigenbasis(moment) for name, moment in found.items()}

        for layer in work.layers(f"{self.basis} basis", model.config.num_layers):
            found = work.piece(f"basis-{layer}", lambda layer=layer: moments(layer))  # type: ignore[misc]
            if self.sharing == "model":
                pooled += sum(found.values())
            else:
                bases.update({one.name: found.get(one.name, next(iter(found.values())))
                              for one in stretches if _layer(one) == layer})
        return bases if self.sharing != "model" else dict.fromkeys((one.name for one in stretches), eigenbasis(pooled))

    def _group(self, stretch: Stretch) -> Any:
        return {"segment": stretch.name, "layer": _layer(stretch), "model": ""}[self.sharing]

    def _weight_moment(self, model: Model, stretch: Stretch) -> np.ndarray:
        """W W^T of the kernels that decide."""
        folded = folded_kernels(model, stretch)
        kernels = {site: w for site, w in folded.items() if not site.endswith((".router", ".shared_gate"))}
        if self.basis == "wina":
            named = {site: w for site, w in kernels.items() if site.endswith(_WINA)}
            gated = any(site.endswith(".gate") for site in named)
            kernels = {site: w for site, w in kernels.items() if site in named or (site.endswith(".up") and not gated)}
        flat = (w.reshape(-1, *w.shape[-2:]) for w in kernels.values())
        return sum(np.einsum("eio,ejo->ij", w, w, optimize=True) for w in flat)


def _layer(stretch: Stretch) -> int:
    return int(stretch.name.split(".")[1])


class _Stream:
    """The residual stream of the dense model on the calibration tokens, one block at a time; lazy."""

    def __init__(self, model: Model, calibration: Calibration):
        self.blocks, self.calibration, self.config = Blocks(model), calibration, model.config
        self.entering: tuple[int, Any] | None = None

    def moments(self, layer: int, stretches: list[Stretch]) -> dict[str, np.ndarray]:
        """C of what the readers of a layer's stretches see through norms of gain one; layers in ascending order."""
        at, h = self.entering or (0, self.blocks.embed(jnp.asarray(self.calibration.tokens)))
        while at < layer:
            (h, _), at = self.blocks.run(at, h), at + 1
        left, stats = self.blocks.run(layer, h, probes=taps(_AFTER_ATTENTION))
        self.entering = layer + 1, left
        after = stats[_AFTER_ATTENTION]["value"].value if _AFTER_ATTENTION in stats else None
        read = [h, after][: len(stretches)]
        skip = self.calibration.spec.skip_first
        return {one.name: second_moment(self._normed(x), skip) for one, x in zip(stretches, read, strict=True)}

    def _normed(self, h: Any) -> Any:
        norm, wide = self.config.norm, jnp.asarray(h, jnp.float32)
        if norm.kind == "none":
            return wide
        if norm.kind == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + norm.epsilon)
