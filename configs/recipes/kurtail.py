"""KurTail: rotations learned by the kurtosis of what enters blocks, then rounding to 4 bits; `WEIGHTS/SOLVER/INPUTS`.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/kurtail.py:int4/gptq --out runs/kurtail

Expected (published): between QuaRot and SpinQuant or better, at the cost of one pass over the calibration.
Not measured here yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.inputs import rounding
from sparsejax.methods.quant.kurtail import KurTail


def get_recipe(arg: str = "") -> list[Pass]:
    return [KurTail(), *rounding(arg)]
