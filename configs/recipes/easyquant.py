"""EasyQuant: static scales of weights and inputs by the cosine of outputs; the argument is int8, int7, ..., optionally /STEPS.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/easyquant.py:int8 --out runs/easyquant
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/easyquant.py:int7/40 --out runs/easyquant7

Inputs have one scale per map, which is never computed again. int7 lets 8 products add up in 16 bits. Interrupted, it goes on at
its block. Expected: below static scales of the extremes (recipe spikes, `inf`) in perplexity. Not measured yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.easyquant import EasyQuant
from sparsejax.plugs import ConfigError, parse_int


def get_recipe(arg: str = "") -> list[Pass]:
    text, _, steps = arg.partition("/")
    try:
        return [EasyQuant(text or "int8", parse_int(steps or "100"))]
    except ValueError as error:
        raise ConfigError(f"easyquant: steps = {steps!r}: expected a whole number") from error
