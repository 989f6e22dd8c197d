"""EasyQuant: one scale for the inputs of each map and one for each output of its weights, by the cosine of what the map gives.

"EasyQuant: Post-training Quantization via Scale Optimization" (Wu et al., 2020, arXiv 2006.16669). Acts on the kernels of
linear maps, which become `QTensor`s of symmetric integers, and on their inputs, which are rounded with static scales:

    max over s_w, s_x of mean over outputs n of cos(X w_n, Q(X^; s_x) Q(w_n; s_w,n))     X[N, in]; X^ with all before it rounded

alternately over the scales of the weights and that of the inputs, from those of the extremes, in the grid

    s = s_0 / f,   f = 1, and `steps` values from .5 to 2

so that no step of the search lowers the mean (the released grid does not hold f = 1). Published: 100 steps; 50 images.
With `int7` both operands are at most 63, and 8 of their products fit into 16 bits; of int8 only 2 do.
Differs from the released code: inputs and weights search in one interval (theirs: inputs .8 to 1, weights 0 to 1 of 1 / s_0);
scales start from the extremes, not from the least divergence; cosines are taken on `SAMPLE` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax import nnx_compat
from sparsejax.compress.blocks import INPUTS, Blocks
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.packed import check_format, check_kernels, float_kernel, note_formats, with_qtensors
from sparsejax.compress.recipe import FORMATS, Pass, Tier, Work
from sparsejax.compress.surgery import Placed, chain_at, place
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS, batches_of, maps_of
from sparsejax.models.config import ModelConfig
from sparsejax.ops.formats.quantize import fake, qparams
from sparsejax.ops.formats.scales import QParams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check
from sparsejax.quantized_arrays import QTensor, qtensor

ROUNDS = 2
SAMPLE = 1_024  # tokens


class Scales(NamedTuple):
    """Of one map.

    Fields:
      weights: [1, out]; inputs: []; both float32.
      before, after: the mean cosine at the scales of the extremes, and at these.
    """

    weights: Array
    inputs: Array
    before: Array
    after: Array


def products_in_16_bits(spec: FormatSpec) -> int:
    """How many products of two codes, the largest of either sign, add up within int16."""
    return int(np.iinfo(np.int16).max // spec.grid.greatest**2)


def factors_of(steps: int) -> np.ndarray:
    """f of the module docstring, 1 first: of equals the first is taken."""
    return np.concatenate([[1.0], np.linspace(0.5, 2.0, steps)]).astype(np.float32)


@partial(jax.jit, static_argnames=("spec",))
def best_scales(
    wanted: Float[Array, "N out"],
    x: Float[Array, "N in"],
    kernel: Float[Array, "in out"],
    largest: Float[Array, ""],
    factors: Float[Array, " steps"],
    spec: FormatSpec,
) -> Scales:
    """The scales of a map.

    Args:
      wanted: what it gives in the float model.
      x: what enters it when all before it is rounded, of the same tokens.
      largest: max |x| over the calibration.
      factors: of `factors_of`.
      spec: of the kernel: narrow integers by channel.
    """
    of_x, w = _of_inputs(spec), kernel.astype(jnp.float32)
    x, wanted = x.astype(jnp.float32), wanted.astype(jnp.float32)
    start_w, start_x = qparams(w, spec).scale, largest.astype(jnp.float32) / spec.grid.greatest
    unit = wanted / jnp.maximum(jnp.linalg.norm(wanted, axis=0, keepdims=True), 1e-30)

    def rounded_x(scale: Array) -> Array:
        return fake(x, of_x, parameters=QParams(scale.reshape(1, 1)))

    def rounded_w(scale: Array) -> Array:
        return fake(w, spec, parameters=QParams(scale))

    def cosines(x: Array, w: Array) -> Array:
        given = x @ w
        return jnp.sum(unit * given, axis=0) / jnp.maximum(jnp.linalg.norm(given, axis=0), 1e-30)

    def turn(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        held = rounded_x(state[1])
        found = jax.lax.map(lambda f: cosines(held, rounded_w(start_w / f)), factors)  # [steps, out]
        scale_w = start_w / factors[jnp.argmax(found, axis=0)][None]
        held = rounded_w(scale_w)
        found = jax.lax.map(lambda f: jnp.mean(cosines(rounded_x(start_x / f), held)), factors)
        return (scale_w, start_x / factors[jnp.argmax(found)]), None

    def mean(scale_w: Array, scale_x: Array) -> Array:
        return jnp.mean(cosines(rounded_x(scale_x), rounded_w(scale_w)))

    (scale_w, scale_x), _ = jax.lax.scan(turn, (start_w, start_x), None, length=ROUNDS)
    return Scales(scale_w, scale_x, mean(start_w, start_x), mean(scale_w, scale_x))


def _of_inputs(spec: FormatSpec) -> FormatSpec:
    return FormatSpec(spec.element, "tensor", static=True)


@dataclass
class EasyQuant(Pass):
    """format: of the weights, narrow integers by channel; inputs have their element; steps: of the grid; sites: the maps."""

    format: str = "int8"
    steps: int = 100
    sites: str = ALL_MAPS
    stage: ClassVar[str] = FORMATS

    def check(self, config: ModelConfig) -> None:
        spec = FormatSpec.parse(self.format)
        fits = spec.multiplies_as_integers and spec.granularity == "channel" and spec == FormatSpec(spec.element)
        check(fits and spec.element != "ternary", "easyquant: format", self.format,
              "expected symmetric integers by channel, such as int8 or int7")  # fmt: skip
        check(self.steps >= 1, "easyquant: steps", self.steps, "must be at least 1")
        check_format(config, maps_of(config, self.sites), spec)

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        check_kernels(model, maps_of(model.config, self.sites))

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        tokens = tier.sequences * tier.length
        searches = f"{2 * ROUNDS * (self.steps + 1)} products of {min(tokens, SAMPLE):,} tokens for each map"
        return f"{config.num_layers} blocks x 7 passes of {tokens:,} tokens, and {searches}"

    def apply(self, model: Model, work: Work) -> Model:
        sites = maps_of(model.config, self.sites)
        found: dict[str, Any] = {}
        fit = _Fit(self, model, sites, work)
        for layer in work.layers(self.name, len(fit.float)):
            here = [site for site in sites if site.split(".")[1] == str(layer)]
            fitted = work.piece(f"block{layer}", partial(fit.block, layer, here)) if here else {}
            fit.leave(layer, fitted)
            found |= fitted
        tensors = {site: found[site] for site in sites}
        cosines = {site: [float(found[f"{site}:before"]), float(found[f"{site}:after"])] for site in sites}
        spec = FormatSpec.parse(self.format)
        note_formats(work, self.name, model, tensors, cosines=cosines, products_in_16_bits=products_in_16_bits(spec))
        inputs = {site: fit.placed(jnp.asarray(found[f"{site}:inputs"], jnp.float32)) for site in sites}
        return place(with_qtensors(model, tensors), "inputs", inputs)


class _Fit:
    """Block by block, and in a block tensor by tensor, each fed by what is rounded before it."""

    def __init__(self, options: EasyQuant, model: Model, sites: Sequence[str], work: Work):
        self.options, self.model, self.skip = options, model, work.calibration.spec.skip_first
        self.spec, self.float = FormatSpec.parse(options.format), Blocks(model)
        self.at = {site: len(chain_at(model.config, "inputs", site)) for site in sites}
        # What a probe sees of a tensor has been rounded by the op in front of its map: so one model for each tensor, with ops
        # at the maps before it; and one with all of them.
        self.before: dict[str, Blocks] = {}
        passed: list[str] = []
        for tap, names in INPUTS.items():
            self.before[tap] = self._with_ops(passed)
            passed += [site for site in sites if site.split(".", 2)[2] in names]
        self.all = self._with_ops(passed)
        self.dense = self.rounded = [self.float.embed(tokens) for tokens in batches_of(work.calibration)]

    def placed(self, scale: Array) -> Placed:
        """The op of inputs with this scale."""
        return Placed(f"calibrated:{_of_inputs(self.spec)}", {"scale": scale.reshape(1)})

    def block(self, layer: int, sites: Sequence[str]) -> dict[str, Any]:
        """QTensors by site, `SITE:inputs`, the scale of what enters it, and `SITE:before` and `SITE:after`, cosines."""
        found: dict[str, Any] = {}
        float_tensors = [self.float.entering(layer, h, *INPUTS) for h in self.dense]
        for tap, names in INPUTS.items():
            here = [site for site in sites if site.split(".", 2)[2] in names]
            if not here:
                continue
            values = self._values(self.before[tap], layer, found)
            rounded = [self.before[tap].entering(layer, h, tap, values=values)[tap] for h in self.rounded]
            x, x_rounded = self._rows([tensors[tap] for tensors in float_tensors]), self._rows(rounded)
            largest = jnp.max(jnp.abs(x_rounded))
            every = -(-len(x) // SAMPLE)
            for site in here:
                kernel = float_kernel(self.model, site)
                wanted = x[::every].astype(jnp.float32) @ kernel.astype(jnp.float32)
                factors = jnp.asarray(factors_of(self.options.steps))
                scales = best_scales(wanted, x_rounded[::every], kernel, largest, factors, self.spec)
                found[site] = qtensor(kernel, self.spec, parameters=QParams(scales.weights))
                found |= {f"{site}:{name}": np.asarray(getattr(scales, name)) for name in ("inputs", "before", "after")}
        return found

    def leave(self, layer: int, found: Mapping[str, Any]) -> None:
        """Go on to what the block gives, in the float model and with these."""
        if layer + 1 < len(self.float):
            values = self._values(self.all, layer, found)
            self.rounded = [self.all.run(layer, h, values=values)[0] for h in self.rounded]
            self.dense = [self.float.run(layer, h)[0] for h in self.dense]

    def _with_ops(self, sites: Sequence[str]) -> Blocks:
        plan = {site: self.placed(jnp.ones(())) for site in sites}
        return Blocks(place(self.model, "inputs", plan)) if plan else self.float

    def _values(self, blocks: Blocks, layer: int, found: Mapping[str, Any]) -> dict[str, Any]:
        values = jax.tree.map(lambda a: a, blocks.values(layer))  # new dicts, the same arrays
        for site, tensor in found.items():
            if isinstance(tensor, QTensor):
                part, name = site.split(".")[2:]
                values[part][name]["kernel"] = tensor
                scale = jnp.asarray(found[f"{site}:inputs"], jnp.float32).reshape(1)
                nnx_compat.put(values, (part, name, "inputs", str(self.at[site]), "scale"), scale)
        return values

    def _rows(self, tensors: Sequence[Array]) -> Array:
        return jnp.concatenate([x[:, self.skip :].reshape(-1, x.shape[-1]) for x in tensors])
