"""SmoothQuant, W8A8: outliers of activations move into the weights, then both are int8; the argument is alpha.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/smoothquant.py:0.5 --out runs/smoothquant
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/smoothquant.py:off --out runs/w8a8

Weights have a scale per output, activations one per token. `off` rounds both without smoothing, for comparison.
Expected: within 1 % of dense in perplexity; the best alpha of a small model lies below the .85 of Llama-2. Not measured yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.inputs import QuantizedInputs
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.methods.quant.smoothquant import SmoothQuant
from sparsejax.plugs import ConfigError


def get_recipe(arg: str = "") -> list[Pass]:
    rounding: list[Pass] = [Rtn("int8"), QuantizedInputs("int8")]
    if arg == "off":
        return rounding
    try:
        return [SmoothQuant(float(arg or "0.5")), *rounding]
    except ValueError as error:
        raise ConfigError(f"smoothquant: alpha = {arg!r}: expected a number in [0, 1], or off") from error
