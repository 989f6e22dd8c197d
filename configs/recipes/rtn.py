"""Round to nearest: every map's weights in a number format, without calibration; the argument is the format, and `/mse` to
search for the scales that lose least.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/rtn.py:int8 --out runs/rtn8
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/rtn.py:int4:asym,group=64 --out runs/rtn4
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/rtn.py:int3:asym,group=64/mse --out runs/rtn3

Formats are those of `sparsejax.ops.formats.spec`: nf4:group=64,double  mxfp4  nvfp4  int3:asym,group=64  ...
Expected of SmolLM2 on a CPU: 6 seconds, and with the default 30 % more perplexity on stdlib (4 windows of 512; a model of this
size is fragile). Per-channel 4 bits, and 3 or 2 bits, are much worse than what GPTQ makes of them.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.rtn import Rtn


def get_recipe(arg: str = "") -> list[Pass]:
    text, _, scales = arg.partition("/")
    return [Rtn(text or "int4:asym,group=64", scales=scales or "absmax")]
