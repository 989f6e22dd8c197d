"""Round to nearest: every map's weights in a number format, without calibration; the argument is the format.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/rtn.py:int8 --out runs/rtn8
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/rtn.py:int4:asym,group=64 --out runs/rtn4

Formats are those of `sparsejax.ops.formats.spec`: nf4:group=64,double  mxfp4  nvfp4  int3:asym,group=64  ...
Expected: seconds; int8 as good as dense, 4 bits with groups of 64 a few per cent above it in perplexity, per-channel 4 bits and
anything of 3 or 2 bits much worse than what GPTQ makes of them. Not measured yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.rtn import Rtn


def get_recipe(arg: str = "") -> list[Pass]:
    return [Rtn(arg or "int4:asym,group=64")]
