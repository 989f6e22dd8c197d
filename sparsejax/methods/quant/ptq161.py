"""PTQ1.61: a fifth of the input channels in 4 bits, the signs alone of all others, with scales that are learned block by block.

"PTQ1.61: Push the Real Limit of Extremely Low-Bit Post-Training Quantization Methods for Large Language Models" (Zhao et al.,
2025, arXiv 2502.13179). Acts on the kernels W[in, out] of linear maps. Salient are the inputs k of largest max |x_k| over the
calibration; with mu_n and alpha_n the means of w and |w - mu| over the inputs that are not, of output n,

    salient k   w^_kn = (q_kn - z_n) s_n                                          asymmetric, the range that of all inputs and 0
    other k     w^_kn = (sign(w_kn - mu_n) alpha_n + mu_n) r1_n r2_k
    min over alpha, r1, r2 of sum over t of mean (B - t)^2 - log cos(B, t)          t = B(h), B(h^) of the float block

by Adam, B the block with W^ on h^, which enters it in the rounded model. A block whose loss did not fall keeps its start.
Stored as planes of bits: one plane holds a bit of every weight, a sign or the highest bit of a code, and the three low bits of
salient codes lie apart: 1.6 bits a weight and the vectors. Which inputs are salient is stored as r2 = 0.
Published: a fifth salient; rates 5e-4 (alpha) and 1e-3; 20 epochs over 128 x 2,048 tokens. Not here: the preprocessing, a LoRA
of 20,000 steps that concentrates rows of the weights before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.compress.block_learning import BlockLearning, Params, in_turn, mean_square
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.packed import check_kernels, float_kernel, with_qtensors
from sparsejax.compress.recipe import FORMATS, Pass, Tier, Work
from sparsejax.compress.statistics import channel_ranges
from sparsejax.compress.surgery import Placed, place
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS, batches_of, maps_of, with_kernels
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.nnx_compat import Weight, weight
from sparsejax.ops.formats.quantize import encode, qparams
from sparsejax.ops.formats.scales import QParams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, register
from sparsejax.quantized_arrays import QTensor, packed

SIGNS, CODES, LOW = FormatSpec("binary"), FormatSpec("int4", symmetric="asym"), FormatSpec("int3", symmetric="asym", zero="min")
RATES = {"alpha": 5e-4, "r1": 1e-3, "r2": 1e-3}
LEAST_COSINE = 1e-6


@register("weight_op", "salient_planes")
@dataclass(frozen=True)
class SalientPlanes:
    """W^ of the module docstring from its planes, the kernel being that of all weights; `count` inputs are salient."""

    merged: ClassVar[bool] = True  # without the op the kernel is that of another function

    count: int

    def __post_init__(self) -> None:
        check(self.count >= 1, "salient_planes: count", self.count, "must be at least 1")

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """low [count, out], a QTensor in its place; mean [out], mu r1; factor [in], r2, and 0 of salient inputs."""
        *_, rows, columns = shape
        check(self.count <= rows, "salient_planes: count", self.count, f"is above the {rows} inputs of the map")
        return {
            "low": weight(jnp.zeros((self.count, columns), jnp.float32), (None, axes[-1]), "adapter"),
            "mean": weight(jnp.zeros((columns,), jnp.float32), (axes[-1],), "fitted"),
            "factor": weight(jnp.ones((rows,), jnp.float32), (axes[-2],), "fitted"),
        }

    def __call__(self, arrays: dict[str, Any], w: Any, ctx: Context) -> Float[Array, "in out"]:
        low = arrays["low"]
        whole = isinstance(w, QTensor) and isinstance(low, QTensor) and w.spec == SIGNS and low.spec == LOW
        check(whole, "salient_planes: kernel", type(w).__name__, f"expected planes of bits, {SIGNS} and {LOW}")
        factor = arrays["factor"]
        rows = jnp.nonzero(factor == 0, size=self.count)[0]
        rest = factor[:, None] * (w.dequantize().astype(jnp.float32) + arrays["mean"][None])
        high = 8 * low.scale * w.unpacked()[rows].astype(jnp.float32)
        return rest.at[rows].set(low.dequantize().astype(jnp.float32) + high).astype(w.dtype)


def salient_inputs(magnitude: Float[np.ndarray, " in"], share: float) -> Int[np.ndarray, " count"]:
    """The inputs of largest max |x|, in rising order; at least one."""
    count = max(1, round(share * len(magnitude)))
    return np.sort(np.argsort(-np.asarray(magnitude), kind="stable")[:count])


def start_of(kernel: Float[np.ndarray, "in out"], salient: Int[np.ndarray, " count"]) -> tuple[dict[str, Array], Params]:
    """(what is fixed of a map, the parameters that it starts with): see `rounded`."""
    w = np.asarray(kernel, np.float32)
    others = np.ones(len(w), bool)
    others[salient] = False
    mean = w[others].mean(0) if others.any() else np.zeros(w.shape[1], np.float32)
    alpha = np.abs(w[others] - mean).mean(0) if others.any() else np.zeros(w.shape[1], np.float32)
    coding = qparams(jnp.asarray(w), CODES)
    codes = encode(jnp.asarray(w), coding, CODES)
    fixed = {
        "signs": jnp.asarray(np.where(w >= mean, 1, -1), jnp.float32),
        "mean": jnp.asarray(mean),
        "others": jnp.asarray(others, jnp.float32),
        "codes": codes,
        "scale": coding.scale,
        "zero": jnp.asarray(coding.zero, jnp.float32),
    }
    ones = {"r1": jnp.ones(w.shape[1], jnp.float32), "r2": jnp.ones(len(w), jnp.float32)}
    return fixed, {"alpha": jnp.asarray(alpha, jnp.float32), **ones}


def rounded(fixed: Mapping[str, Array], params: Params) -> Float[Array, "in out"]:
    """W^, float32, with gradients for alpha [out], r1 [out] and r2 [in]."""
    r1, others = params["r1"][None], fixed["others"][:, None]
    binary = (fixed["signs"] * (params["alpha"][None] * r1) + fixed["mean"][None] * r1) * params["r2"][:, None]
    salient = (fixed["codes"].astype(jnp.float32) - fixed["zero"]) * fixed["scale"]
    return others * binary + (1 - others) * salient


def planes(fixed: Mapping[str, Array], params: Params, dtype: Any) -> tuple[QTensor, dict[str, Any]]:
    """(the plane of all weights, the arrays of `SalientPlanes`) that stand for `rounded`."""
    codes, others = np.asarray(fixed["codes"]), np.asarray(fixed["others"]) > 0
    scale, zero, r1 = fixed["scale"], fixed["zero"], params["r1"]
    bits = np.where(others[:, None], np.asarray(fixed["signs"]) > 0, codes >> 3).astype(np.uint8)
    plane = packed(jnp.asarray(bits), QParams((params["alpha"] * r1)[None]), SIGNS, (codes.shape[0], codes.shape[1]), dtype)
    kept = codes[~others] & 7
    low = packed(jnp.asarray(kept), QParams(scale, -zero * scale), LOW, (kept.shape[0], kept.shape[1]), dtype)
    factor = np.asarray(params["r2"])
    factor = np.where(others, np.where(factor == 0, np.finfo(np.float32).tiny, factor), 0).astype(np.float32)
    return plane, {"low": low, "mean": fixed["mean"] * r1, "factor": jnp.asarray(factor)}


def block_loss(given: Float[Array, "B T D"], targets: tuple[Array, ...]) -> Array:
    """Mean squared error and -log cosine by token, summed over targets."""
    norms = [jnp.linalg.norm(part, axis=-1) for part in (given, *targets)]
    cosines = [jnp.sum(given * target, -1) / jnp.maximum(norms[0] * norm, 1e-30)
               for target, norm in zip(targets, norms[1:], strict=True)]  # fmt: skip
    logs = sum((-jnp.mean(jnp.log(jnp.maximum(one, LEAST_COSINE))) for one in cosines), jnp.zeros(()))
    return mean_square(given, targets) + logs


@dataclass
class Ptq161(Pass):
    """salient: share of the inputs in 4 bits; epochs: of the learning; sites: the maps."""

    salient: float = 0.2
    epochs: int = 20
    sites: str = ALL_MAPS
    stage: ClassVar[str] = FORMATS

    def check(self, config: ModelConfig) -> None:
        check(0 < self.salient <= 1, "ptq161: salient", self.salient, "must be in (0, 1]")
        check(self.epochs >= 1, "ptq161: epochs", self.epochs, "must be at least 1")
        maps_of(config, self.sites)

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        check_kernels(model, maps_of(model.config, self.sites))

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x {self.epochs} x {tier.sequences} steps of {tier.length:,} tokens"

    def apply(self, model: Model, work: Work) -> Model:
        sites = maps_of(model.config, self.sites)
        ranges = channel_ranges(Blocks(model), work, sites)
        salient = {site: salient_inputs(ranges[site].magnitude, self.salient) for site in sites}
        learning = BlockLearning(model, rounded, RATES, self.epochs, work.calibration.spec.skip_first, block_loss)
        blocks = learning.blocks
        # Of the float and of the rounded model, float[sequences, T, D].
        exact = entering = jnp.concatenate([blocks.embed(tokens) for tokens in batches_of(work.calibration)])
        found: dict[str, Any] = {}
        for layer in work.layers(self.name, len(blocks)):
            here = {site: salient[site] for site in sites if site.split(".")[1] == str(layer)}
            targets = in_turn(blocks, layer, exact), in_turn(blocks, layer, entering)
            learn = functools.partial(self._block, learning, model, layer, here, entering, targets)
            made = work.piece(f"block{layer}", learn) if here else {}
            kernels = {site: SalientPlanes(len(here[site]))(_arrays(made, site), made[site], Context()) for site in here}
            exact, entering = targets[0], in_turn(blocks, layer, entering, with_kernels(blocks.values(layer), kernels))
            found |= made
        self._note(work, model, sites, found, len(blocks))
        plan = {site: Placed(f"salient_planes:{len(salient[site])}", _arrays(found, site)) for site in sites}
        return place(with_qtensors(model, {site: found[site] for site in sites}), "weights", plan)

    def _block(
        self,
        learning: BlockLearning,
        model: Model,
        layer: int,
        salient: Mapping[str, np.ndarray],
        entering: Array,
        targets: tuple[Array, ...],
    ) -> dict[str, Any]:
        """The plane of each site, `SITE:low`, `SITE:mean`, `SITE:factor`, and the losses `start:LAYER`, `learned:LAYER`."""
        made = {site: start_of(np.asarray(float_kernel(model, site), np.float32), rows) for site, rows in salient.items()}
        fixed = {site.split(".", 2)[2]: one for site, (one, _) in made.items()}
        start = {site.split(".", 2)[2]: one for site, (_, one) in made.items()}
        learned = learning.learn(layer, fixed, start, entering, targets)
        before, after = (learning.mean_loss(layer, fixed, one, entering, targets) for one in (start, learned))
        best, kept = (learned, after) if after < before else (start, before)  # also where it is no number
        found: dict[str, Any] = {f"start:{layer}": np.float64(before), f"learned:{layer}": np.float64(kept)}
        for site in salient:
            local, dtype = site.split(".", 2)[2], model.parameter(f"{site}.kernel").dtype
            found[site], arrays = planes(fixed[local], best[local], dtype)
            found |= {f"{site}:{name}": value for name, value in arrays.items()}
        return found

    def _note(self, work: Work, model: Model, sites: Sequence[str], found: Mapping[str, Any], layers: int) -> None:
        shapes = rule_sites(model.config)["weights"]
        stored = sum(part.nbytes for site in sites for part in (found[site], *_arrays(found, site).values()))
        weights = sum(int(np.prod(shapes[site])) for site in sites)
        losses = {name: [float(found[f"{name}:{layer}"]) for layer in range(layers) if f"{name}:{layer}" in found]
                  for name in ("start", "learned")}  # fmt: skip
        before = sum(float_kernel(model, site).nbytes for site in sites)
        work.note(self.name, bytes=stored, bytes_before=before, bits_per_weight=8 * stored / weights, block_losses=losses)


def _arrays(found: Mapping[str, Any], site: str) -> dict[str, Any]:
    kept = {name: found[f"{site}:{name}"] for name in ("low", "mean", "factor")}
    return {name: value if isinstance(value, QTensor) else jnp.asarray(value) for name, value in kept.items()}
