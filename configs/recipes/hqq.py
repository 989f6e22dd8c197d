"""HQQ: zeros fitted to the weights alone; the argument is the format, asymmetric with float zeros.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/hqq.py --out runs/hqq
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/hqq.py:int3:asym,group=64,zero=float --out DIR

Expected: seconds; between round to nearest and GPTQ, the more gained the fewer the bits. Not measured yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.hqq import Hqq


def get_recipe(arg: str = "") -> list[Pass]:
    return [Hqq(arg or "int4:asym,group=64,zero=float")]
