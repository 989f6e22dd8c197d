"""OutlierTune: static scales by input channel, folded into the weights; the argument is WEIGHTS/INPUTS.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/outliertune.py:int8 --out runs/outliertune
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/outliertune.py:int6/int6 --out runs/outlier6
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/outliertune.py:int8:group=64/int6 --out DIR

WEIGHTS is a number format; by channel the products are those of integers. INPUTS is int8 (the default), int6, ...
Expected: below static scales of whole tensors (recipe spikes, `inf`), most at 6 bits. Not measured yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.outliertune import OutlierTune


def get_recipe(arg: str = "") -> list[Pass]:
    weights, _, inputs = arg.partition("/")
    return [OutlierTune(weights or "int8", inputs or "int8")]
