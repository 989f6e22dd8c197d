"""LLM-FP4: small floats for weights and inputs, their exponents and ranges searched map by map.

"LLM-FP4: 4-Bit Floating-Point Quantized Transformers" (Liu et al., 2023, arXiv 2310.16836). Acts on the kernels of linear maps,
which become `QTensor`s with a scale per output, and on their inputs, which are rounded with one static scale:

    min over formats and scales of || Q(x 2^o) Q(2^-o W) - x W ||^2        formats E1M2, E2M1, E3M0 of 4 bits (E2M3, E3M2 of 6)
    s = gamma max / (greatest of the format),   gamma = 1, and `steps` values from .2 to 1.2

A real exponent bias b, as the paper has it, is the scale 2^-b. Pre-shifted exponent biases give every input channel a range of
its own without a scale at run time: with b_j the bias of channel j by its largest magnitude and rho = min b_j,

    o_j = clip(round b_j, round rho, round rho + 2^E - 1) - round rho        an integer of E bits: x_j 2^(o_j), W_j 2^(-o_j)

which are powers of two, so that nothing is rounded by them. For each format of the inputs, in turn: formats and scales of the
weights given the inputs, then the scale of the inputs; `ROUNDS` times. All maps are searched on what enters them in the float
model.
Published: 101 values of gamma that multiply b (here they multiply the range, whose direction does not depend on b's sign; and
the start is among them, which is not so there); 32 sequences; embeddings and head in the format too, which are left alone here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.arrays import SparseActivation
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.packed import check_kernels, float_kernel, note_formats, with_qtensors
from sparsejax.compress.recipe import FORMATS, Pass, Tier, Work
from sparsejax.compress.statistics import tensor_of
from sparsejax.compress.surgery import Placed, place
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS, batches_of, maps_of
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Weight, weight
from sparsejax.ops.formats.grids import Floats, grid_of
from sparsejax.ops.formats.quantize import fake, qparams
from sparsejax.ops.formats.scales import QParams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, check_choice, register
from sparsejax.quantized_arrays import QTensor, qtensor

# By bits; where the search starts is first.
CANDIDATES = {
    4: ("fp4_e2m1", "fp4_e1m2", "fp4_e3m0"),
    6: ("fp6_e2m3", "fp6_e3m2"),
    8: ("fp8_e4m3", "fp8_e5m2"),
}
UNROUNDED = 16  # bits of inputs that stay as they are
ROUNDS = 2
SAMPLE = 512  # tokens


@register("activation_op", "exponent_shift")
@dataclasses.dataclass(frozen=True)
class ExponentShift:
    """x_j 2^(o_j): an addition to exponents, for a weight that is divided by the same."""

    merged: ClassVar[bool] = True  # without the op the kernel is that of another function

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """factor [in], powers of two."""
        return {"factor": weight(jnp.ones((shape[-2],), jnp.float32), (axes[-2],), "fitted")}

    def __call__(self, arrays: dict[str, Array], x: Any, ctx: Context) -> Any:
        if isinstance(x, SparseActivation):
            return dataclasses.replace(x, values=self(arrays, x.values, ctx))
        return x * arrays["factor"].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class Fitted(NamedTuple):
    """Of one map.

    Fields:
      weights, inputs: formats; inputs is "" where they stay as they are.
      weight_scale, input_scale: [1, out] and [].
      offsets: o, int [in].
      before, after: squared errors over the square of the outputs, at the start and as found.
    """

    weights: str
    inputs: str
    weight_scale: Array
    input_scale: Array
    offsets: np.ndarray
    before: float
    after: float


def exponent_offsets(magnitude: Float[np.ndarray, " in"], element: str) -> Int[np.ndarray, " in"]:
    """o of the module docstring.

    Args:
      magnitude: max |x| by channel; of channels that are always 0 the offset is the largest.
      element: of the inputs, a small float.
    """
    grid = _floats(element)
    with np.errstate(divide="ignore"):
        bias = -np.log2(np.asarray(magnitude, np.float64) / grid.greatest)
    finite = bias[np.isfinite(bias)]
    least = np.round(finite.min()) if len(finite) else 0.0
    return (np.clip(np.round(bias), least, least + 2**grid.exponent_bits - 1) - least).astype(np.int32)


def _floats(element: str) -> Floats:
    grid = grid_of(element, "narrow")
    assert isinstance(grid, Floats)
    return grid


def factors_of(steps: int) -> np.ndarray:
    """gamma of the module docstring, 1 first: of equals the first is taken."""
    return np.concatenate([[1.0], np.linspace(0.2, 1.2, steps)]).astype(np.float32)


@partial(jax.jit, static_argnames="spec")
def best_weights(x: Array, w: Array, wanted: Array, factors: Array, spec: FormatSpec) -> tuple[Array, Array]:
    """([1, out], the squared error) of the best scale of each output, for inputs x [N, in] as they are rounded."""
    start = qparams(w, spec).scale

    def errors(factor: Array) -> Array:
        return jnp.sum(jnp.square(x @ fake(w, spec, parameters=QParams(start * factor)) - wanted), axis=0)

    found = jax.lax.map(errors, factors)  # [steps, out]
    return start * factors[jnp.argmin(found, axis=0)][None], jnp.sum(jnp.min(found, axis=0))


@partial(jax.jit, static_argnames="spec")
def best_inputs(x: Array, w: Array, wanted: Array, start: Array, factors: Array, spec: FormatSpec) -> tuple[Array, Array]:
    """([], the squared error) of the best scale of the inputs x [N, in], for a kernel w as it is rounded."""

    def error(factor: Array) -> Array:
        return jnp.sum(jnp.square(_rounded(x, start * factor, spec) @ w - wanted))

    found = jax.lax.map(error, factors)
    return start * factors[jnp.argmin(found)], jnp.min(found)


@partial(jax.jit, static_argnames="spec")
def _rounded(x: Array, scale: Array, spec: FormatSpec) -> Array:
    return fake(x, spec, parameters=QParams(scale.reshape(1, -1)))


def search(
    x: Float[Array, "N in"],
    kernel: Float[Array, "in out"],
    magnitude: Float[np.ndarray, " in"],
    *,
    bits: int = 4,
    input_bits: int = 4,
    shift: bool = True,
    steps: int = 40,
) -> Fitted:
    """The formats and scales of a map.

    Args:
      x: a sample of what enters it.
      magnitude: max |x| by channel, of all tokens.
      bits, input_bits: of `CANDIDATES`; input_bits may be `UNROUNDED`.
      shift: whether exponent biases are shifted by channel.
      steps: values of gamma.
    """
    factors, x, w = jnp.asarray(factors_of(steps)), jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    wanted = x @ w
    whole = float(jnp.sum(jnp.square(wanted))) or 1.0
    before, best = np.inf, None
    for inputs in CANDIDATES[input_bits] if input_bits != UNROUNDED else ("",):
        offsets = exponent_offsets(magnitude, inputs) if shift and inputs else np.zeros(len(magnitude), np.int32)
        factor = np.exp2(offsets).astype(np.float32)
        moved, folded = x * factor[None], w / factor[:, None]
        start = jnp.asarray(np.max(magnitude * factor) / (_floats(inputs).greatest if inputs else 1), jnp.float32)
        found = _alternating(moved, folded, wanted, start, bits, inputs, factors)
        first, last = found.before / whole, found.after / whole
        before = first if best is None else before
        if best is None or last < best.after:
            best = found._replace(offsets=offsets, after=last)
    assert best is not None
    return best._replace(before=before)


def _alternating(
    x: Array, w: Array, wanted: Array, scale: Array, bits: int, inputs: str, factors: Array
) -> Fitted:
    """Formats and scales of the weights given the inputs, then the scale of the inputs, in turn."""
    of_x = FormatSpec(inputs, "tensor", static=True) if inputs else None
    start, first, found = scale, 0.0, ("", jnp.zeros((1, 1)), np.inf)
    for number in range(ROUNDS if of_x else 1):
        rounded = _rounded(x, scale, of_x) if of_x else x
        if number == 0:
            spec = FormatSpec(CANDIDATES[bits][0])
            first = float(best_weights(rounded, w, wanted, factors[:1], spec)[1])
        tried = [(name, *best_weights(rounded, w, wanted, factors, FormatSpec(name))) for name in CANDIDATES[bits]]
        name, weight_scale, error = min(tried, key=lambda one: float(one[2]))
        if of_x:
            held = fake(w, FormatSpec(name), parameters=QParams(weight_scale))
            scale, error = best_inputs(x, held, wanted, start, factors, of_x)
        found = (name, weight_scale, float(error))
    return Fitted(found[0], inputs, found[1], scale, np.zeros(0, np.int32), first, found[2])


@dataclass
class LlmFp4(Pass):
    """bits, input_bits: 4, 6 or 8, inputs also 16 (as they are); shift: exponent biases by channel; steps; sites: the maps."""

    bits: int = 4
    input_bits: int = 4
    shift: bool = True
    steps: int = 40
    sites: str = ALL_MAPS
    stage: ClassVar[str] = FORMATS

    def check(self, config: ModelConfig) -> None:
        check_choice("llm_fp4: bits", self.bits, CANDIDATES)
        check_choice("llm_fp4: input_bits", self.input_bits, (*CANDIDATES, UNROUNDED))
        check(self.steps >= 1, "llm_fp4: steps", self.steps, "must be at least 1")
        maps_of(config, self.sites)

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        check_kernels(model, maps_of(model.config, self.sites))

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        tokens, formats = tier.sequences * tier.length, len(CANDIDATES[self.bits])
        turns = formats
        if self.input_bits != UNROUNDED:
            turns = len(CANDIDATES[self.input_bits]) * ROUNDS * (formats + 1)
        searches = f"{turns * (self.steps + 1)} products of {min(tokens, SAMPLE):,} tokens for each map"
        return f"{config.num_layers} blocks x 2 passes of {tokens:,} tokens, and {searches}"

    def apply(self, model: Model, work: Work) -> Model:
        sites, blocks = maps_of(model.config, self.sites), Blocks(model)
        found: dict[str, Any] = {}
        streams = [blocks.embed(tokens) for tokens in batches_of(work.calibration)]
        skip = work.calibration.spec.skip_first
        for layer in work.layers(self.name, len(blocks)):
            here = [site for site in sites if site.split(".")[1] == str(layer)]
            found |= work.piece(f"block{layer}", partial(self._block, blocks, layer, here, streams, skip)) if here else {}
            streams = [blocks.run(layer, h)[0] for h in streams]
        tensors = {site: found[site] for site in sites}
        formats = CANDIDATES.get(self.input_bits, ())
        inputs = {site: formats[int(found[f"{site}:inputs"])] for site in sites if formats}
        errors = {site: found[f"{site}:errors"].tolist() for site in sites}
        note_formats(work, self.name, model, tensors, inputs=inputs, errors=errors,
                     format_of={site: str(tensor.spec) for site, tensor in tensors.items()})  # fmt: skip
        made = with_qtensors(model, tensors)
        if not formats:
            return made
        if self.shift:
            factors = {site: np.exp2(found[f"{site}:offsets"]).astype(np.float32) for site in sites}
            made = place(made, "inputs", {site: Placed("exponent_shift", {"factor": factors[site]}) for site in sites})
        scales = {site: np.asarray(found[f"{site}:scale"], np.float32).reshape(1) for site in sites}
        statics = {site: FormatSpec(inputs[site], "tensor", static=True) for site in sites}
        return place(made, "inputs", {s: Placed(f"calibrated:{statics[s]}", {"scale": scales[s]}) for s in sites})

    def _block(self, blocks: Blocks, layer: int, sites: Sequence[str], streams: Sequence[Array], skip: int) -> dict[str, Any]:
        """QTensors by site; `SITE:inputs`, a number of `CANDIDATES`; `SITE:offsets`, `:scale`; `:errors`, before and after."""
        names = {site: tensor_of(site.split(".", 2)[2]) for site in sites}
        entering = [blocks.entering(layer, h, *dict.fromkeys(names.values())) for h in streams]
        found: dict[str, Any] = {}
        for site, name in names.items():
            rows = jnp.concatenate([tensors[name][:, skip:].reshape(-1, tensors[name].shape[-1]) for tensors in entering])
            magnitude = np.asarray(jnp.max(jnp.abs(rows), axis=0), np.float32)
            options: dict[str, Any] = dict(bits=self.bits, input_bits=self.input_bits, shift=self.shift, steps=self.steps)
            fitted = search(rows[:: -(-len(rows) // SAMPLE)], float_kernel(blocks.model, site), magnitude, **options)
            found[site] = _stored(float_kernel(blocks.model, site), fitted)
            number = CANDIDATES[self.input_bits].index(fitted.inputs) if fitted.inputs else -1
            found |= {f"{site}:inputs": np.int64(number), f"{site}:errors": np.array([fitted.before, fitted.after])}
            found |= {f"{site}:offsets": fitted.offsets, f"{site}:scale": np.asarray(fitted.input_scale)}
        return found


def _stored(kernel: Array, fitted: Fitted) -> QTensor:
    factor = jnp.asarray(np.exp2(-fitted.offsets), kernel.dtype)
    return qtensor(kernel * factor[:, None], FormatSpec(fitted.weights), parameters=QParams(fitted.weight_scale))
