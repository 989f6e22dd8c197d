"""DartQuant: rotations learned through QR by what pulls outliers in, then rounding to 4 bits; `WEIGHTS/SOLVER/INPUTS`.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/dartquant.py:int4/gptq --out runs/dartquant

Expected (published): SpinQuant's perplexity at a tenth of its cost. Not measured here yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.dartquant import DartQuant
from sparsejax.methods.quant.inputs import rounding


def get_recipe(arg: str = "") -> list[Pass]:
    return [DartQuant(), *rounding(arg)]
