"""SpinQuant: rotations learned for the loss under 4-bit activations, then rounding to 4 bits; `WEIGHTS/SOLVER/INPUTS`.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/spinquant.py:int4/gptq --out runs/spinquant

Expected (published, 7 billion parameters): .2 less perplexity than QuaRot's random matrices. Not measured here yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.inputs import rounding
from sparsejax.methods.quant.spinquant import SpinQuant


def get_recipe(arg: str = "") -> list[Pass]:
    return [SpinQuant(), *rounding(arg)]
