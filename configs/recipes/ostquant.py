"""OSTQuant: rotations and scales learned for the float model's logits, then rounding to 4 bits; `WEIGHTS/SOLVER/INPUTS`.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/ostquant.py:int4/gptq --out runs/ostquant

Expected (published): a third of the gap that rotations alone leave is closed. Not measured here yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.inputs import rounding
from sparsejax.methods.quant.ostquant import OstQuant


def get_recipe(arg: str = "") -> list[Pass]:
    return [OstQuant(), *rounding(arg)]
